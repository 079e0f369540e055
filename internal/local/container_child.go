// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// Exit codes of a container that could not be run, as container runtimes have
// them.
const (
	exitSetup    = 125
	exitNoExec   = 126
	exitNotFound = 127
)

// containerChild is PID 1 of its namespaces. It builds the container's root,
// moves into it, gives up capabilities and becomes the container's program.
func containerChild(stdin io.Reader) int {
	// credentials and Pdeathsig belong to the thread; the exec must be its
	runtime.LockOSThread()
	var s containerSetup
	if err := readSetup(stdin, &s); err != nil {
		fmt.Fprintln(os.Stderr, "container:", err)
		return exitSetup
	}
	if err := enterContainer(s); err != nil {
		fmt.Fprintf(os.Stderr, "container %s: set up: %v\n", s.Hostname, err)
		return exitSetup
	}
	err := unix.Exec(s.Args[0], s.Args, s.Env)
	fmt.Fprintf(os.Stderr, "container %s: exec %s: %v\n", s.Hostname, s.Args[0], err)
	if errors.Is(err, os.ErrNotExist) {
		return exitNotFound
	}
	return exitNoExec
}

func enterContainer(s containerSetup) error {
	// nothing mounted from here on reaches the host; what the host unmounts
	// goes here, too
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	r, err := newRoot(s.Scratch)
	if err != nil {
		return err
	}
	// order matters: scratch file systems first, then what shows inside them
	for _, step := range []func() error{
		func() error { return r.scratch(s.Hide) },
		func() error { return r.proc(s.Privileged) },
		func() error { return r.sys(s.Privileged) },
		func() error { return r.dev(s.Privileged) },
		func() error { return r.mounts(s.Mounts) },
		r.enter,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	unix.Umask(0o022)
	null, err := os.OpenFile("/dev/null", os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if err := unix.Dup3(int(null.Fd()), 0, 0); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	// what imslocal itself inherited is not for the container
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("close descriptors: %w", err)
	}
	if !s.Privileged {
		if err := cutCapabilities(); err != nil {
			return err
		}
	}
	// for this thread, which the exec makes the only one
	return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
}

// root is the container's root while it is put together.
type root struct{ path string }

// newRoot mounts an overlay of the host's / with an upper layer in memory.
func newRoot(scratch string) (root, error) {
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, "mode=0755"); err != nil {
		return root{}, fmt.Errorf("mount tmpfs on %s: %w", scratch, err)
	}
	// paths in mount options are relative, whatever characters scratch holds
	if err := os.Chdir(scratch); err != nil {
		return root{}, err
	}
	if err := overlay("/", "root"); err != nil {
		return root{}, err
	}
	r := root{filepath.Join(scratch, "root")}
	// an overlay shows one file system: parts of the system that are mounts of
	// their own get overlays of their own
	for _, part := range []string{"/etc", "/opt", "/usr", "/var"} {
		if !ownMount(part) {
			continue
		}
		if err := overlay(part, filepath.Join("root", part)); err != nil {
			return root{}, err
		}
	}
	return r, nil
}

func ownMount(path string) bool {
	var top, st unix.Stat_t
	return unix.Stat("/", &top) == nil && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev != top.Dev
}

// overlay mounts lower on target (below the working directory); its upper layer
// is made in the working directory.
func overlay(lower, target string) error {
	name := filepath.Base(target)
	upper, work := "upper-"+name, "work-"+name
	for _, dir := range []string{upper, work, target} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("overlay", target, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mount overlay of %s: %w", lower, err)
	}
	return nil
}

// at is target below the root, with the links on the way resolved inside it.
func (r root) at(target string) (string, error) { return securejoin.SecureJoin(r.path, target) }

func (r root) mount(kind, target string, flags uintptr, options string) error {
	p, err := r.at(target)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, p, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}

// bind shows source at target, which is made when it is missing.
func (r root) bind(source, target string, recursive, readOnly bool) error {
	p, err := r.at(target)
	if err != nil {
		return err
	}
	st, err := os.Stat(source)
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.MkdirAll(p, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(p), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(p, os.O_WRONLY|os.O_CREATE, 0o644); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("mount point %s: %w", target, err)
	}
	flags := uintptr(unix.MS_BIND)
	if recursive {
		flags |= unix.MS_REC
	}
	if err := unix.Mount(source, p, "", flags, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	if readOnly {
		return protect(p, target)
	}
	return nil
}

// protect makes the mounts at and below p read-only (mount_setattr(2), Linux
// 5.12), or where that is missing only the one at p.
func protect(p, target string) error {
	err := unix.MountSetattr(unix.AT_FDCWD, p, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if errors.Is(err, unix.ENOSYS) {
		err = unix.Mount("", p, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	if err != nil {
		return fmt.Errorf("make %s read-only: %w", target, err)
	}
	return nil
}

// scratch mounts fresh file systems where the host's content is no business of
// a container.
func (r root) scratch(hide []string) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	if err := r.mount("tmpfs", "/tmp", flags, "mode=1777"); err != nil {
		return err
	}
	for _, dir := range append([]string{"/run", "/root", "/home"}, hide...) {
		// one that is not inside, or no longer, has nothing to hide
		p, err := r.at(dir)
		if err != nil {
			return err
		}
		if st, err := os.Lstat(p); err != nil || !st.IsDir() {
			continue
		}
		options := "mode=0755"
		if dir == "/root" {
			options = "mode=0700"
		}
		if err := r.mount("tmpfs", dir, flags, options); err != nil {
			return err
		}
	}
	return nil
}

func (r root) proc(privileged bool) error {
	if err := r.mount("proc", "/proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil || privileged {
		return err
	}
	for _, name := range []string{"/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"} {
		source := filepath.Join(r.path, name)
		if _, err := os.Stat(source); err != nil {
			continue
		}
		if err := r.bind(source, name, false, true); err != nil {
			return err
		}
	}
	return nil
}

func (r root) sys(privileged bool) error { return r.bind("/sys", "/sys", true, !privileged) }

// dev gives a privileged container the host's devices, any other the ones that
// every container runtime gives. Terminals are the container's own in both.
func (r root) dev(privileged bool) error {
	if privileged {
		if err := r.bind("/dev", "/dev", true, false); err != nil {
			return err
		}
		return r.mount("devpts", "/dev/pts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
	}
	if err := r.mount("tmpfs", "/dev", unix.MS_NOSUID, "mode=0755,size=64k"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		if err := r.bind("/dev/"+name, "/dev/"+name, false, false); err != nil {
			return err
		}
	}
	if err := r.mount("devpts", "/dev/pts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"); err != nil {
		return err
	}
	if err := r.mount("tmpfs", "/dev/shm", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return err
	}
	for name, target := range map[string]string{"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, filepath.Join(r.path, "dev", name)); err != nil {
			return err
		}
	}
	return nil
}

func (r root) mounts(list []mount) error {
	for _, m := range list {
		if err := r.bind(m.Source, m.Target, false, m.ReadOnly); err != nil {
			return err
		}
	}
	return nil
}

// enter makes the root the process's root; the host's mounts are detached.
// pivot_root(2) explains the trick with both arguments the same.
func (r root) enter() error {
	if err := os.Chdir(r.path); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the host's root: %w", err)
	}
	return os.Chdir("/")
}

// defaultCapabilities are what container runtimes leave to root in a container
// that is not privileged.
var defaultCapabilities = []uintptr{
	unix.CAP_AUDIT_WRITE, unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID,
	unix.CAP_KILL, unix.CAP_MKNOD, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_SETFCAP,
	unix.CAP_SETGID, unix.CAP_SETPCAP, unix.CAP_SETUID, unix.CAP_SYS_CHROOT,
}

// cutCapabilities takes the others from this thread, for good: they leave the
// bounding set first (capabilities(7)).
func cutCapabilities() error {
	var keep uint64
	for _, c := range defaultCapabilities {
		keep |= 1 << c
	}
	for c := uintptr(0); c < 64; c++ {
		if keep&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, syscall.EINVAL) {
			break // beyond the kernel's last capability
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i := range data {
		mask := uint32(keep >> (32 * i))
		data[i].Permitted &= mask
		data[i].Effective = data[i].Permitted
		data[i].Inheritable = 0
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}
