// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// attempts are the ways out that the probe child tries, in this order: those that leave the process changed come last.
var attempts = []struct {
	name string
	try  func(a *probeArgs) (escaped bool, detail string)
}{
	{"inherited descriptors", tryDescriptors},
	{"root directory", tryRoot},
	{"/proc/*/root", tryProcRoots},
	{"other processes", tryProcesses},
	{"signals", trySignal},
	{"regain capabilities", tryCapabilities},
	{"mount", tryMount},
	{"pivot_root", tryPivot},
	{"setns", trySetns},
	{"ptrace", tryPtrace},
	{"read foreign memory", tryMemory},
	{"take a descriptor by pidfd", tryPidfd},
	{"open by file handle", tryHandle},
	{"open a namespace by file handle", tryNamespaceHandle},
	{"device node", tryDeviceNode},
	{"existing device nodes", tryDeviceFiles},
	{"load a kernel module or a kernel", tryModule},
	{"kernel controls", tryKernel},
	{"writable /proc and /sys", tryKernelFiles},
	{"chroot and walk up", tryChroot},
	{"chroot with a held directory", tryChrootHeld},
	{"unshare mount namespace", tryUnshare},
	{"user namespace", tryUserNamespace},
	{"keyrings of the node", tryKeyring},
}

func runAttempts(a *probeArgs) []probeResult {
	results := make([]probeResult, 0, len(attempts))
	for _, at := range attempts {
		escaped, detail := at.try(a)
		results = append(results, probeResult{Name: at.name, Escaped: escaped, Detail: detail})
	}
	return results
}

// refused judges a system call: only the errors of a missing permission are proof. Any other one means that the kernel
// was willing, and just did not like the arguments.
func refused(err error, also ...error) (escaped bool, detail string) {
	if err == nil {
		return true, "worked"
	}
	for _, e := range append(also, unix.EPERM, unix.EACCES, unix.ENOSYS) {
		if errors.Is(err, e) {
			return false, err.Error()
		}
	}
	return true, "permitted: " + err.Error()
}

// failure is errno as an error, nil for none.
func failure(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// isImage reports whether path is the image root.
func (a *probeArgs) isImage(path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, err
	}
	return st.Dev == a.Dev && st.Ino == a.Ino, nil
}

func tryDescriptors(*probeArgs) (bool, string) {
	const limit = 65536
	for fd := range limit {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		// Beyond stdio only the runtime's own are expected: epoll and event descriptors have no file type.
		kind := st.Mode & unix.S_IFMT
		if kind == unix.S_IFDIR || fd > 2 && kind != 0 {
			return true, fmt.Sprintf("descriptor %d is open, mode %o", fd, st.Mode)
		}
	}
	return false, "none"
}

func tryRoot(a *probeArgs) (bool, string) {
	for _, path := range []string{"/", "/..", "/../..", "."} {
		if ok, err := a.isImage(path); err != nil || !ok {
			return true, fmt.Sprintf("%s is not the image root (%v)", path, err)
		}
	}
	return false, "is the image"
}

// procPIDs lists the processes visible in /proc; none where it is not mounted.
func procPIDs() []int {
	ents, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range ents {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

// otherJail reports whether a process is a session of another jail. In a container there is none, but on a machine
// without containers there may be: jails of one level do not protect their sessions from each other. The bounding set is
// proof enough, since nobody who would imitate it has run yet.
func (a *probeArgs) otherJail(pid int) bool {
	if a.Level == Namespaces {
		return false
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	const mayLack = 1 << unix.CAP_MKNOD
	for line := range strings.Lines(string(b)) {
		if set, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			bound, err := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			return err == nil && bound|mayLack == a.Caps|mayLack
		}
	}
	return false
}

func tryProcRoots(a *probeArgs) (bool, string) {
	names := []string{"self", "1", strconv.Itoa(a.Gateway), strconv.Itoa(a.Init), strconv.Itoa(os.Getppid())}
	for _, pid := range procPIDs() {
		if !a.otherJail(pid) {
			names = append(names, strconv.Itoa(pid))
		}
	}
	for _, n := range names {
		for _, link := range []string{"/root", "/root/..", "/root/../.."} {
			if ok, err := a.isImage("/proc/" + n + link); err == nil && !ok {
				return true, "/proc/" + n + link + " leads out"
			}
		}
		for _, secret := range []string{"/environ", "/mem", "/fd/0"} {
			// Our own threads answer to their numbers, too, and in a young PID namespace those may be the gateway's.
			if _, err := os.Stat("/proc/self/task/" + n); n == "self" || err == nil {
				continue
			}
			if f, err := os.Open("/proc/" + n + secret); err == nil {
				f.Close()
				return true, "/proc/" + n + secret + " can be opened"
			}
		}
	}
	return false, fmt.Sprintf("%d processes looked at", len(names))
}

// tryProcesses looks for processes that are not the jail's. Without a PID namespace those outside can be seen; what
// counts there is tried by signals, ptrace and its kin.
func tryProcesses(a *probeArgs) (bool, string) {
	if a.Level != Namespaces {
		return false, "not separated in this level"
	}
	for _, pid := range procPIDs() {
		if pid != 1 && pid != os.Getpid() {
			return true, fmt.Sprintf("process %d is visible", pid)
		}
	}
	if os.Getppid() != 1 {
		return true, fmt.Sprintf("parent is %d", os.Getppid())
	}
	return false, "none visible"
}

func tryCapabilities(a *probeArgs) (bool, string) {
	s, err := threadCaps()
	if err != nil {
		return true, err.Error()
	}
	if extra := (s.permitted | s.effective | s.inheritable | boundingSet()) &^ a.Caps; extra != 0 {
		return true, fmt.Sprintf("holds %#x beyond %#x", extra, a.Caps)
	}
	for c := range 64 {
		bit := uint64(1) << c
		if a.Caps&bit != 0 {
			continue
		}
		more := capState{effective: s.effective | bit, permitted: s.permitted | bit, inheritable: s.inheritable | bit}
		_ = setThreadCaps(more)
		_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0)
		now, err := threadCaps()
		if err != nil || (now.permitted|now.effective|now.inheritable|boundingSet())&^a.Caps != 0 {
			return true, fmt.Sprintf("regained capability %d (%v)", c, err)
		}
	}
	return false, fmt.Sprintf("bounded to %#x", a.Caps)
}

func tryMount(*probeArgs) (bool, string) {
	dir := someDirectory()
	for _, m := range []struct {
		source, fstype string
		flags          uintptr
	}{{"tmpfs", "tmpfs", unix.MS_RDONLY}, {"/", "", unix.MS_BIND}} {
		err := unix.Mount(m.source, dir, m.fstype, m.flags, "")
		if err == nil {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if escaped, detail := refused(err); escaped {
			return escaped, detail
		}
	}
	return false, unix.EPERM.Error()
}

func tryPivot(*probeArgs) (bool, string) {
	// The permission is checked before the names.
	return refused(unix.PivotRoot("/.no-such-directory", "/.no-such-directory"))
}

func trySetns(a *probeArgs) (bool, string) {
	tried := "nothing to enter"
	for _, name := range []string{"/proc/self/ns/mnt", "/proc/1/ns/mnt", fmt.Sprintf("/proc/%d/ns/mnt", a.Gateway)} {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		err = unix.Setns(fd, unix.CLONE_NEWNS)
		unix.Close(fd)
		escaped, detail := refused(err)
		if escaped {
			return true, name + ": " + detail
		}
		tried = detail
	}
	return false, tried
}

// outsiders are the processes that must stay out of reach: init, and without a PID namespace the gateway.
func (a *probeArgs) outsiders() []int {
	if a.Level == Namespaces {
		return []int{1}
	}
	return []int{a.Gateway, a.Init, os.Getppid()}
}

func tryPtrace(a *probeArgs) (bool, string) {
	detail := ""
	for _, pid := range a.outsiders() {
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
		err := failure(errno)
		var escaped bool
		if escaped, detail = refused(err, unix.ESRCH); escaped {
			return true, fmt.Sprintf("process %d: %s", pid, detail)
		}
	}
	return false, detail
}

func tryMemory(a *probeArgs) (bool, string) {
	detail := ""
	buf := make([]byte, 8)
	for _, pid := range a.outsiders() {
		local := []unix.Iovec{{Base: &buf[0]}}
		local[0].SetLen(len(buf))
		// Any address will do: the permission is checked before it is used.
		_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: 4096, Len: len(buf)}}, 0)
		var escaped bool
		if escaped, detail = refused(err, unix.ESRCH); escaped {
			return true, fmt.Sprintf("process %d: %s", pid, detail)
		}
	}
	return false, detail
}

func tryPidfd(a *probeArgs) (bool, string) {
	detail := "no pidfd"
	for _, pid := range a.outsiders() {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		got, err := unix.PidfdGetfd(fd, 0, 0)
		if err == nil {
			unix.Close(got)
		}
		var escaped bool
		if escaped, detail = refused(err); !escaped {
			escaped, detail = refused(unix.Setns(fd, unix.CLONE_NEWNS))
		}
		unix.Close(fd)
		if escaped {
			return true, fmt.Sprintf("process %d: %s", pid, detail)
		}
	}
	return false, detail
}

// tryHandle opens an inode by number, past all directories ("shocker").
func tryHandle(*probeArgs) (bool, string) {
	dir, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err.Error()
	}
	defer unix.Close(dir)
	handle, _, err := unix.NameToHandleAt(dir, ".", 0)
	if err != nil {
		handle = unix.NewFileHandle(1, make([]byte, 8)) // the permission is checked before the handle
	}
	fd, err := unix.OpenByHandleAt(dir, handle, unix.O_RDONLY)
	if err == nil {
		unix.Close(fd)
	}
	return refused(err)
}

// tryNamespaceHandle asks for a namespace by number, which takes no capability since Linux 6.18. There is none with this
// one; but for a filter, the kernel looks.
func tryNamespaceHandle(*probeArgs) (bool, string) {
	const nsfsRoot, nsfsHandle = -10003, 0xf1 // FD_NSFS_ROOT, FILEID_NSFS
	fd, err := unix.OpenByHandleAt(nsfsRoot, unix.NewFileHandle(nsfsHandle, bytes.Repeat([]byte{0xff}, 16)), unix.O_RDONLY)
	if err == nil {
		unix.Close(fd)
	}
	return refused(err, unix.EBADF)
}

func tryDeviceNode(a *probeArgs) (bool, string) {
	devs := hostDevices
	for _, rdev := range a.Block {
		devs = append(devs[:len(devs):len(devs)], devEntry{mode: unix.S_IFBLK, rdev: rdev})
	}
	detail := ""
	for _, name := range []string{"/", "/dev", "/dev/shm", "/tmp"} {
		dir, err := unix.Open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		escaped := false
		err = keepTimes(dir, func() error {
			for _, d := range devs {
				if escaped, detail = refused(tryDevice(dir, d), unix.EROFS); escaped {
					detail = fmt.Sprintf("%d:%d in %s: %s", unix.Major(d.rdev), unix.Minor(d.rdev), name, detail)
					return nil
				}
			}
			return nil
		})
		unix.Close(dir)
		if escaped || err != nil {
			return true, fmt.Sprintf("%s %v", detail, err)
		}
	}
	return false, detail
}

// tryDeviceFiles opens the block devices, and the memory, that came with the image.
func tryDeviceFiles(*probeArgs) (bool, string) {
	ents, err := os.ReadDir("/dev")
	if err != nil {
		return false, err.Error()
	}
	n := 0
	for _, e := range ents {
		var st unix.Stat_t
		name := "/dev/" + e.Name()
		if unix.Lstat(name, &st) != nil {
			continue
		}
		bad := st.Mode&unix.S_IFMT == unix.S_IFBLK
		for _, d := range hostDevices {
			bad = bad || st.Mode&unix.S_IFMT == d.mode && st.Rdev == d.rdev
		}
		if !bad {
			continue
		}
		n++
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		// A node without a device is no way out.
		if escaped, detail := refused(err, unix.ENXIO, unix.ENODEV, unix.ENOMEDIUM); escaped {
			return true, name + ": " + detail
		}
	}
	return false, fmt.Sprintf("%d looked at", n)
}

// tryModule takes nothing but the filter's answer: kernels without modules have another one, and it proves nothing.
func tryModule(*probeArgs) (bool, string) {
	none := ^uintptr(0)
	for _, call := range []struct {
		name string
		nr   uintptr
		args [3]uintptr
	}{
		{"init_module", unix.SYS_INIT_MODULE, [3]uintptr{}},
		{"finit_module", unix.SYS_FINIT_MODULE, [3]uintptr{none}},
		{"delete_module", unix.SYS_DELETE_MODULE, [3]uintptr{}},
		{"kexec_load", unix.SYS_KEXEC_LOAD, [3]uintptr{0, none}},
		{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD, [3]uintptr{none, none}},
	} {
		if _, _, errno := unix.Syscall6(call.nr, call.args[0], call.args[1], call.args[2], none, none, none); errno != unix.EPERM {
			return true, fmt.Sprintf("%s is not filtered: %v", call.name, failure(errno))
		}
	}
	return false, unix.EPERM.Error()
}

// tryKernel makes calls that stop at the missing capability; if it is there, they stop at their bad arguments.
func tryKernel(*probeArgs) (bool, string) {
	if escaped, detail := refused(unix.Acct("/.no-such-file")); escaped {
		return true, "acct: " + detail
	}
	_, _, errno := unix.Syscall6(unix.SYS_REBOOT, 0, 0, 0, 0, 0, 0)
	if escaped, detail := refused(failure(errno)); escaped {
		return true, "reboot: " + detail
	}
	_, _, errno = unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 0, 0, ^uintptr(0), 0, 0)
	if escaped, detail := refused(failure(errno)); escaped {
		return true, "kexec_load: " + detail
	}
	return false, errno.Error()
}

// tryKernelFiles opens for writing what would give the kernel orders.
func tryKernelFiles(*probeArgs) (bool, string) {
	for _, name := range []string{
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/panic_on_oom", "/proc/sysrq-trigger",
		"/proc/irq/default_smp_affinity", "/sys/kernel/uevent_helper", "/sys/kernel/mm/ksm/run", "/sys/power/state",
		"/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/cgroup.procs",
	} {
		fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		if escaped, detail := refused(err, unix.EROFS, unix.ENOENT, unix.ENOTDIR); escaped {
			return true, name + ": " + detail
		}
	}
	if b, err := os.ReadFile("/proc/kcore"); err == nil && len(b) > 0 {
		return true, "/proc/kcore can be read"
	}
	return false, "none"
}

// someDirectory finds a directory to change the root to; making one would leave a trace.
func someDirectory() string {
	ents, err := os.ReadDir("/")
	if err != nil {
		return ""
	}
	for _, e := range ents {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			return "/" + e.Name()
		}
	}
	return ""
}

// walkUp goes to the top of the tree and makes it the root.
func walkUp(a *probeArgs, dir string) (escaped bool, detail string) {
	for range 128 {
		if err := unix.Chdir(".."); err != nil {
			return true, err.Error()
		}
	}
	if err := unix.Chroot("."); err != nil {
		return refused(err)
	}
	if ok, err := a.isImage("/"); !ok {
		return true, fmt.Sprintf("out of the image by %s (%v)", dir, err)
	}
	return false, "chroot works, and leads nowhere"
}

func tryChroot(a *probeArgs) (bool, string) {
	dir := someDirectory()
	if err := unix.Chroot(dir); err != nil {
		return refused(err)
	}
	return walkUp(a, dir) // the working directory is outside the new root
}

func tryChrootHeld(a *probeArgs) (bool, string) {
	held, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true, err.Error()
	}
	defer unix.Close(held)
	dir := someDirectory()
	if err := unix.Chroot(dir); err != nil {
		return refused(err)
	}
	if err := unix.Fchdir(held); err != nil {
		return true, err.Error()
	}
	return walkUp(a, dir)
}

func tryUnshare(*probeArgs) (bool, string) {
	return refused(unix.Unshare(unix.CLONE_NEWNS))
}

// tryUserNamespace forks into a user namespace, where all capabilities come back. The kernel refuses it to a process in a
// chroot, the filter elsewhere. The program does not exist: an error of execve means that the fork worked.
func tryUserNamespace(*probeArgs) (bool, string) {
	_, err := syscall.ForkExec("/.no-such-program", nil, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}})
	return refused(err)
}

func tryKeyring(*probeArgs) (bool, string) {
	_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, false)
	return refused(err)
}
