// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The writers write record after record, each to the one file and then to the other, so that a look at the two in that
// order tells whether they were still being written to. They ignore what can be ignored, and end by themselves after
// maxRecords, should the test lose.
const (
	recordLen   = 8
	recordPause = 200 * time.Microsecond
	maxRecords  = 500_000
)

// writer is one of
//
//	stubborn    ignores every signal
//	daemon      the same, two generations and sessions away from whoever started it
//	passed      a process that was handed the open files over a socket, by one that is gone
//	mapped      writes to memory that is mapped from the files
//	stopped     stops itself after a while; what continues it lets it write on
func writer(kind, first, second string) error {
	signal.Ignore()
	var files [2]*os.File
	if kind == "received" {
		if err := receive(&files); err != nil {
			return err
		}
	} else {
		for i, name := range []string{first, second} {
			f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
			if err != nil {
				return err
			}
			files[i] = f
		}
	}
	write := func(n uint64) {
		for _, f := range files {
			f.Write(binary.LittleEndian.AppendUint64(nil, n))
		}
	}
	switch kind {
	case "daemon":
		return again("daemon's child", first, second, -1)
	case "daemon's child":
		return again("stubborn", first, second, -1)
	case "passed":
		return pass(files, first, second)
	case "mapped":
		var pages [2][]byte
		for i, f := range files {
			if err := f.Truncate(recordLen); err != nil {
				return err
			}
			page, err := unix.Mmap(int(f.Fd()), 0, recordLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return err
			}
			pages[i] = page
		}
		write = func(n uint64) {
			for _, page := range pages {
				binary.LittleEndian.PutUint64(page, n)
			}
		}
	}
	for n := range uint64(maxRecords) {
		if kind == "stopped" && n == 100 {
			unix.Kill(os.Getpid(), unix.SIGSTOP)
		}
		write(n)
		time.Sleep(recordPause)
	}
	return nil
}

// again starts this program as another kind of writer, in a session of its own. fd, if any, is its descriptor 3.
func again(kind, first, second string, fd int) error {
	files := []uintptr{0, 1, 2}
	if fd >= 0 {
		files = append(files, uintptr(fd))
	}
	_, err := syscall.ForkExec(os.Args[0], []string{os.Args[0], "write", kind, first, second},
		&syscall.ProcAttr{Files: files, Sys: &syscall.SysProcAttr{Setsid: true}})
	return err
}

func pass(files [2]*os.File, first, second string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(int(files[0].Fd()), int(files[1].Fd())), nil, 0); err != nil {
		return err
	}
	return again("received", first, second, pair[1])
}

func receive(files *[2]*os.File) error {
	oob := make([]byte, unix.CmsgSpace(2*4))
	_, n, _, _, err := unix.Recvmsg(3, make([]byte, 1), oob, 0)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages: %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 2 {
		return fmt.Errorf("%d descriptors: %v", len(fds), err)
	}
	for i, fd := range fds {
		files[i] = os.NewFile(uintptr(fd), "received")
	}
	return nil
}
