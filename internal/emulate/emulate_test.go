// SPDX-License-Identifier: Apache-2.0

package emulate

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/jail"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	jail.ChildMain()
	os.Exit(m.Run())
}

// node is a mount of binfmt_misc, and whether the machine has had no handler; what the test registers then is gone at
// its end.
func node(t *testing.T) (fs *os.File, bare bool) {
	t.Helper()
	testkit.NeedRoot(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("for x86-64 nodes")
	}
	fs, err := mount()
	if errors.Is(err, unix.ENODEV) {
		t.Skip("this kernel has no binfmt_misc")
	}
	if err != nil {
		t.Fatal(err)
	}
	if probe() == nil {
		t.Cleanup(func() { fs.Close() })
		return fs, false
	}
	t.Cleanup(func() {
		if fd, err := unix.Openat(int(fs.Fd()), name, unix.O_WRONLY, 0); err == nil {
			unix.Write(fd, []byte("-1"))
			unix.Close(fd)
		}
		fs.Close()
		if probe() == nil {
			t.Error("the registration is still there")
		}
	})
	return fs, true
}

// bareNode is for tests of what happens without a handler.
func bareNode(t *testing.T) *os.File {
	t.Helper()
	fs, bare := node(t)
	if !bare {
		t.Skip("this machine runs aarch64 programs already, and its handler is not ours to remove")
	}
	return fs
}

// TestRefused promises one error that says what to do, before anybody waits for a login that cannot work.
func TestRefused(t *testing.T) {
	bareNode(t)
	if _, err := ARM64("/no/such/qemu", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "qemu-user-static") {
		t.Errorf("without QEMU: %v", err)
	}
}

// TestJail promises that the programs of an aarch64 image run in a jail, without QEMU in the image, and that a handler is
// registered once.
func TestJail(t *testing.T) {
	fs, bare := node(t)
	testkit.NeedTool(t, "go", "qemu-aarch64-static")
	work := t.TempDir()
	tree.Make(t, work, "dir root 0755", "dir root/bin 0755", "dir root/etc 0755", "file root/etc/passwd 0644 root:x:0:0:root:/:/bin/sh\n",
		"file sh.go 0644 package main; import \"syscall\"; func main() { syscall.Write(1, []byte(\"run by \" + machine)) }",
		"file arm64.go 0644 package main; const machine = \"aarch64\"")
	root := filepath.Join(work, "root")
	build := exec.Command("go", "build", "-o", filepath.Join(root, "bin/sh"), "sh.go", "arm64.go")
	build.Dir = work
	build.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// Unlike sshd, this test may be linked dynamically, and it is what the jail starts inside to try to break out.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	libs, _ := exec.Command("ldd", self).Output()
	for _, word := range strings.Fields(string(libs)) {
		if strings.HasPrefix(word, "/") {
			if out, err := exec.Command("cp", "-L", "--parents", word, root).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	}
	for range 2 {
		hold, err := ARM64(Interpreter, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer hold.Close()
	}
	if bare {
		if err := register(fs, Interpreter); !errors.Is(err, unix.EEXIST) {
			t.Errorf("registered again: %v", err)
		}
	}
	j, err := jail.Start(t.Context(), jail.Config{Root: root, Level: jail.Namespaces, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Stop(t.Context(), 0)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := j.Spawn(jail.Request{Kind: jail.Exec, Command: "hello", Stdout: w, Stderr: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	io.Copy(&out, r)
	if exit := p.Wait(); exit != (jail.Exit{}) || out.String() != "run by aarch64" {
		t.Errorf("%+v, %q", exit, out.String())
	}
}

// TestWithoutRights promises a container that may not mount the same, and that a handler is enough for it.
func TestWithoutRights(t *testing.T) {
	const handler = "IMS_BUILDENV_TEST_HANDLER"
	if want := os.Getenv(handler); want != "" {
		hold, err := ARM64(Interpreter, slog.New(slog.DiscardHandler))
		if hold != nil || want == "no" && (err == nil || !strings.Contains(err.Error(), "require_dkms")) || want == "yes" && err != nil {
			t.Errorf("handler %s: %v, %v", want, hold, err)
		}
		return
	}
	fs := bareNode(t)
	testkit.NeedTool(t, "setpriv", "qemu-aarch64-static")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"no", "yes"} {
		cmd := exec.Command("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", self, "-test.run=^TestWithoutRights$", "-test.v")
		cmd.Env = append(os.Environ(), handler+"="+want)
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Errorf("%v\n%s", err, out)
		}
		if err := register(fs, Interpreter); err != nil && want == "no" {
			t.Fatal(err)
		}
	}
}
