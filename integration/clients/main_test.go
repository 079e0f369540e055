// SPDX-License-Identifier: Apache-2.0

// Package clients holds the built sshd against the clients people use: OpenSSH,
// dropbear, PuTTY, paramiko, asyncssh, libssh2, Go, Ansible, rsync, sshfs,
// lftp and git, each at every level of confinement, and against load, floods
// and clients that go away in the middle.
//
// It builds nothing and looks into nothing: the program is the one in
// IMS_BUILDENV_BIN, or bin/, and what counts is what arrives. The tests run in
// network and mount namespaces of their own, so ports are free and no mount
// outlives them. IMS_BUILDENV_SOAK=1 runs the soak at full length.
package clients

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func TestMain(m *testing.M) {
	const inside = "IMS_BUILDENV_CLIENTS_TEST_NETNS"
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(inside) != "1" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		// Debian's own programs: the test knows what they are and copies some of them.
		cmd.Env = append(os.Environ(), inside+"=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(cmd.ProcessState.ExitCode())
	}
	testkit.HideProfile()
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "ip link set lo up: %v: %s\n", err, out)
		os.Exit(1)
	}
	code := m.Run()
	if err := shared.end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// program is the sshd under test.
func program(t testing.TB) string {
	t.Helper()
	testkit.NeedRoot(t)
	dir := os.Getenv("IMS_BUILDENV_BIN")
	if dir == "" {
		dir = "../../bin"
	}
	path, err := filepath.Abs(filepath.Join(dir, "sshd"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		reason := fmt.Sprintf("no sshd in %s: run make build, or set IMS_BUILDENV_BIN", dir)
		if testkit.InCI() {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	return path
}

// patience bounds every wait; a machine busy with other tests is slow.
const patience = 60 * time.Second

// eventually polls until done says so. It fails the test with what is missing.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
