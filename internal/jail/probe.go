// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
)

// probeArgs tells the probe child what it must not reach.
type probeArgs struct {
	Level    Level
	Dev, Ino uint64 // of the image root
	Caps     uint64 // what the sessions may have
	Gateway  int    // pids as seen outside
	Init     int
	// Of the chroot level: who must not be signalled, and the user that they are.
	Shielded   []int
	ShieldUser int
	Block      []uint64 // device numbers of the machine's block devices
}

// probeResult is one attempt to break out.
type probeResult struct {
	Name    string
	Escaped bool
	Detail  string // what stopped it, or how far it got
}

// probeMain runs inside the jail, as a session would, and makes every attempt. Attempts that succeed are undone as far
// as they can be; the jail is torn down afterwards anyway.
func probeMain() error {
	runtime.LockOSThread()
	if len(os.Args) != 3 {
		return errors.New("internal mode, started by sshd only")
	}
	var a probeArgs
	if err := json.Unmarshal([]byte(os.Args[2]), &a); err != nil {
		return fmt.Errorf("read arguments: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(runAttempts(&a))
}

// maxProbeOutput bounds what the parent reads from the probe child.
const maxProbeOutput = 1 << 20

// probe starts the probe child in the jail and collects its results.
func (j *Jail) probe(ctx context.Context) ([]probeResult, error) {
	a := probeArgs{Level: j.level, Dev: j.dir.st.Dev, Ino: j.dir.st.Ino, Caps: j.caps, Gateway: os.Getpid(), Init: j.proc.Pid}
	if j.level == Chroot {
		a.Shielded = []int{a.Init}
		if shielded() {
			a.Shielded = append(a.Shielded, a.Gateway)
		}
		var err error
		if a.ShieldUser, err = shieldUser(); err != nil {
			return nil, err
		}
	}
	for _, d := range partitions() {
		a.Block = append(a.Block, d.rdev)
	}
	arg, err := json.Marshal(&a)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	er, ew, err := os.Pipe()
	if err != nil {
		w.Close()
		return nil, err
	}
	defer er.Close()
	p, err := j.Spawn(Request{Kind: kindProbe, Command: string(arg), Stdout: w, Stderr: ew})
	w.Close()
	ew.Close()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { j.kill(ctx.Err()) })
	defer stop()
	out, err := io.ReadAll(io.LimitReader(r, maxProbeOutput))
	if err != nil {
		return nil, err
	}
	msg, _ := io.ReadAll(io.LimitReader(er, 4096))
	if e := p.Wait(); e.Err != nil || e.Code != 0 || e.Signal != 0 {
		return nil, fmt.Errorf("probe child ended with %+v: %s", e, strings.TrimSpace(string(msg)))
	}
	var results []probeResult
	if err := json.Unmarshal(out, &results); err != nil {
		return nil, fmt.Errorf("read results: %w", err)
	}
	return results, nil
}

// prove has the jail tried from inside and fails if anything got out, or if not every attempt was made.
func (j *Jail) prove(ctx context.Context) error {
	results, err := j.probe(ctx)
	if err != nil {
		return fmt.Errorf("try to break out: %w", err)
	}
	var out []string
	for _, r := range results {
		j.log.Debug("break-out attempt", "name", r.Name, "escaped", r.Escaped, "detail", r.Detail)
		if r.Escaped {
			out = append(out, r.Name+" ("+r.Detail+")")
		}
	}
	if len(out) > 0 {
		return fmt.Errorf("%w: %s", errBreakout, strings.Join(out, "; "))
	}
	if len(results) != len(attempts) {
		return fmt.Errorf("try to break out: %d of %d attempts were made", len(results), len(attempts))
	}
	j.log.Info("jail proven", "level", j.level, "attempts", len(results))
	return nil
}

// errBreakout means that the confinement was built but does not hold. There is no weaker level to fall back to: a
// container in which a confinement fails is not understood.
var errBreakout = errors.New("the jail does not hold; sessions are refused")
