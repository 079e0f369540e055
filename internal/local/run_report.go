// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// report prints the table at the end of a successful run.
func (r *run) report(job ims.Job, artifacts []artifact) error {
	fmt.Fprintf(r.Out, "\njob %s: image %q is %s\n\n", job.ID, r.Name, job.ResultantImageID)
	t := tabwriter.NewWriter(r.Out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "ARTIFACT\tS3 KEY\tSIZE\tMD5")
	for _, a := range artifacts {
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\n", a.kind, a.key, a.size, a.md5)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(t, "\nPHASE\tSECONDS")
	total := time.Duration(0)
	for _, p := range r.phases {
		if p.name == string(ims.Success) {
			continue // no time passes in it
		}
		fmt.Fprintf(t, "%s\t%.1f\n", p.name, p.took.Seconds())
		total += p.took
	}
	fmt.Fprintf(t, "total\t%.1f\n", total.Seconds())
	if err := t.Flush(); err != nil {
		return err
	}
	if r.Output != "" {
		fmt.Fprintf(r.Out, "\nnew rootfs: %s\n", r.Output)
	}
	return nil
}

// events is the stream for scripts: a JSON object per line.
type events struct{ f *os.File }

// event is one line of it.
type event struct {
	Time    string `json:"time"`  // RFC 3339
	Event   string `json:"event"` // "status"
	Status  string `json:"status"`
	SSHPort int    `json:"ssh_port"`
	JobID   string `json:"job_id"`
}

func openEvents(name string) (*events, error) {
	if name == "" {
		return &events{}, nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("--events: %w", err)
	}
	return &events{f}, nil
}

func (e *events) status(jobID, status string, port int) error {
	if e.f == nil {
		return nil
	}
	b, err := json.Marshal(event{time.Now().Format(time.RFC3339Nano), "status", status, port, jobID})
	if err != nil {
		return err
	}
	if _, err := e.f.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("--events: %w", err)
	}
	return nil
}

func (e *events) close() {
	if e.f != nil {
		e.f.Close()
	}
}
