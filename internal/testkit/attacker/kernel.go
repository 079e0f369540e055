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

// module says how each call is refused: the kernel's own answer is another one where it has no modules.
func module() error {
	x := uintptr(unsafe.Pointer(&[]byte("x\x00")[0]))
	result := errFailed
	for _, call := range []struct {
		name     string
		nr       uintptr
		a1, a2   uintptr
		a3       uintptr
		byModule bool
	}{
		{"init_module", unix.SYS_INIT_MODULE, x, 1, x, true},
		{"finit_module", unix.SYS_FINIT_MODULE, 0, x, 0, true},
		{"delete_module", unix.SYS_DELETE_MODULE, x, 0, 0, true},
		{"kexec_load", unix.SYS_KEXEC_LOAD, 0, ^uintptr(0), 0, false},
		{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD, ^uintptr(0), ^uintptr(0), 0, false},
	} {
		_, _, e := unix.Syscall6(call.nr, call.a1, call.a2, call.a3, ^uintptr(0), ^uintptr(0), 0)
		fmt.Printf("%s=%s ", call.name, unix.ErrnoName(e))
		if call.byModule && e != unix.EPERM && e != unix.ENOSYS && e != unix.EACCES {
			result = nil
		}
	}
	fmt.Println()
	return result
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
