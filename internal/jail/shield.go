// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// The sessions of the chroot level share a process table with the gateway and with init. The kernel lets a process signal
// another one if it has CAP_KILL, or if its real or effective user is the other's real or saved user (kill(2)). So the
// two give up root as their real and saved user for one that nobody else is, and keep it as the effective one, with all
// capabilities; the sessions lose CAP_KILL, and the filter of system calls keeps them from becoming that user.

// Shield keeps the sessions of the chroot level from signalling the calling process, which should be the gateway's alone:
// what it executes without naming a user begins with a real user that is not root.
func Shield() error {
	id, err := shieldUser()
	if err != nil {
		return fmt.Errorf("shield from signals: %w", err)
	}
	if err := syscall.Setresuid(id, 0, id); err != nil {
		return fmt.Errorf("shield from signals: become user %d: %w", id, err)
	}
	return nil
}

// shielded reports whether Shield was called.
func shielded() bool { return unix.Getuid() != 0 }

// shieldUser is the highest user id there is in this user namespace. Accounts begin at the other end, and -1 is none.
func shieldUser() (int, error) {
	ids, err := idMap("/proc/self/uid_map")
	if err != nil {
		return 0, err
	}
	highest := 0
	for _, m := range ids {
		highest = max(highest, m.ContainerID+m.Size-1)
	}
	if highest == 0 {
		return 0, errors.New("this container has no user but root")
	}
	return highest, nil
}

// AsRoot is how a shielded process executes a program that is not to be shielded.
func AsRoot() *syscall.Credential { return &syscall.Credential{NoSetGroups: true} }

// trySignal signals what must not be, first as root and then as the user of the shield.
func trySignal(a *probeArgs) (bool, string) {
	if a.Level == Namespaces {
		return false, "out of sight"
	}
	detail := ""
	try := func() (escaped bool) {
		for _, pid := range a.Shielded {
			// An orphan's group, a thread and a pidfd take the same permission.
			if escaped, detail = refused(unix.Kill(pid, 0)); escaped {
				detail = fmt.Sprintf("process %d: %s", pid, detail)
				return true
			}
		}
		return false
	}
	if try() {
		return true, detail
	}
	id := uintptr(a.ShieldUser)
	for _, c := range []struct {
		name string
		call func() unix.Errno
	}{
		{"setuid", func() unix.Errno { return rawCall(unix.SYS_SETUID, id, 0, 0) }},
		{"setreuid", func() unix.Errno { return rawCall(unix.SYS_SETREUID, 0, id, 0) }},
		{"setresuid", func() unix.Errno { return rawCall(unix.SYS_SETRESUID, 0, id, 0) }},
	} {
		if escaped, detail := refused(failure(c.call())); escaped {
			return true, c.name + ": " + detail
		}
	}
	return try(), detail
}

func rawCall(nr, a, b, c uintptr) unix.Errno {
	_, _, errno := unix.RawSyscall(nr, a, b, c)
	return errno
}
