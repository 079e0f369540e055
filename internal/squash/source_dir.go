// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DirOptions narrows what DirSource sees.
type DirOptions struct {
	// OneFileSystem leaves out what is mounted inside the tree. A directory
	// that is a mount point is packed empty, with a warning; a file with
	// another mounted over it is an error, because its own content is out of
	// reach.
	OneFileSystem bool
	// Exclude, if set, is asked for each path relative to the root. A path it
	// returns true for is left out, with everything below it.
	Exclude func(path string) bool
	// DropXattr, if set, is asked for the name of each extended attribute. One that it returns true for is left out.
	DropXattr func(name string) bool
	// Index, if set, is of the image that was unpacked to this directory. Files
	// it knows to be untouched are not read.
	Index *Index
	// SpoolDir is where the names of a directory of hundreds of thousands are
	// sorted; empty means os.TempDir.
	SpoolDir string

	held int // of a spool, for tests
}

// DirSource returns the tree below a directory. The path itself may contain
// symlinks, it is the caller's; the tree may be hostile: nothing in it is
// followed, everything is opened relative to directories held open, and a file
// that is not what it was a moment ago is an error, never other content.
//
// Hard links are found by device and inode number. Overlayfs' own attributes
// (trusted.overlay., user.overlay.) are left out. Reading needs /proc.
func DirSource(root string, opt DirOptions) (Source, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open tree", Path: root, Err: err}
	}
	s := &dirSource{fd: fd, opt: opt, cacheFD: -1, spool: &spool{dir: opt.SpoolDir, held: opt.held}}
	s.names.runs.spool = s.spool
	if err := unix.Access(procPath(fd, "."), unix.F_OK); err != nil {
		s.Close()
		return nil, fmt.Errorf("open tree %s: extended attributes are read through /proc/self/fd, which is out of reach: mount /proc: %w", root, err)
	}
	return s, nil
}

type dirSource struct {
	fd     int
	opt    DirOptions
	rootSt unix.Statx_t
	spool  *spool
	names  nameReader

	// The directory the last content was opened in stays open: contents are
	// opened in the order of the walk.
	cacheDir string
	cacheFD  int
}

func (s *dirSource) Close() error {
	s.spool.close()
	if s.cacheFD >= 0 {
		unix.Close(s.cacheFD)
		s.cacheFD, s.cacheDir = -1, ""
	}
	if s.fd < 0 {
		return nil
	}
	fd := s.fd
	s.fd = -1
	return unix.Close(fd)
}

const statMask = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID

// Walk implements Source.
func (s *dirSource) Walk(ctx context.Context, fn func(*Entry) error) error {
	if err := unix.Statx(s.fd, "", unix.AT_EMPTY_PATH, statMask, &s.rootSt); err != nil {
		return &fs.PathError{Op: "stat", Path: ".", Err: err}
	}
	e := Entry{Path: "."}
	if err := s.fill(&e, s.fd, ".", &s.rootSt); err != nil {
		return err
	}
	if err := fn(&e); err != nil {
		return err
	}
	// Reading a directory moves the descriptor's offset, and this is not the
	// last walk, so it gets one of its own.
	fd, err := openDir(s.fd, ".")
	if err != nil {
		return &fs.PathError{Op: "open directory", Path: ".", Err: err}
	}
	defer unix.Close(fd)
	return s.walkDir(ctx, fd, ".", fn)
}

// walkDir yields what is in the directory open at fd.
func (s *dirSource) walkDir(ctx context.Context, fd int, dir string, fn func(*Entry) error) error {
	names, err := s.names.read(fd)
	if err != nil {
		return &fs.PathError{Op: "read directory", Path: dir, Err: err}
	}
	defer names.done()
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		name, ok, err := names.next()
		if err != nil || !ok {
			return err
		}
		p := path.Join(dir, name)
		if s.opt.Exclude != nil && s.opt.Exclude(p) {
			continue
		}
		if err := s.walkEntry(ctx, fd, name, p, fn); err != nil {
			return err
		}
	}
}

func (s *dirSource) walkEntry(ctx context.Context, dirFD int, name, p string, fn func(*Entry) error) error {
	var st unix.Statx_t
	if err := unix.Statx(dirFD, name, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil {
		return vanished("stat", p, err)
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	foreign := s.opt.OneFileSystem && otherMount(&s.rootSt, &st)
	if foreign && !isDir {
		return fmt.Errorf("%s: another file is mounted over it, which hides its content: unmount it before packing", p)
	}
	e := Entry{Path: p}
	if err := s.fill(&e, dirFD, name, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		e.Content = s.contentOf(p, &st)
	}
	if foreign {
		e.Note = "mount point, packed as an empty directory"
	}
	if err := fn(&e); err != nil {
		return err
	}
	if !isDir || foreign {
		return nil
	}
	fd, err := openDir(dirFD, name)
	if errors.Is(err, unix.EMFILE) {
		return fmt.Errorf("%s: too deep, every directory on the way to it is held open: raise the limit of open files (ulimit -n): %w", p, err)
	}
	if err != nil {
		return vanished("open directory", p, err)
	}
	defer unix.Close(fd)
	var now unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, &now); err != nil {
		return &fs.PathError{Op: "stat", Path: p, Err: err}
	}
	if linkID(&now) != linkID(&st) {
		return changedError(p, "it was replaced")
	}
	return s.walkDir(ctx, fd, p, fn)
}

// contentOf returns where the bytes of a file come from.
func (s *dirSource) contentOf(p string, st *unix.Statx_t) Content {
	if s.opt.Index != nil && linkID(st).Dev == linkID(&s.rootSt).Dev {
		if c := s.opt.Index.unchanged(st); c != nil {
			return c
		}
	}
	return &dirContent{source: s, path: p, was: fileIdentity(st), holes: st.Blocks*512 < st.Size}
}

// otherMount tells whether an inode was reached through another mount than the
// root. Kernels before 5.8 only know devices, which say nothing about files: in
// an overlay these may have the device of their layer.
func otherMount(root, st *unix.Statx_t) bool {
	if root.Mask&st.Mask&unix.STATX_MNT_ID != 0 {
		return st.Mnt_id != root.Mnt_id
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR && (st.Dev_major != root.Dev_major || st.Dev_minor != root.Dev_minor)
}

// fill sets an entry's metadata; name is relative to the directory at dirFD.
func (s *dirSource) fill(e *Entry, dirFD int, name string, st *unix.Statx_t) error {
	e.Mode = uint32(st.Mode)
	e.UID, e.GID = st.Uid, st.Gid
	e.Mtime = st.Mtime.Sec
	kind := st.Mode & unix.S_IFMT
	if st.Nlink > 1 && kind != unix.S_IFDIR {
		e.Link = linkID(st)
	}
	var err error
	switch kind {
	case unix.S_IFREG:
		if st.Size > 1<<63-1 {
			return fmt.Errorf("%s: size %d is out of range", e.Path, st.Size)
		}
		e.Size = int64(st.Size)
		e.Holes = max(e.Size-int64(st.Blocks)*512, 0)
	case unix.S_IFLNK:
		if e.Target, err = readlinkAt(dirFD, name); err != nil {
			return vanished("readlink", e.Path, err)
		}
	case unix.S_IFBLK, unix.S_IFCHR:
		e.Major, e.Minor = st.Rdev_major, st.Rdev_minor
	}
	e.Xattrs, err = readXattrs(dirFD, name, s.opt.DropXattr)
	if err != nil {
		return vanished("read extended attributes", e.Path, err)
	}
	return nil
}

func linkID(st *unix.Statx_t) LinkID {
	return LinkID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino}
}

// openDir opens a directory below dirFD. O_DIRECTORY keeps the kernel from
// opening anything else, even if a fifo took the name.
func openDir(dirFD int, name string) (int, error) {
	return unix.Openat(dirFD, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

func readNames(fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

func readlinkAt(dirFD int, name string) (string, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(dirFD, name, buf)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// procPath names a file relative to an open directory for calls that have no
// *at form. The kernel resolves the first part to the directory held open;
// l*xattr do not follow the last.
func procPath(fd int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
}

func readXattrs(dirFD int, name string, drop func(string) bool) ([]Xattr, error) {
	p := procPath(dirFD, name)
	list, err := growing(func(buf []byte) (int, error) { return unix.Llistxattr(p, buf) })
	if errors.Is(err, unix.ENOTSUP) || len(list) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var xattrs []Xattr
	for raw := range bytes.SplitSeq(bytes.TrimSuffix(list, []byte{0}), []byte{0}) {
		key := string(raw)
		if isOverlayXattr(key) || drop != nil && drop(key) {
			continue
		}
		value, err := growing(func(buf []byte) (int, error) { return unix.Lgetxattr(p, key, buf) })
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		xattrs = append(xattrs, Xattr{Name: key, Value: value})
	}
	return xattrs, nil
}

// isOverlayXattr tells whether an attribute is overlayfs' own, which means
// nothing outside the layer it was made in, or something else.
func isOverlayXattr(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// growing calls read with ever larger buffers until the result fits.
func growing(read func([]byte) (int, error)) ([]byte, error) {
	var small [256]byte
	buf := small[:]
	for {
		n, err := read(buf)
		switch {
		case err == nil:
			return bytes.Clone(buf[:n]), nil
		case !errors.Is(err, unix.ERANGE) || len(buf) > 1<<20:
			return nil, err
		}
		buf = make([]byte, len(buf)*16)
	}
}

// vanished is the error of a call on a name that was there a moment ago.
func vanished(op, p string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENODATA) {
		return changedError(p, err.Error())
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// ErrChanged is what errors about a tree that did not hold still unwrap to.
var ErrChanged = errors.New("changed while it was being packed")

func changedError(p, how string) error {
	return fmt.Errorf("%s: %w (%s): stop what writes to the tree and pack again", p, ErrChanged, how)
}
