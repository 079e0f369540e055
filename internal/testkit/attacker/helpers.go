// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// forkChain runs away from whoever wants to end it: every link is a new process in a new session, writes a byte to each of
// the files, and leaves as soon as it has an heir. Only raw system calls are left after the first fork: there is no Go
// runtime any more. It ends by itself after so many links, should the test lose: nobody may be left with it.
func forkChain(links string, files []string) error {
	n, err := strconv.Atoi(links)
	if err != nil {
		return err
	}
	fds := make([]int, len(files))
	for i, file := range files {
		if fds[i], err = unix.Open(file, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND, 0o644); err != nil {
			return err
		}
	}
	one := [1]byte{'x'}
	for range n {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno == 0 && pid > 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
		for _, fd := range fds {
			unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one[0])), 1)
		}
	}
	unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	return nil
}

// swap exchanges two names until the time is over.
func swap(a, b, seconds string) error {
	n, err := strconv.Atoi(seconds)
	if err != nil {
		return err
	}
	for end := time.Now().Add(time.Duration(n) * time.Second); time.Now().Before(end); {
		for range 100 {
			if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
				return err
			}
		}
	}
	return nil
}
