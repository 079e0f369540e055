// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What a fresh /proc must not offer to a root user: runc's default lists (runtime-spec config "maskedPaths" and
// "readonlyPaths"). A writable /proc/sys/kernel/core_pattern alone is a way out of any jail.
var (
	procMasked   = []string{"acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi"}
	procReadonly = []string{"bus", "fs", "irq", "sys", "sysrq-trigger"}
	sysMasked    = []string{"firmware", "devices/virtual/powercap"}
)

// devNodes are the devices of the jail's /dev: those every container runtime provides.
var devNodes = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

// devLinks are the links of the jail's /dev.
var devLinks = [][2]string{
	{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"},
	{"pts/ptmx", "ptmx"},
}

const (
	quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

	// keptFlags are the mount flags of the image's file system that its bind mount keeps.
	keptFlags = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NOEXEC | unix.ST_NOATIME | unix.ST_NODIRATIME | unix.ST_RELATIME
)

// enterRoot makes the image root the root of the calling process's own mount namespace, which must be a private copy:
//
//	/          the image, bind-mounted with nodev (set-uid programs keep working, device nodes in it are dead)
//	/proc      of the jail's PID namespace, without what reaches the kernel at large
//	/sys       read-only; missing where the container may not mount it
//	/dev       a small tmpfs, nodev too: each device is a bind mount of its own
//	/dev/pts   the jail's own terminals
//	/dev/shm, /dev/mqueue
//
// Everything else, the container's root above all, is detached. Nothing is written to the image; the mount points must
// exist (see makeMountPoints). notes tells what is missing.
//
// For mounts that are lent, the caller has a user namespace of its own but the container's PID and IPC namespaces, to
// which new mounts of /proc, /sys and /dev/mqueue belong: the container's own are used for the first two.
func enterRoot(m *setupMsg, lent bool) (notes []string, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := bindRoot(m.root); err != nil {
		return nil, err
	}
	root, err := openRoot(m)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := mountProc(root, lent); err != nil {
		return nil, err
	}
	if err := mountSys(root, lent); err != nil {
		notes = append(notes, err.Error())
	}
	more, err := mountDev(root, lent)
	if err != nil {
		return nil, err
	}
	notes = append(notes, more...)

	// pivot_root(".", ".") stacks the old root on the new one, from where it is detached: pivot_root(2), NOTES.
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return nil, fmt.Errorf("enter image root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return nil, fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("detach the container's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return nil, fmt.Errorf("enter image root: %w", err)
	}
	return notes, nil
}

// attach mounts what the gateway made at the image root, for this mount namespace, which must be a private copy, alone.
func attach(m *setupMsg, files []*os.File) error {
	if len(files) != 1 {
		return fmt.Errorf("%w: no mount", errMalformed)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	fd, err := rawFD(files[0])
	if err != nil {
		return err
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, m.root, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount the image root: %w", err)
	}
	return nil
}

// bindRoot bind-mounts the root on itself, nodev; the bind is one mount only, so what lies on mount points below stays
// outside.
func bindRoot(path string) error {
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind-mount image root: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fmt.Errorf("read mount flags of image root: %w", err)
	}
	// The ST_ and MS_ values of the kept flags are the same numbers (statfs(2)).
	flags := uintptr(st.Flags) & keptFlags
	if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NODEV|flags, ""); err != nil {
		return fmt.Errorf("remount image root nodev: %w", err)
	}
	return nil
}

// openRoot opens the image root and makes sure it is the directory the gateway opened.
func openRoot(m *setupMsg) (*os.File, error) {
	fd, err := unix.Open(m.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open image root: %w", err)
	}
	root := os.NewFile(uintptr(fd), m.root)
	if err := sameRoot(root, m); err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// sameRoot makes sure that root is the directory the gateway opened.
func sameRoot(root *os.File, m *setupMsg) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return fmt.Errorf("stat image root: %w", err)
	}
	if st.Dev != m.dev || st.Ino != m.ino {
		return errors.New("image root was replaced while the jail was being built")
	}
	return nil
}

// at opens the mount point name below dir, itself and not what a symlink there points to. The path it returns stays
// valid as long as f is open and names the directory as it was opened: what is mounted on it later is not seen.
func at(dir *os.File, name string) (f *os.File, path string, err error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(dir.Fd()), name, &how)
	if errors.Is(err, unix.ENOSYS) && !strings.Contains(name, "/") {
		fd, err = unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), fmt.Sprintf("/proc/self/fd/%d", fd), nil
}

// mountOn mounts a file system on name below dir and opens its root.
func mountOn(dir *os.File, name, fstype string, flags uintptr, data string) (*os.File, error) {
	f, path, err := at(dir, name)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", fstype, err)
	}
	defer f.Close()
	if err := unix.Mount(fstype, path, fstype, flags, data); err != nil {
		return nil, fmt.Errorf("mount %s on %s: %w", fstype, f.Name(), err)
	}
	top, _, err := at(dir, name)
	return top, err
}

// bindTree binds the container's /name, with all that is mounted below it, and opens its root.
func bindTree(root *os.File, name string) (*os.File, error) {
	f, path, err := at(root, name)
	if err != nil {
		return nil, fmt.Errorf("bind-mount /%s: %w", name, err)
	}
	defer f.Close()
	if err := unix.Mount("/"+name, path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return nil, fmt.Errorf("bind-mount /%s: %w", name, err)
	}
	top, _, err := at(root, name)
	return top, err
}

// sealTree makes a mount and all below it read-only.
func sealTree(path string) error {
	const sealed = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	return unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: sealed})
}

func mountProc(root *os.File, lent bool) error {
	var proc *os.File
	var err error
	if lent {
		proc, err = bindTree(root, "proc")
	} else {
		proc, err = mountOn(root, "proc", "proc", quiet, "")
	}
	if err != nil {
		return err
	}
	defer proc.Close()
	for _, name := range procReadonly {
		if err := bindReadonly(proc, name, lent); err != nil {
			return err
		}
	}
	for _, name := range procMasked {
		if err := mask(proc, name); err != nil {
			return err
		}
	}
	return nil
}

func mountSys(root *os.File, lent bool) error {
	var sys *os.File
	var err error
	if lent {
		sys, err = bindTree(root, "sys")
	} else {
		sys, err = mountOn(root, "sys", "sysfs", quiet|unix.MS_RDONLY, "")
	}
	if err != nil {
		return err
	}
	defer sys.Close()
	if lent {
		if err := sealTree(fmt.Sprintf("/proc/self/fd/%d", sys.Fd())); err != nil {
			return fmt.Errorf("make /sys read-only: %w", err)
		}
	}
	for _, name := range sysMasked {
		if err := mask(sys, name); err != nil {
			return err
		}
	}
	return nil
}

// bindReadonly makes name below dir read-only. What the kernel does not have needs no protection.
func bindReadonly(dir *os.File, name string, lent bool) error {
	f, path, err := at(dir, name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	flags := uintptr(unix.MS_BIND)
	if lent {
		flags |= unix.MS_REC // what the container has mounted below cannot be left behind
	}
	if err := unix.Mount(path, path, "", flags, ""); err != nil {
		return fmt.Errorf("bind-mount %s: %w", f.Name(), err)
	}
	top, path, err := at(dir, name)
	if err != nil {
		return err
	}
	defer top.Close()
	if lent {
		if err := sealTree(path); err != nil {
			return fmt.Errorf("make %s read-only: %w", f.Name(), err)
		}
		return nil
	}
	if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|quiet, ""); err != nil {
		return fmt.Errorf("remount %s read-only: %w", f.Name(), err)
	}
	return nil
}

// mask hides name below dir: an empty directory over a directory, /dev/null over a file.
func mask(dir *os.File, name string) error {
	f, path, err := at(dir, name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.IsDir() {
		err = unix.Mount("tmpfs", path, "tmpfs", quiet|unix.MS_RDONLY, "size=4k,nr_inodes=2")
	} else {
		err = unix.Mount("/dev/null", path, "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("hide %s: %w", f.Name(), err)
	}
	return nil
}

// mountDev builds /dev. The devices are bind mounts of the container's own nodes: the tmpfs itself is nodev, so that a
// node made in it by mknod(2) opens nothing. A lent one is read-only: elsewhere the kernel refuses to remove or rename
// what something is mounted on, but not in another mount namespace, where a removed /dev/null would stay away.
func mountDev(root *os.File, lent bool) (notes []string, err error) {
	dev, err := mountOn(root, "dev", "tmpfs", quiet, "mode=755,size=16m,nr_inodes=8192")
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	fd := int(dev.Fd())
	for _, n := range devNodes {
		if err := bindDevice(dev, n.name, unix.Mkdev(n.major, n.minor)); err != nil {
			if n.name == "null" {
				return nil, err
			}
			notes = append(notes, err.Error())
		}
	}
	for _, l := range devLinks {
		if err := unix.Symlinkat(l[0], fd, l[1]); err != nil {
			return nil, fmt.Errorf("link /dev/%s: %w", l[1], err)
		}
	}
	for _, d := range []struct {
		name, fstype, data string
		flags              uintptr
		need               bool
	}{
		{"pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC, true},
		{"shm", "tmpfs", "mode=1777", quiet, true},
		{"mqueue", "mqueue", "", quiet, false},
	} {
		if lent && d.name == "mqueue" {
			continue
		}
		if err := unix.Mkdirat(fd, d.name, 0o755); err != nil {
			return nil, fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
		top, err := mountOn(dev, d.name, d.fstype, d.flags, d.data)
		switch {
		case err == nil:
			top.Close()
		case d.need:
			return nil, err
		default:
			notes = append(notes, err.Error())
		}
	}
	if lent {
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|quiet, ""); err != nil {
			return nil, fmt.Errorf("make /dev read-only: %w", err)
		}
	}
	return notes, nil
}

// bindDevice bind-mounts the container's /dev/name, if it is what its name says.
func bindDevice(dev *os.File, name string, rdev uint64) error {
	src := "/dev/" + name
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return fmt.Errorf("stat %s: %w", src, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != rdev {
		return fmt.Errorf("%s of the container is not the device %d:%d", src, unix.Major(rdev), unix.Minor(rdev))
	}
	fd, err := unix.Openat(int(dev.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o666)
	if err != nil {
		return fmt.Errorf("make /dev/%s: %w", name, err)
	}
	unix.Close(fd)
	f, path, err := at(dev, name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Mount(src, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind-mount %s: %w", src, err)
	}
	return nil
}

// mountLegacy gives a plain session below its image root what the job asked for with DKMS: sysfs, proc and the
// container's devices, in the sessions' own mount namespace, where the packer never sees them.
func mountLegacy(m *setupMsg) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root, err := openRoot(m)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, fs := range []struct {
		name, fstype string
		flags        uintptr
	}{{"sys", "sysfs", quiet}, {"proc", "proc", quiet}} {
		top, err := mountOn(root, fs.name, fs.fstype, fs.flags, "")
		if err != nil {
			return err
		}
		top.Close()
	}
	f, path, err := at(root, "dev")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Mount("/dev", path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind-mount /dev: %w", err)
	}
	return nil
}

// readonlyBinary opens this program through a read-only mount of its own, so that nobody who gets hold of the file
// through /proc/PID/exe inside the jail can ever open it for writing (the way of CVE-2019-5736). Where the file cannot
// be found by name any more, the running program's own reference has to do: it is busy as long as the gateway runs.
func readonlyBinary() (*os.File, error) {
	running, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("open own program: %w", err)
	}
	name, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return running, nil
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return running, nil
	}
	defer unix.Close(fd)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return running, nil
	}
	sealed, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return running, nil
	}
	a, errA := running.Stat()
	b, errB := sealed.Stat()
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		sealed.Close()
		return running, nil
	}
	running.Close()
	return sealed, nil
}
