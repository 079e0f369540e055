// SPDX-License-Identifier: Apache-2.0

// Package demo runs the README's first command as a new user would: the whole
// job on a real Debian image, in both modes, and interrupted at several points.
package demo

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// patience bounds one run of the demo; without a cached base image it includes debootstrap.
const patience = 15 * time.Minute

func need(t *testing.T) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "ssh", "sftp", "ssh-keygen", "debootstrap", "unshare")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// run is one run of the demo in a process group of its own, as a terminal starts it.
type run struct {
	cmd   *exec.Cmd
	out   bytes.Buffer
	lines chan string
}

func start(t *testing.T, root, jail string) *run {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	r := &run{cmd: exec.CommandContext(ctx, "scripts/demo.sh"), lines: make(chan string, 4096)}
	r.cmd.Dir = root
	r.cmd.Env = append(os.Environ(), "JAIL="+jail, "IMAGE=")
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r.cmd.Cancel = func() error { return syscall.Kill(-r.cmd.Process.Pid, syscall.SIGTERM) }
	r.cmd.WaitDelay = 30 * time.Second
	pr, pw := io.Pipe()
	r.cmd.Stdout = pw
	r.cmd.Stderr = pw
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.lines)
		for s := bufio.NewScanner(pr); s.Scan(); {
			r.out.WriteString(s.Text() + "\n")
			r.lines <- s.Text()
		}
	}()
	t.Cleanup(func() { pw.Close() })
	go func() { r.cmd.Wait(); pw.Close() }()
	return r
}

// until reads the output up to a line that contains text; false when it ended without.
func (r *run) until(text string) bool {
	for line := range r.lines {
		if strings.Contains(line, text) {
			return true
		}
	}
	return false
}

// leftovers lists processes of our binaries, mounts and work directories that are there now.
func leftovers(t *testing.T, root string) []string {
	t.Helper()
	var found []string
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, exe := range exes {
		if target, err := os.Readlink(exe); err == nil && strings.HasPrefix(target, filepath.Join(root, "bin")+"/") {
			found = append(found, "process "+target)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		point := strings.Fields(line)[4]
		if strings.HasPrefix(point, filepath.Join(root, "build")) || strings.Contains(point, "/imslocal") {
			found = append(found, "mount "+point)
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, loop := range loops {
		if file, err := os.ReadFile(loop); err == nil && strings.HasPrefix(string(file), filepath.Join(root, "build")) {
			found = append(found, "loop device on "+strings.TrimSpace(string(file)))
		}
	}
	dirs, err := filepath.Glob(filepath.Join(root, "build/demo.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		found = append(found, "directory "+dir)
	}
	temporary, err := filepath.Glob(filepath.Join(os.TempDir(), "imslocal*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(found, temporary...)
}

func checkNothingNew(t *testing.T, before, after []string) {
	t.Helper()
	for _, thing := range after {
		if !slices.Contains(before, thing) {
			t.Errorf("left behind: %s", thing)
		}
	}
}

func TestDemoRunsTheWholeJob(t *testing.T) {
	root := need(t)
	for _, jail := range []string{"true", "false"} {
		t.Run("jail="+jail, func(t *testing.T) {
			before := leftovers(t, root)
			r := start(t, root, jail)
			for range r.lines {
			}
			if r.cmd.ProcessState == nil || r.cmd.ProcessState.ExitCode() != 0 {
				t.Fatalf("demo: %v\n%s", r.cmd.ProcessState, r.out.String())
			}
			for _, want := range []string{
				"3,000,000 bytes went there and back unchanged",
				"rootfs", "kernel", "initrd", "manifest.json",
				"added    opt/payload", "added    etc/demo/customized-at",
			} {
				if !strings.Contains(r.out.String(), want) {
					t.Errorf("output does not show %q", want)
				}
			}
			if strings.Contains(r.out.String(), "added    tmp/complete") {
				t.Error("the flag was packed")
			}
			if t.Failed() {
				t.Log(r.out.String())
			}
			checkNothingNew(t, before, leftovers(t, root))
		})
	}
}

func TestInterruptLeavesNothing(t *testing.T) {
	root := need(t)
	for _, at := range []string{"Starting the IMS API", "fetching_image", "A shell on a PTY", "packaging_artifacts"} {
		t.Run(strings.ReplaceAll(at, " ", "_"), func(t *testing.T) {
			before := leftovers(t, root)
			r := start(t, root, "true")
			if !r.until(at) {
				t.Fatalf("the demo ended before %q:\n%s", at, r.out.String())
			}
			if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			for range r.lines {
			}
			if code := r.cmd.ProcessState.ExitCode(); code == 0 {
				t.Errorf("an interrupted demo exits 0:\n%s", r.out.String())
			}
			checkNothingNew(t, before, leftovers(t, root))
		})
	}
}
