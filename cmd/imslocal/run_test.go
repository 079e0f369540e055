// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// built is where programs has put the binaries.
var built string

// programs builds the three binaries once, side by side as they are installed.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "imslocal-test-bin-")
	if err != nil {
		return "", err
	}
	built = dir
	cmd := exec.Command("go", "build", "-o", dir, "../imslocal", "../sidecar", "../sshd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

// bench is a user with a key and an image.
type bench struct {
	t      *testing.T
	bin    string
	dir    string
	signer ssh.Signer
}

func newBench(t *testing.T) *bench {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "go")
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, bin: bin, dir: t.TempDir()}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if b.signer, err = ssh.NewSignerFromKey(private); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path("id.pub"), ssh.MarshalAuthorizedKey(b.signer.PublicKey()), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(b.path("root"), 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, b.path("root"), "dir etc 0755", "file etc/os-release 0644 test", "dir tmp 1777", "dir boot 0755",
		"file boot/vmlinuz-1 0644 the kernel", "symlink boot/vmlinuz /boot/vmlinuz-1",
		"dir usr/lib 0755", "file usr/lib/initrd-1 0600 the initrd", "symlink boot/initrd ../../usr/lib/initrd-1")
	source, err := squash.DirSource(b.path("root"), squash.DirOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := squash.PackFile(t.Context(), source, b.path("base.squashfs"), squash.Options{}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// job is an imslocal run under way.
type job struct {
	*bench
	cmd *exec.Cmd
	out bytes.Buffer
}

type event struct {
	Event, Status string
	SSHPort       int    `json:"ssh_port"`
	JobID         string `json:"job_id"`
}

func (b *bench) start(args ...string) *job {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	b.t.Cleanup(cancel)
	args = append([]string{"run", "--image", b.path("base.squashfs"), "--key", b.path("id.pub"), "--name", "test image",
		"--events", b.path("events"), "--output", b.path("new.squashfs")}, args...)
	j := &job{bench: b, cmd: exec.CommandContext(ctx, filepath.Join(b.bin, "imslocal"), args...)}
	j.cmd.Stdout, j.cmd.Stderr = &j.out, &j.out
	if err := j.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	return j
}

// events reads the event file as far as it has been written.
func (j *job) events() []event {
	b, err := os.ReadFile(j.path("events"))
	if err != nil {
		return nil
	}
	var list []event
	for line := range strings.Lines(string(b)) {
		var e event
		if json.Unmarshal([]byte(line), &e) == nil {
			list = append(list, e)
		}
	}
	return list
}

// reach waits until the job has the status.
func (j *job) reach(status string) event {
	j.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		for _, e := range j.events() {
			if e.Status == status {
				return e
			}
			if e.Status == "error" || e.Status == "success" { // the last one: what was waited for is not among them
				j.t.Fatalf("the job ended with %s before it reached %s\n%s", e.Status, status, j.end())
			}
		}
	}
	j.t.Fatalf("the job never reached %s\n%s", status, j.end())
	panic("not reached")
}

// end kills what is left and returns the output.
func (j *job) end() string {
	_ = j.cmd.Process.Kill()
	_ = j.cmd.Wait()
	return j.out.String()
}

func (j *job) exitCode() int {
	_ = j.cmd.Wait()
	return j.cmd.ProcessState.ExitCode()
}

// shell runs a command as the user does.
func (j *job) shell(port int, command string) {
	j.t.Helper()
	client, err := ssh.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), &ssh.ClientConfig{User: "root",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(j.signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 10 * time.Second})
	if err != nil {
		j.t.Fatalf("log in: %v\n%s", err, j.end())
	}
	defer client.Close()
	s, err := client.NewSession()
	if err != nil {
		j.t.Fatal(err)
	}
	defer s.Close()
	if out, err := s.CombinedOutput(command); err != nil {
		j.t.Fatalf("%s: %v: %s\n%s", command, err, out, j.end())
	}
}

// nothingLeft checks that no process and no mount of the job is left.
func (j *job) nothingLeft(jobID string) {
	j.t.Helper()
	for _, p := range processesOf(j.t, jobID) {
		j.t.Errorf("a process of the job is left: %s", p)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		j.t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(jobID)) {
		j.t.Errorf("a mount of the job is left:\n%s", mounts)
	}
	dirs, err := filepath.Glob("/var/tmp/imslocal-run-*/jobs/" + jobID)
	if err != nil || len(dirs) > 0 {
		j.t.Errorf("temporary data is left: %v, %v", dirs, err)
	}
}

func TestRunToSuccess(t *testing.T) {
	j := newBench(t).start()
	waiting := j.reach("waiting_on_user")
	j.shell(waiting.SSHPort, "echo hello > /mnt/image/image-root/etc/hello && touch /mnt/image/complete")
	if code := j.exitCode(); code != 0 {
		t.Fatalf("exit code %d\n%s", code, &j.out)
	}
	var statuses []string
	for _, e := range j.events() {
		statuses = append(statuses, e.Status)
		if e.Event != "status" || e.SSHPort != waiting.SSHPort || e.JobID != waiting.JobID {
			t.Errorf("event %+v", e)
		}
	}
	if got := strings.Join(statuses, " "); got != "creating fetching_image waiting_on_user packaging_artifacts success" {
		t.Errorf("statuses: %s", got)
	}
	text := j.out.String()
	for _, want := range []string{fmt.Sprintf("ssh -p %d root@127.0.0.1", waiting.SSHPort), "touch /mnt/image/complete",
		"ARTIFACT", "/rootfs", "/kernel", "/initrd", "PHASE", "packaging_artifacts", "total", j.path("new.squashfs")} {
		if !strings.Contains(text, want) {
			t.Errorf("the output lacks %q:\n%s", want, text)
		}
	}
	j.nothingLeft(waiting.JobID)

	f, err := os.Open(j.path("new.squashfs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	image, err := squash.Open(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"etc/hello": "hello\n", "boot/vmlinuz": "the kernel"} {
		if b, err := fs.ReadFile(image, name); err != nil || strings.TrimSpace(string(b)) != strings.TrimSpace(want) {
			t.Errorf("%s in the new image is %q, %v", name, b, err)
		}
	}
}

func TestRunGivenUp(t *testing.T) {
	b := newBench(t)
	data := b.path("data")
	j := b.start("--data", data)
	waiting := j.reach("waiting_on_user")
	j.shell(waiting.SSHPort, "touch /mnt/image/failed")
	if code := j.exitCode(); code != 1 || !strings.Contains(j.out.String(), "status error") {
		t.Errorf("exit code %d\n%s", code, &j.out)
	}
	if _, err := os.Stat(j.path("new.squashfs")); err == nil {
		t.Error("there is an output of a failed job")
	}
	// a kept data directory keeps the logs, and only those of the volume's kind
	for name, want := range map[string]bool{"logs/prepare.log": true, "logs/buildenv-sidecar.log": true, "logs/sshd.log": true, "containers.json": true, "volume": false, "volume.released": false} {
		if _, err := os.Stat(filepath.Join(data, "jobs", waiting.JobID, name)); (err == nil) != want {
			t.Errorf("%s in the job's directory: %v, want it there: %v", name, err, want)
		}
	}
	j.nothingLeft(waiting.JobID)
}

// TestRunInterrupted: whenever the signal comes, nothing is left.
func TestRunInterrupted(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		status string
		signal syscall.Signal
		code   int
	}{
		{"creating", syscall.SIGINT, 130},
		{"fetching_image", syscall.SIGTERM, 130},
		{"waiting_on_user", syscall.SIGINT, 130},
		{"packaging_artifacts", syscall.SIGTERM, 130},
		{"waiting_on_user", syscall.SIGKILL, -1},
	} {
		t.Run(fmt.Sprint(c.status, c.signal), func(t *testing.T) {
			b.t = t
			// the last one cannot clean up its data; the test's directory goes anyway
			data := t.TempDir()
			os.Remove(b.path("events"))
			j := b.start("--data", data)
			if c.status == "packaging_artifacts" {
				waiting := j.reach("waiting_on_user")
				// enough to pack that the signal comes before the end
				j.shell(waiting.SSHPort, "head -c 200M /dev/urandom > /mnt/image/image-root/ballast && touch /mnt/image/complete")
			}
			at := j.reach(c.status)
			if err := j.cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			if code := j.exitCode(); code != c.code {
				t.Errorf("exit code %d, want %d\n%s", code, c.code, &j.out)
			}
			deadline := time.Now().Add(20 * time.Second)
			for c.signal == syscall.SIGKILL && len(processesOf(t, at.JobID)) > 0 && time.Now().Before(deadline) {
				time.Sleep(10 * time.Millisecond) // the kernel takes the containers down behind it
			}
			j.nothingLeft(at.JobID)
		})
	}
}

func processesOf(t *testing.T, jobID string) []string {
	t.Helper()
	envs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, env := range envs {
		if b, err := os.ReadFile(env); err == nil && bytes.Contains(b, []byte(jobID)) {
			found = append(found, fmt.Sprintf("%s: %q", env, b))
		}
	}
	return found
}

func TestRunRefusesBadInputBeforeItStarts(t *testing.T) {
	b := newBench(t)
	if err := os.WriteFile(b.path("text"), []byte("no image"), 0o644); err != nil {
		t.Fatal(err)
	}
	image, key := b.path("base.squashfs"), b.path("id.pub")
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--image", image}, 2, "--key"},
		{[]string{"--image", image, "--key", b.path("none")}, 1, "no such file"},
		{[]string{"--image", image, "--key", b.path("text")}, 1, "not an SSH public key"},
		{[]string{"--image", b.path("none"), "--key", key}, 1, "no such file"},
		{[]string{"--image", b.path("text"), "--key", key}, 1, "not a SquashFS image"},
		{[]string{"--image", image, "--key", key, "--kernel-file-name", "bzImage"}, 1, "/boot holds: initrd, vmlinuz, vmlinuz-1"},
		{[]string{"--image", image, "--key", key, "--initrd-file-name", "../etc/os-release"}, 1, "not the name of a file"},
		{[]string{"--image", image, "--key", key, "--output", b.path("none/new")}, 1, "--output"},
		{[]string{"--image", image, "--key", key, "--jial"}, 2, "--jial"},
	} {
		cmd := exec.Command(filepath.Join(b.bin, "imslocal"), append([]string{"run", "--data", b.path("data")}, c.args...)...)
		out, _ := cmd.CombinedOutput()
		text := strings.TrimSuffix(string(out), "\n")
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(text, c.want) || strings.Contains(text, "\n") {
			t.Errorf("%v: exit code %d, want %d; said %q, want one line with %q", c.args, code, c.code, out, c.want)
		}
		if _, err := os.Stat(b.path("data")); err == nil {
			t.Errorf("%v: something was started", c.args)
		}
	}
}
