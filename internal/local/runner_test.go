// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// testRunner runs pods whose programs are shell scripts: what is tested is what
// the runner does around them.
type testRunner struct {
	*processRunner
	seen chan string // each line
	over chan string // reasons
}

func newTestRunner(t *testing.T, sidecar, sshd string) *testRunner {
	t.Helper()
	testkit.NeedRoot(t)
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	const head = "#!/bin/sh\nPATH=/usr/bin:/bin\n"
	for name, script := range map[string]string{"sidecar": sidecar, "sshd": sshd} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(head+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkMachine(bin); err != nil {
		t.Fatal(err)
	}
	r := &testRunner{seen: make(chan string, 1000), over: make(chan string, 10)}
	world := testSpec("", false, false).world
	world.bin = bin
	var err error
	r.processRunner, err = newProcessRunner(runnerConfig{dir: filepath.Join(dir, "jobs"), world: world, log: testLog(t),
		line:  func(_, container, line string) { r.seen <- container + ": " + line },
		ended: func(_, reason string) { r.over <- reason },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

// job starts a pod.
func (r *testRunner) job(t *testing.T) (Job, ConnectionInfo) {
	t.Helper()
	spec := testSpec("", false, false)
	info, err := r.Reserve(spec.job)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(spec.job, spec.input); err != nil {
		t.Fatal(err)
	}
	return spec.job, info
}

// until waits for a line.
func (r *testRunner) until(t *testing.T, want string) {
	t.Helper()
	for {
		select {
		case line := <-r.seen:
			if line == want {
				return
			}
		case reason := <-r.over:
			t.Fatalf("the pod ended (%s) before it said %q", reason, want)
		}
	}
}

func history(t *testing.T, r *testRunner, job Job) []containerEnd {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, job.ID, "containers.json"))
	if err != nil {
		t.Fatal(err)
	}
	var list []containerEnd
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestPodRunsPrepareThenBoth(t *testing.T) {
	r := newTestRunner(t, `
		echo "$0 $*"
		case $1 in
		prepare) echo laid out > /mnt/image/root; cat /etc/cray/authorized_keys ;;
		run) cat /mnt/image/root; echo "$SSHD_PORT" > /etc/cray/ims/port
		     until [ -e /mnt/image/exiting ]; do sleep 0.05; done ;;
		esac`, `
		until [ -e /etc/cray/ims/port ]; do sleep 0.05; done
		echo "port $(cat /etc/cray/ims/port)"; ls /etc/cray; ls /etc/admin-client-auth 2>/dev/null
		touch /mnt/image/exiting`)
	job, info := r.job(t)
	if reason := <-r.over; reason != "the container buildenv-sidecar ended: exit code 0" {
		t.Errorf("the pod ended: %s", reason)
	}
	r.close()
	if _, err := os.Stat("/mnt/image/root"); err == nil {
		t.Error("the volume shows on the host")
	}
	ends := history(t, r, job)
	var names []string
	for _, e := range ends {
		names = append(names, e.Name)
		if e.exit != (exit{}) {
			t.Errorf("%s ended with %s", e.Name, e.exit)
		}
	}
	if !slices.Equal(names, []string{prepareName, sidecarName, sshdName}) {
		t.Errorf("containers that ended: %v", names)
	}
	for name, want := range map[string]string{
		prepareName: "/usr/local/bin/sidecar prepare /mnt/image http://127.0.0.1:7072/rootfs?a=b&c=d\nssh-ed25519 AAAA lab\n",
		sidecarName: "/usr/local/bin/sidecar run /mnt/image\nlaid out\n",
		sshdName:    "port " + strings.TrimSpace(jsonNumber(info.CustomerAccess.Port)) + "\nca\nims\nremote-keys\n",
	} {
		b, err := os.ReadFile(filepath.Join(r.dir, job.ID, "logs", name+".log"))
		if err != nil || string(b) != want {
			t.Errorf("log of %s is %q, want %q (%v)", name, b, want, err)
		}
	}
}

func jsonNumber(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

func TestPodEndsWhenPrepareFails(t *testing.T) {
	r := newTestRunner(t, `echo no room >&2; exit 3`, `echo must not run`)
	job, _ := r.job(t)
	if reason := <-r.over; reason != "the container prepare ended: exit code 3" {
		t.Errorf("the pod ended: %s", reason)
	}
	r.close()
	if ends := history(t, r, job); len(ends) != 1 || ends[0].Code != 3 {
		t.Errorf("containers that ended: %+v", ends)
	}
}

// TestReleaseTakesTheVolumeAtOnce: the claim's name is gone when Release
// returns, its content when the containers have ended.
func TestReleaseTakesTheVolumeAtOnce(t *testing.T) {
	r := newTestRunner(t, `
		case $1 in
		prepare) exit 0 ;;
		run) echo up; until [ -e /mnt/image/go ]; do sleep 0.05; done; echo still here > /mnt/image/late ;;
		esac`, `trap 'exit 0' TERM; while :; do sleep 0.05; done`)
	job, _ := r.job(t)
	r.until(t, "buildenv-sidecar: up")
	dir := filepath.Join(r.dir, job.ID)
	if err := r.Release(job.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "volume")); !os.IsNotExist(err) {
		t.Errorf("the volume is still there: %v", err)
	}
	// the container has it as before
	if err := os.WriteFile(filepath.Join(dir, "volume.released", "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if reason := <-r.over; !strings.HasSuffix(reason, "exit code 0") {
		t.Errorf("the pod ended: %s", reason)
	}
	r.close()
	for _, name := range []string{"volume", "volume.released", "scratch"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
	if err := r.Release(job.ID); err != nil {
		t.Errorf("second release: %v", err)
	}
}

func TestRemoveStopsContainersAndDirectory(t *testing.T) {
	r := newTestRunner(t, `
		case $1 in
		prepare) exit 0 ;;
		run) trap 'echo asked to end; exit 9' TERM; echo up; while :; do sleep 0.05; done ;;
		esac`, `trap 'exit 0' TERM; while :; do sleep 0.05; done`)
	job, _ := r.job(t)
	r.until(t, "buildenv-sidecar: up")
	if err := r.Remove(job.ID); err != nil {
		t.Fatal(err)
	}
	r.until(t, "buildenv-sidecar: asked to end")
	if reason := <-r.over; !strings.HasSuffix(reason, "exit code 9") {
		t.Errorf("the pod ended: %s", reason)
	}
	r.close()
	if _, err := os.Stat(filepath.Join(r.dir, job.ID)); !os.IsNotExist(err) {
		t.Errorf("the job's directory is still there: %v", err)
	}
}

func TestSweepKeepsLogsOfKnownJobs(t *testing.T) {
	r := newTestRunner(t, "", "")
	for _, path := range []string{"known/volume/x", "known/volume.released/x", "known/scratch/x", "known/logs/x", "unknown/logs/x"} {
		if err := os.MkdirAll(filepath.Join(r.dir, path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.sweep([]Job{{ID: "known"}}); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(r.dir + "/*/*")
	if err != nil || !slices.Equal(left, []string{r.dir + "/known/logs"}) {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestPortOfAnotherJobIsNotGiven(t *testing.T) {
	r := newTestRunner(t, "", "")
	first, err := r.Reserve(Job{ID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	r.port = first.CustomerAccess.Port
	if _, err := r.Reserve(Job{ID: "2"}); err == nil || !strings.Contains(err.Error(), "--port") {
		t.Errorf("second job on port %d: %v", r.port, err)
	}
	if err := r.Remove("1"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reserve(Job{ID: "2"}); err != nil {
		t.Errorf("port of a removed job: %v", err)
	}
}

// TestRestartEndsJobs: a job that ran when imslocal died has no pod any more.
func TestRestartEndsJobs(t *testing.T) {
	r := newTestRunner(t, "", "")
	a, _, _ := testAPI(t, func(c *apiConfig) { c.runner = r })
	for id, status := range map[string]string{"running": "waiting_on_user", "done": "success", "failed": "error"} {
		if err := a.state.jobs.put(Job{ID: id, Status: status}); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(r.dir, id, "volume", "image-root"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{runner: r.processRunner}
	if err := w.recover(a); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{"running": "error", "done": "success", "failed": "error"} {
		if job, _ := a.state.jobs.get(id); job.Status != want {
			t.Errorf("job %s is %s after the restart, want %s", id, job.Status, want)
		}
	}
	if left, err := filepath.Glob(r.dir + "/*/*"); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}
