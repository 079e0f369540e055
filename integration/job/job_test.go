// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// job is a customize job run by imslocal.
type job struct {
	t    *testing.T
	w    *world
	user user
	name string // of the new image; no two jobs have the same
	jail bool
	port int
	ims.Job
}

// order is a job to create; zero values mean the defaults.
type order struct {
	image          string // the shared base
	key            string // the shared user's
	jail, dkms     bool
	kernel, initrd string
}

// names counts the images that are to be made, so that each has its own name.
var names atomic.Int64

func newName(t *testing.T) string {
	return fmt.Sprintf("%s.%d", strings.ReplaceAll(t.Name(), "/", "."), names.Add(1))
}

func (s *stage) create(t *testing.T, o order) *job {
	t.Helper()
	if o.image == "" {
		o.image = s.base.id
	}
	if o.key == "" {
		o.key = s.user.keyID
	}
	j := &job{t: t, w: s.world, user: s.user, name: newName(t), jail: o.jail}
	var err error
	j.Job, err = s.ims.CreateJob(t.Context(), ims.JobRequest{
		JobType: "customize", ArtifactID: o.image, PublicKeyID: o.key, ArchiveName: j.name, RequireDKMS: &o.dkms,
		KernelFileName: o.kernel, InitrdFileName: o.initrd, SSHContainers: []ims.SSHContainer{{Name: "customize", Jail: o.jail}},
	})
	if err != nil {
		t.Fatal(err)
	}
	j.port = j.SSHContainers[0].ConnectionInfo["customer_access"].Port
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"prepare", "sshd", "buildenv-sidecar"} {
				b, _ := os.ReadFile(j.path("logs", name+".log"))
				t.Logf("container %s of job %s:\n%s", name, j.ID, b)
			}
		}
		if err := s.ims.DeleteJob(context.Background(), j.ID); err != nil {
			t.Logf("delete job: %v", err)
		}
	})
	return j
}

// path is a file of the job below imslocal's data directory.
func (j *job) path(elem ...string) string {
	return filepath.Join(append([]string{j.w.data, "jobs", j.ID}, elem...)...)
}

// inside is a path of the image as the user in the shell sees it.
func (j *job) inside(name string) string {
	if j.jail {
		return name
	}
	return "/mnt/image/image-root" + name
}

// flag is where the user makes a flag file.
func (j *job) flag(name string) string {
	if j.jail {
		return "/tmp/" + name
	}
	return "/mnt/image/" + name
}

// wait returns when the job has a status. Another terminal one ends the test.
func (j *job) wait(want ims.Status) {
	j.t.Helper()
	eventually(j.t, "job "+j.ID+" is "+string(want), func() bool {
		now, err := j.w.ims.Job(j.t.Context(), j.ID)
		if err != nil {
			j.t.Fatal(err)
		}
		if now.Status != want && (now.Status == ims.Success || now.Status == ims.Failed) {
			j.t.Fatalf("the job ended with status %s, not %s", now.Status, want)
		}
		if now.Status == ims.Success && now.ResultantImageID == "" {
			j.t.Fatal("success before resultant_image_id")
		}
		return now.Status == want
	})
}

// knock connects to the job's port again and again until the returned function is called. From the moment on that the
// API says waiting_on_user every connection must be accepted and greeted: to CFS a refused one is a failed session.
func (j *job) knock() (end func()) {
	j.t.Helper()
	stop, ended := make(chan struct{}), make(chan struct{})
	before, after := 0, 0
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for promised := false; ; {
			if !promised {
				now, err := j.w.ims.Job(j.t.Context(), j.ID)
				promised = err == nil && now.Status == ims.WaitingOnUser
			}
			err := greeted(j.port)
			switch {
			case promised && err != nil:
				j.t.Errorf("connection %d after waiting_on_user: %v", after, err)
				return
			case promised:
				after++
			case err != nil:
				before++
			}
			select {
			case <-stop:
				return
			case <-j.t.Context().Done():
				return
			case <-tick.C:
			}
		}
	}()
	j.t.Cleanup(func() { <-ended })
	return func() {
		j.t.Helper()
		close(stop)
		<-ended
		if before == 0 || after == 0 {
			j.t.Errorf("%d refused connections before waiting_on_user and %d good ones after it show nothing", before, after)
		}
	}
}

// greeted connects to a port of the machine and reads the first of what an SSH server says.
func greeted(port int) error {
	nc, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), patience)
	if err != nil {
		return err
	}
	defer nc.Close()
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	banner := make([]byte, len("SSH-2.0-"))
	if _, err := io.ReadFull(nc, banner); err != nil || string(banner) != "SSH-2.0-" {
		return fmt.Errorf("greeted with %q: %v", banner, err)
	}
	return nil
}

// statuses are all that the job was given, in order.
func (j *job) statuses() []string { return statusesOf(j.t, j.w, j.ID) }

func statusesOf(t *testing.T, w *world, id string) []string {
	t.Helper()
	var all []string
	for line := range strings.Lines(w.output(t)) {
		if strings.Contains(line, `msg="job status"`) && attribute(line, "job_id") == id {
			all = append(all, attribute(strings.TrimSpace(line), "status"))
		}
	}
	return all
}

// ends waits for the pod's end and returns how each container ended.
func (j *job) ends() map[string]int {
	j.t.Helper()
	eventually(j.t, "all containers of job "+j.ID+" have ended", func() bool {
		_, err := os.Stat(j.path("containers.json"))
		return err == nil
	})
	var history []struct {
		Name string `json:"name"`
		Code int    `json:"exit_code"`
	}
	readJSON(j.t, j.path("containers.json"), &history)
	codes := map[string]int{}
	for _, c := range history {
		codes[c.Name] = c.Code
	}
	return codes
}

// log is what a container printed.
func (j *job) log(container string) string {
	j.t.Helper()
	return readFile(j.t, j.path("logs", container+".log"))
}

// checkNothingLeft fails on processes, mounts and files of a job that is over.
func (j *job) checkNothingLeft() {
	t := j.t
	t.Helper()
	j.ends()
	for _, name := range []string{"volume", "volume.released", "scratch"} {
		eventually(t, name+" of job "+j.ID+" is gone", func() bool {
			_, err := os.Lstat(j.path(name))
			return os.IsNotExist(err)
		})
	}
	for _, p := range processesOf(t, j.ID) {
		t.Errorf("still running: %s", p)
	}
	if s := readFile(t, "/proc/self/mountinfo"); strings.Contains(s, j.ID) {
		t.Errorf("still mounted:\n%s", s)
	}
	// what is left is for people: logs, and the config maps until the job is deleted
	left, err := os.ReadDir(j.path("ims"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if !slices.Contains([]string{"authorized_keys", "sshd_config", "sshd.log", "changes.json", "changes.html"}, e.Name()) && !strings.Contains(e.Name(), "host") {
			t.Errorf("left beside the sshd configuration: %s", e.Name())
		}
	}
}

// processesOf are the processes that belong to a job, by environment or mounts.
func processesOf(t *testing.T, id string) []string {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, dir := range dirs {
		env, _ := os.ReadFile(dir + "/environ") // many end while we look
		mounts, _ := os.ReadFile(dir + "/mountinfo")
		if strings.Contains(string(env), id) || strings.Contains(string(mounts), id) {
			cmdline, _ := os.ReadFile(dir + "/cmdline")
			found = append(found, filepath.Base(dir)+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return found
}

// checkFailed waits for the job's end by an error of ours and checks what
// every such end has in common. container is the one that fails, and in the
// only error it logs each of the words must occur.
func (j *job) checkFailed(container string, words ...string) {
	t := j.t
	t.Helper()
	j.wait(ims.Failed)
	if codes := j.ends(); codes[container] != 1 {
		t.Errorf("exit codes %v, want 1 for %s", codes, container)
	}
	checkOneError(t, j.log(container), words...)
	j.w.checkNoImage(t, j.name)
	j.checkNothingLeft()
	if now, err := j.w.ims.Job(t.Context(), j.ID); err != nil || now.ResultantImageID != "" {
		t.Errorf("job %s, %v", now.Raw, err)
	}
}

// checkOneError fails unless a log has exactly one error line, with all words.
func checkOneError(t *testing.T, log string, words ...string) {
	t.Helper()
	var lines []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, " level=ERROR ") {
			lines = append(lines, strings.TrimSpace(line))
		}
		if strings.Contains(line, "panic") || strings.Contains(line, "goroutine ") {
			t.Errorf("a crash in the log: %s", line)
		}
	}
	if len(lines) != 1 {
		t.Fatalf("%d error lines, want one:\n%s", len(lines), list(lines))
	}
	t.Logf("the error: %s", lines[0])
	for _, w := range words {
		if !strings.Contains(lines[0], w) {
			t.Errorf("the error does not say %q:\n  %s", w, lines[0])
		}
	}
}
