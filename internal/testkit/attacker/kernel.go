// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

func mount() error {
	for _, m := range [][3]string{
		{"tmpfs", "/tmp", "tmpfs"}, {"proc", "/tmp", "proc"}, {"devtmpfs", "/tmp", "devtmpfs"}, {"sysfs", "/tmp", "sysfs"},
		{"cgroup2", "/tmp", "cgroup2"}, {"cgroup", "/tmp", "cgroup"}, {"overlay", "/tmp", "overlay"}, {"/etc", "/tmp", ""}, {"debugfs", "/tmp", "debugfs"},
	} {
		flags := uintptr(0)
		if m[2] == "" {
			flags = unix.MS_BIND
		}
		if unix.Mount(m[0], m[1], m[2], flags, "") == nil {
			unix.Unmount(m[1], unix.MNT_DETACH)
			fmt.Println("mounted", m[0])
			return nil
		}
	}
	for _, dir := range []string{"/", "/dev", "/proc"} {
		if unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND, "") == nil {
			fmt.Println("remounted", dir)
			return nil
		}
	}
	for _, dir := range []string{"/proc/sys", "/proc", "/dev/null", "/dev", "/sys"} {
		if unix.Unmount(dir, unix.MNT_DETACH) == nil {
			fmt.Println("unmounted", dir)
			return nil
		}
	}
	return errFailed
}

func mountAPI() error {
	if fd, err := unix.Fsopen("tmpfs", 0); err == nil {
		unix.Close(fd)
		fmt.Println("fsopen")
		return nil
	}
	if fd, err := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE); err == nil {
		unix.Close(fd)
		fmt.Println("open_tree")
		return nil
	}
	return unix.MountSetattr(unix.AT_FDCWD, "/", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NODEV})
}

func pivot() error {
	if err := unix.PivotRoot("/tmp", "/tmp"); errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		return err
	}
	fmt.Println("pivot_root is permitted")
	return nil
}

func module() error {
	permitted := func(err error) bool {
		return err == nil || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EACCES)
	}
	if permitted(unix.InitModule([]byte("x"), "")) || permitted(unix.FinitModule(0, "", 0)) || permitted(unix.DeleteModule("x", 0)) {
		fmt.Println("modules may be loaded")
		return nil
	}
	return errFailed
}

func kernelFiles() error {
	for _, name := range []string{
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug", "/proc/sysrq-trigger",
		"/proc/sys/fs/binfmt_misc/register", "/sys/kernel/uevent_helper", "/sys/module/kernel/parameters/panic", "/dev/mem",
		"/dev/kmsg", "/dev/port", "/proc/kcore", "/proc/sys/net/ipv4/ip_forward",
	} {
		if fd, err := unix.Open(name, unix.O_WRONLY, 0); err == nil {
			if name == "/proc/kcore" { // a masked file takes everything
				continue
			}
			unix.Close(fd)
			fmt.Println("opened", name)
			return nil
		}
	}
	return errFailed
}

// kernelCalls have arguments that the kernel refuses after it has looked at the permission.
func kernelCalls() error {
	permitted := func(name string, errno unix.Errno) bool {
		if errno == unix.EPERM || errno == unix.ENOSYS || errno == unix.EACCES {
			return false
		}
		fmt.Println(name, "is permitted:", errno)
		return true
	}
	_, _, e := unix.Syscall(unix.SYS_REBOOT, 0, 0, 0)
	if permitted("reboot", e) {
		return nil
	}
	_, _, e = unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 0, 0, ^uintptr(0), 0, 0)
	if permitted("kexec_load", e) {
		return nil
	}
	name := []byte("x\x00")
	_, _, e = unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(&name[0])), 0, 0)
	if permitted("swapon", e) {
		return nil
	}
	_, _, e = unix.Syscall(unix.SYS_SETHOSTNAME, uintptr(unsafe.Pointer(&name[0])), ^uintptr(0), 0)
	if permitted("sethostname", e) {
		return nil
	}
	tick := unix.Timex{Modes: 0x4000} // ADJ_TICK to 0, which is out of range
	_, _, e = unix.Syscall(unix.SYS_ADJTIMEX, uintptr(unsafe.Pointer(&tick)), 0, 0)
	if permitted("adjtimex", e) {
		return nil
	}
	return errFailed
}
