// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

func pids() []int {
	var pids []int
	m, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range m {
		n, _ := strconv.Atoi(filepath.Base(p))
		pids = append(pids, n)
	}
	return pids
}

// outsiders are processes that are not the attacker's own.
func outsiders() []int {
	found := []int{1}
	for _, pid := range []int{gateway, os.Getppid()} {
		// In a PID namespace the gateway's number means nothing; whose root may not be looked up is not ours.
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root", pid)); !ours(pid) && (len(pids()) == 0 || errors.Is(err, os.ErrPermission)) {
			found = append(found, pid)
		}
	}
	return found
}

// sameRoot reports whether a process has our root. On a machine without containers there may be other jails, whose
// sessions are no better than we are.
func sameRoot(pid int) bool {
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return false
	}
	root, err := os.Stat("/")
	return err == nil && os.SameFile(root, theirs)
}

// ours reports whether a process is of the attacker's own session.
func ours(pid int) bool {
	self, err := unix.Getsid(0)
	other, errOther := unix.Getsid(pid)
	return err == nil && errOther == nil && self == other
}

func ptrace() error {
	for _, pid := range outsiders() {
		for _, req := range []uintptr{unix.PTRACE_SEIZE, unix.PTRACE_ATTACH} {
			if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, req, uintptr(pid), 0, 0, 0, 0); errno == 0 {
				fmt.Println("traced", pid)
				return nil
			}
		}
	}
	return errFailed
}

func memory() error {
	for _, pid := range outsiders() {
		for _, write := range []bool{false, true} {
			buf := make([]byte, 1)
			l := []unix.Iovec{{Base: &buf[0]}}
			l[0].SetLen(1)
			r := []unix.RemoteIovec{{Base: 0x400000, Len: 1}}
			var err error
			if write {
				_, err = unix.ProcessVMWritev(pid, l, r, 0)
			} else {
				_, err = unix.ProcessVMReadv(pid, l, r, 0)
			}
			if err == nil || errors.Is(err, unix.EFAULT) {
				fmt.Println("memory of", pid)
				return nil
			}
		}
	}
	return errFailed
}

func pidfd() error {
	for _, pid := range outsiders() {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		for n := range 32 {
			if _, err := unix.PidfdGetfd(fd, n, 0); err == nil {
				fmt.Println("took descriptor", n, "of", pid)
				return nil
			}
		}
		if unix.Setns(fd, unix.CLONE_NEWNS) == nil {
			fmt.Println("entered the namespaces of", pid)
			return nil
		}
	}
	return errFailed
}

// signalOutside only looks whether the gateway could be signalled. Where it cannot be seen, init is there instead, and has
// to survive whatever its children send.
func signalOutside() error {
	visible := pids()
	if len(visible) == 0 {
		return signalAs(0, outsiders())
	}
	for _, pid := range visible {
		if pid != 1 && !ours(pid) && unix.Kill(pid, 0) == nil {
			fmt.Println("may signal", pid)
			return nil
		}
	}
	// Again and again: a signal that meets init's main thread in a handler, where all are blocked, is not dropped as one that
	// init does not want.
	for range 500 {
		for sig := syscall.Signal(1); sig < 65; sig++ {
			if sig != unix.SIGSTOP {
				unix.Kill(1, sig)
			}
		}
	}
	return errFailed
}

// signalAs tries it as root, by thread and by pidfd, too, and as the users at the ends of the ranges of ids, one of which
// the others may be by their real user.
func signalAs(user int, targets []int) error {
	for _, pid := range targets {
		if unix.Kill(pid, 0) == nil {
			fmt.Println("user", user, "may signal", pid)
			return nil
		}
		for tid := range 4096 {
			if unix.Tgkill(pid, tid, 0) == nil {
				fmt.Println("user", user, "may signal thread", tid, "of", pid)
				return nil
			}
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			if unix.PidfdSendSignal(fd, 0, nil, 0) == nil {
				fmt.Println("user", user, "may signal", pid, "by pidfd")
				return nil
			}
			unix.Close(fd)
		}
	}
	if user != 0 {
		return errFailed
	}
	runtime.LockOSThread() // for the rest of this attack: the thread's user changes
	for _, id := range []int{1<<32 - 2, 1<<31 - 1, 1 << 16, 1<<16 - 1, 1<<16 - 2} {
		for _, call := range [][4]int{{unix.SYS_SETREUID, id, 0}, {unix.SYS_SETRESUID, id, 0, 0}, {unix.SYS_SETRESUID, 0, id, 0}} {
			_, _, errno := unix.RawSyscall(uintptr(call[0]), uintptr(call[1]), uintptr(call[2]), uintptr(call[3]))
			if errno == 0 && signalAs(id, targets) == nil {
				return nil
			}
		}
	}
	return errFailed
}

// limits sets limits to what they are. The first process of a machine that is no pod does not care, and is not tried.
func limits() error {
	targets := outsiders()
	if len(targets) > 1 {
		targets = targets[1:]
	}
	for _, pid := range targets {
		var was unix.Rlimit
		if unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was) == nil && unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil) == nil {
			fmt.Println("may change the limits of", pid)
			return nil
		}
	}
	return errFailed
}

func setns() error {
	for _, pid := range append(pids(), 1) {
		for name, flag := range map[string]int{"mnt": unix.CLONE_NEWNS, "pid": unix.CLONE_NEWPID, "net": unix.CLONE_NEWNET, "user": unix.CLONE_NEWUSER, "uts": unix.CLONE_NEWUTS} {
			fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name), unix.O_RDONLY, 0)
			if err != nil {
				continue
			}
			if unix.Setns(fd, flag) == nil {
				fmt.Println("entered", name, "of", pid)
				return nil
			}
		}
	}
	return errFailed
}

func unshare() error {
	for _, flag := range []int{unix.CLONE_NEWNS, unix.CLONE_NEWPID, unix.CLONE_NEWUTS, unix.CLONE_NEWIPC, unix.CLONE_NEWCGROUP, unix.CLONE_NEWNET} {
		if err := unix.Unshare(flag); err == nil {
			fmt.Printf("unshared %#x\n", flag)
			return nil
		}
	}
	return errFailed
}

// usernsChild is the argument of the process in the new namespace.
const usernsChild = "userns-child"

// userns gets every capability over a new user namespace, and goes on from there.
func userns() error {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	pid, err := syscall.ForkExec(self, []string{self, usernsChild}, &syscall.ProcAttr{
		Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
			UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}},
		},
	})
	if err != nil {
		return err
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
		return err
	}
	if ws.ExitStatus() != 0 {
		return errFailed
	}
	fmt.Println("made a user namespace")
	return nil
}

func capabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	all := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0)}, {Effective: 0x1ff, Permitted: 0x1ff}}
	if unix.Capset(&hdr, &all[0]) == nil {
		fmt.Println("regained all capabilities")
		return nil
	}
	for _, c := range []int{unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_SYS_MODULE, unix.CAP_SYS_RAWIO, unix.CAP_DAC_READ_SEARCH, unix.CAP_NET_RAW, unix.CAP_NET_ADMIN} {
		if v, _ := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); v == 1 {
			fmt.Println("holds capability", c)
			return nil
		}
	}
	return errFailed
}

// keyring reads the keys of the node's root, which no namespace separates. Without one the filter is impossible.
func keyring() error {
	id, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, false)
	if err == nil {
		fmt.Println("user keyring", id)
	}
	return err
}

// x32 goes around a filter of system calls by the other table: keyctl there has the same number.
func x32() error {
	if runtime.GOARCH != "amd64" {
		return errors.New("no such table")
	}
	_, _, errno := unix.Syscall(unix.SYS_KEYCTL|0x40000000, 0, ^uintptr(3), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func rawSocket() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0x0300)
	if err == nil {
		unix.Close(fd)
		fmt.Println("sniffs the network")
	}
	return err
}
