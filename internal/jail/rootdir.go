// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// imageDir is the image root as the gateway holds it, and what was changed in it for the sessions' sake. It all belongs
// to whoever had the shell, so it is only touched before the first session and after the last process is gone, by
// descriptor, and without following links.
type imageDir struct {
	path string
	f    *os.File
	st   unix.Stat_t
	log  *slog.Logger

	made []string               // mount points made for the sessions
	had  map[string]unix.Stat_t // mount points that are the image's own
	dev  map[string]devEntry    // chroot level: what /dev held at the start, by path below it
}

// devEntry is one inode of the image's /dev.
type devEntry struct {
	mode     uint32 // type and permissions
	uid, gid uint32
	rdev     uint64
	link     string
}

func openImageDir(path string, mount *os.File, log *slog.Logger) (*imageDir, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	var fd int
	var err error
	if mount != nil {
		fd, err = unix.Openat(int(mount.Fd()), ".", flags, 0)
	} else {
		fd, err = unix.Open(path, flags, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open image root %s: %w; was the image laid out there?", path, err)
	}
	d := &imageDir{path: path, f: os.NewFile(uintptr(fd), path), log: log, had: make(map[string]unix.Stat_t)}
	if err := unix.Fstat(fd, &d.st); err != nil {
		d.f.Close()
		return nil, fmt.Errorf("stat image root %s: %w", path, err)
	}
	return d, nil
}

// fd is the directory's descriptor; f is never given to the poller, so Fd changes nothing.
func (d *imageDir) fd() int { return int(d.f.Fd()) }

// errImage means that the image itself prevents a confinement. No weaker one is tried: whoever made the image would choose
// the level.
var errImage = errors.New("repair the image")

// keepTimes runs change and gives the directory back the times it had. One that is read-only has kept them.
func keepTimes(dirfd int, change func() error) error {
	var st unix.Stat_t
	if err := unix.Fstat(dirfd, &st); err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	if err := setTimes(dirfd, &st); !errors.Is(err, unix.EROFS) {
		return err
	}
	return nil
}

// setTimes sets a directory's times to those of st.
func setTimes(dirfd int, st *unix.Stat_t) error {
	return unix.UtimesNanoAt(dirfd, ".", []unix.Timespec{st.Atim, st.Mtim}, 0)
}

// makeMountPoints makes those of names the image does not have. A link or a file in their place is refused: what is
// mounted there would appear elsewhere, or not at all.
func (d *imageDir) makeMountPoints(names ...string) error {
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(d.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
			d.had[name] = st
			continue
		case err == nil:
			return fmt.Errorf("/%s of the image is not a directory, so nothing can be mounted on it: %w", name, errImage)
		case !errors.Is(err, unix.ENOENT):
			return fmt.Errorf("look at /%s of the image: %w", name, err)
		}
		err = keepTimes(d.fd(), func() error { return unix.Mkdirat(d.fd(), name, 0o755) })
		if err != nil {
			return fmt.Errorf("make /%s in the image: %w", name, err)
		}
		d.made = append(d.made, name)
	}
	return nil
}

// makeDevices remembers what the image's /dev holds and adds the nodes without which a shell is of little use. Only the
// chroot level needs them: the namespaces level has a /dev of its own, which ends with it.
func (d *imageDir) makeDevices() error {
	dev, err := d.openDev()
	if err != nil {
		return err
	}
	defer dev.Close()
	if d.dev, err = listDev(dev); err != nil {
		return err
	}
	dir, err := dev.Open(".")
	if err != nil {
		return fmt.Errorf("open /dev of the image: %w", err)
	}
	defer dir.Close()
	return keepTimes(int(dir.Fd()), func() error {
		for _, n := range devNodes {
			rdev := unix.Mkdev(n.major, n.minor)
			if e, ok := d.dev[n.name]; ok {
				if e.mode&unix.S_IFMT != unix.S_IFCHR || e.rdev != rdev {
					d.log.Warn("not a device in the image", "path", "/dev/"+n.name)
				}
				continue
			}
			if err := makeNode(int(dir.Fd()), n.name, devEntry{mode: unix.S_IFCHR | 0o666, rdev: rdev}); err != nil {
				d.log.Warn("device is missing in the image and cannot be made", "path", "/dev/"+n.name, "err", err)
			}
		}
		return nil
	})
}

// openDev opens the image's /dev, itself and not what a link there points to.
func (d *imageDir) openDev() (*os.Root, error) {
	fd, err := unix.Openat(d.fd(), "dev", unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev of the image: %w", err)
	}
	defer unix.Close(fd)
	dev, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, fmt.Errorf("open /dev of the image: %w", err)
	}
	return dev, nil
}

// makeNode makes what e describes, except regular files: those have content.
func makeNode(dirfd int, name string, e devEntry) error {
	var err error
	switch e.mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if err := unix.Symlinkat(e.link, dirfd, name); err != nil {
			return err
		}
		return unix.Fchownat(dirfd, name, int(e.uid), int(e.gid), unix.AT_SYMLINK_NOFOLLOW)
	case unix.S_IFDIR:
		err = unix.Mkdirat(dirfd, name, 0o700)
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO:
		err = unix.Mknodat(dirfd, name, e.mode&unix.S_IFMT|0o600, int(e.rdev))
	default:
		return errors.New("was a regular file or a socket")
	}
	if err != nil {
		return err
	}
	if err := unix.Fchownat(dirfd, name, int(e.uid), int(e.gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return unix.Fchmodat(dirfd, name, e.mode&0o7777, 0)
}

// maxDev bounds the listing; no /dev of an image comes near it.
const maxDev = 10000

// listDev lists everything below dev.
func listDev(dev *os.Root) (map[string]devEntry, error) {
	list := make(map[string]devEntry)
	err := fs.WalkDir(dev.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name == "." {
			return nil
		}
		if len(list) == maxDev {
			return fmt.Errorf("more than %d entries", maxDev)
		}
		var st unix.Stat_t
		if err := lstatIn(dev, name, &st); err != nil {
			return err
		}
		e := devEntry{mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: st.Rdev}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			if e.link, err = dev.Readlink(name); err != nil {
				return err
			}
		}
		list[name] = e
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list /dev of the image: %w", err)
	}
	return list, nil
}

// restore undoes makeMountPoints and makeDevices: the image has the mount points it had, and in /dev what it had there. It
// may be called twice.
func (d *imageDir) restore() error {
	var errs []error
	for name, st := range d.had {
		errs = append(errs, d.restoreMountPoint(name, &st))
	}
	clear(d.had)
	if d.dev != nil {
		errs = append(errs, d.restoreDev())
		d.dev = nil
	}
	for _, name := range slices.Backward(d.made) {
		err := keepTimes(d.fd(), func() error { return unix.Unlinkat(d.fd(), name, unix.AT_REMOVEDIR) })
		switch {
		case err == nil, errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENOTEMPTY):
			d.log.Warn("directory made for the sessions is theirs now: left in the image", "path", "/"+name)
		default:
			errs = append(errs, fmt.Errorf("remove /%s from the image: %w", name, err))
		}
	}
	d.made = nil
	return errors.Join(errs...)
}

// restoreMountPoint makes a directory of the image again that a session removed: what is mounted on it in another mount
// namespace, as in the chroot level, does not stop rmdir(2), and the image would not boot without it.
func (d *imageDir) restoreMountPoint(name string, st *unix.Stat_t) error {
	if err := unix.Fstatat(d.fd(), name, new(unix.Stat_t), unix.AT_SYMLINK_NOFOLLOW); !errors.Is(err, unix.ENOENT) {
		return err
	}
	d.log.Warn("directory of the image was removed: made again", "path", "/"+name)
	err := keepTimes(d.fd(), func() error {
		return makeNode(d.fd(), name, devEntry{mode: st.Mode, uid: st.Uid, gid: st.Gid})
	})
	if err == nil {
		err = unix.UtimesNanoAt(d.fd(), name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return fmt.Errorf("make /%s of the image again: %w", name, err)
	}
	return nil
}

func (d *imageDir) restoreDev() error {
	dev, err := d.openDev()
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		d.log.Warn("/dev of the image is no directory any more: left as it is")
		return nil
	}
	if err != nil {
		return err
	}
	defer dev.Close()
	now, err := listDev(dev)
	if err != nil {
		return err
	}
	times := make(map[string]unix.Stat_t) // of directories, as the user left them
	saveTimes := func(dir string) error {
		if _, ok := times[dir]; ok {
			return nil
		}
		var st unix.Stat_t
		err := lstatIn(dev, dir, &st)
		times[dir] = st
		return err
	}
	var errs []error
	// Deepest first, so that directories are empty when their turn comes.
	names := make([]string, 0, len(now))
	for name := range now {
		names = append(names, name)
	}
	sort.Sort(sort.Reverse(sort.StringSlice(names)))
	for _, name := range names {
		was, ok := d.dev[name]
		is := now[name]
		if ok && was.mode&unix.S_IFMT == is.mode&unix.S_IFMT && was.rdev == is.rdev && was.link == is.link {
			continue
		}
		if err := saveTimes(path.Dir(name)); err != nil {
			errs = append(errs, err)
			continue
		}
		d.reportRemoval(name, is)
		if err := dev.Remove(name); err != nil {
			errs = append(errs, fmt.Errorf("restore /dev of the image: %w", err))
			continue
		}
		delete(now, name)
	}
	names = names[:0]
	for name := range d.dev {
		if _, ok := now[name]; !ok {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		err := saveTimes(path.Dir(name))
		if err == nil {
			err = remake(dev, name, d.dev[name])
		}
		d.log.Warn("entry of the image's /dev is gone", "path", "/dev/"+name, "remade", err == nil)
	}
	for dir, st := range times {
		if f, err := dev.Open(dir); err == nil {
			errs = append(errs, setTimes(int(f.Fd()), &st))
			f.Close()
		}
	}
	return errors.Join(errs...)
}

// reportRemoval tells what the session left in /dev. The nodes made by makeDevices are nobody's news; a regular file
// there is usually output that was meant to vanish, sent to a /dev/null that was none.
func (d *imageDir) reportRemoval(name string, e devEntry) {
	for _, n := range devNodes {
		if n.name == name && e.mode&unix.S_IFMT == unix.S_IFCHR && e.rdev == unix.Mkdev(n.major, n.minor) {
			return
		}
	}
	if e.mode&unix.S_IFMT == unix.S_IFREG {
		d.log.Warn("regular file left in /dev of the image: removed", "path", "/dev/"+name)
		return
	}
	d.log.Info("entry left in /dev of the image: removed", "path", "/dev/"+name)
}

func remake(dev *os.Root, name string, e devEntry) error {
	dir, err := dev.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return makeNode(int(dir.Fd()), path.Base(name), e)
}

// lstatIn is Lstat with everything the kernel tells.
func lstatIn(dev *os.Root, name string, st *unix.Stat_t) error {
	dir, err := dev.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Fstatat(int(dir.Fd()), path.Base(name), st, unix.AT_SYMLINK_NOFOLLOW)
}

// sync writes the image's file system out.
func (d *imageDir) sync() error {
	if err := unix.Syncfs(d.fd()); err != nil {
		return fmt.Errorf("sync image root: %w", err)
	}
	return nil
}
