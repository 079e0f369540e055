// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// shell is a container that runs a script with /bin/sh.
func shell(t *testing.T, script string, change func(*containerSetup)) containerSetup {
	t.Helper()
	testkit.NeedRoot(t)
	s := containerSetup{Hostname: "pod", Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}, Scratch: t.TempDir()}
	if change != nil {
		change(&s)
	}
	return s
}

// output runs a container to its end.
func output(t *testing.T, s containerSetup) (string, exit) {
	t.Helper()
	var log bytes.Buffer
	c, err := startContainer("test", s, &log, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	<-c.done
	<-c.drained
	return log.String(), c.exit()
}

// noMounts checks that none of the test's mounts shows in this namespace.
func noMounts(t *testing.T, paths ...string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		for _, path := range append(paths, "/mnt/image", "/etc/cray") {
			if strings.Contains(line, path) {
				t.Errorf("mounted on the host: %s", line)
			}
		}
	}
}

func TestContainerHasExactlyItsEnvironment(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "must not be inherited")
	s := shell(t, "", func(s *containerSetup) {
		s.Args = []string{"/usr/bin/env"}
		s.Env = []string{"IMS_JOB_ID=1", "IMAGE_ROOT_ARCHIVE_NAME=a b=c"}
	})
	got, how := output(t, s)
	if got != "IMS_JOB_ID=1\nIMAGE_ROOT_ARCHIVE_NAME=a b=c\n" || how.Code != 0 {
		t.Errorf("env printed %q, %v", got, how)
	}
}

func TestContainerSeesItsMountsAndNotTheHost(t *testing.T) {
	dir, hidden := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{dir + "/rw/f": "volume", dir + "/ro/f": "config", dir + "/file": "one file", hidden + "/secret": "secret"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	marker := "/etc/ims-buildenv-container-test"
	got, how := output(t, shell(t, `
		echo pid $$; hostname
		cat /mnt/image/f /etc/cray/f /mnt/one
		echo new > /mnt/image/new
		echo x 2>/dev/null > /etc/cray/new || echo read-only
		echo x > `+marker+` && echo scratch root
		ls /tmp; ls /run; ls -a /root | wc -l
		cat `+hidden+`/secret 2>/dev/null || echo hidden
		readlink /proc/self/fd/0
		/usr/bin/env ls /proc/self/fd | tr '\n' ' '
		for d in null zero full random urandom tty ptmx; do test -e /dev/$d || echo no $d; done
		grep -c ' `+dir+`' /proc/self/mounts`, func(s *containerSetup) {
		s.Mounts = []mount{{dir + "/rw", "/mnt/image", false}, {dir + "/ro", "/etc/cray", true}, {dir + "/file", "/mnt/one", false}}
		s.Hide = []string{hidden}
	}))
	want := "pid 1\npod\nvolume\nconfig\none file\nread-only\nscratch root\n2\nhidden\n"
	if !strings.HasPrefix(got, want) {
		t.Errorf("container printed (%v)\n%s\nwant it to begin\n%s", how, got, want)
	}
	rest := strings.Split(strings.TrimPrefix(got, want), "\n")
	if want := []string{"/dev/null", "0 1 2 3 0", ""}; !slices.Equal(rest, want) { // ls itself has the 3 open
		t.Errorf("standard input, descriptors, host mounts: %q, want %q", rest, want)
	}
	if b, err := os.ReadFile(dir + "/rw/new"); err != nil || string(b) != "new\n" {
		t.Errorf("what was written to the volume: %q, %v", b, err)
	}
	if _, err := os.Stat(marker); err == nil {
		os.Remove(marker)
		t.Errorf("the container wrote %s on the host", marker)
	}
	noMounts(t, dir, hidden)
}

func TestContainerCapabilities(t *testing.T) {
	var want uint64
	for _, c := range defaultCapabilities {
		want |= 1 << c
	}
	script := `sed -n 's/^Cap\(Prm\|Eff\|Bnd\|Inh\|Amb\):\t//p' /proc/self/status; mount -t tmpfs x /mnt 2>/dev/null && echo mounts`
	got, _ := output(t, shell(t, script, nil))
	mask := fmt.Sprintf("%016x\n", want)
	none := fmt.Sprintf("%016x\n", 0)
	if got != none+mask+mask+mask+none {
		t.Errorf("capabilities of an ordinary container: %s, want the default %s", got, mask)
	}
	got, _ = output(t, shell(t, script, func(s *containerSetup) { s.Privileged = true }))
	if !strings.HasSuffix(got, "mounts\n") {
		t.Errorf("a privileged container cannot mount: %s", got)
	}
}

func TestContainerExitCodes(t *testing.T) {
	for script, want := range map[string]exit{"exit 3": {Code: 3}, "kill -KILL $$; exit 4": {Code: 4}} {
		if _, how := output(t, shell(t, script, nil)); how != want {
			t.Errorf("%q ended with %v, want %v", script, how, want)
		}
	}
	s := shell(t, "", nil)
	s.Args = []string{"/no/such/program"}
	if text, how := output(t, s); how.Code != exitNotFound || !strings.Contains(text, "/no/such/program") {
		t.Errorf("missing program: %v %q", how, text)
	}
	s = shell(t, "", func(s *containerSetup) { s.Mounts = []mount{{"/no/such/source", "/mnt", false}} })
	if text, how := output(t, s); how.Code != exitSetup || !strings.Contains(text, "/no/such/source") {
		t.Errorf("missing mount: %v %q", how, text)
	}
}

func TestStopContainers(t *testing.T) {
	line := make(chan string, 4)
	startOne := func(script string) *container {
		c, err := startContainer("test", shell(t, script, nil), io.Discard, func(l string) { line <- l })
		if err != nil {
			t.Fatal(err)
		}
		<-line
		return c
	}
	polite := startOne(`trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done`)
	stopContainers(time.Minute, polite)
	if how := polite.exit(); how.Code != 7 {
		t.Errorf("asked to end: %v", how)
	}
	deaf := startOne(`trap '' TERM; echo up; while :; do sleep 0.1; done`)
	deaf2 := startOne(`trap '' TERM; echo up; while :; do sleep 0.1; done`)
	stopContainers(10*time.Millisecond, deaf, deaf2)
	if how := deaf.exit(); how.Signal != syscall.SIGKILL.String() {
		t.Errorf("deaf container: %v", how)
	}
}

func TestKilledParentLeavesNothing(t *testing.T) {
	testkit.NeedRoot(t)
	scratch := t.TempDir()
	cmd := exec.Command("/proc/self/exe", modeTestParent, scratch)
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	defer kill()
	// the container's pipe is the helper's output: its end is the end of every
	// process that holds it
	buf := make([]byte, 3)
	if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "up\n" {
		t.Fatalf("helper said %q, %v", buf, err)
	}
	noMounts(t, scratch)
	pids := descendants(t, cmd.Process.Pid)
	if len(pids) < 3 {
		t.Fatalf("the container has only the processes %v", pids)
	}
	kill()
	for _, pid := range pids {
		waitGone(t, pid)
	}
	noMounts(t, scratch)
}

// descendants lists the processes below pid.
func descendants(t *testing.T, pid int) []int {
	t.Helper()
	var list []int
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that ended
		}
		for _, f := range strings.Fields(string(b)) {
			var child int
			if _, err := fmt.Sscan(f, &child); err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(list, child) {
				list = append(append(list, child), descendants(t, child)...)
			}
		}
	}
	return list
}

// waitGone waits until the kernel has no process of that id.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for syscall.Kill(pid, 0) == nil {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && strings.Contains(string(b), ") Z ") {
			return // dead; whoever inherited it has not looked yet
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there", pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
