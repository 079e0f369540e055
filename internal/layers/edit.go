// SPDX-License-Identifier: Apache-2.0

package layers

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// edit runs do with these names in r.dir as they are in the root.
func (r *Root) edit(do func() error, names ...name) (err error) {
	if r.base == nil {
		return do()
	}
	if err := errors.Join(os.RemoveAll(r.scratch), os.Mkdir(r.scratch, 0o700)); err != nil {
		return fmt.Errorf("edit the layered root: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.scratch)) }()
	e := edit{r: r, keep: map[string]bool{}, white: map[string]bool{}, links: map[uint32]string{}}
	for _, n := range names {
		if err = e.bring(n); err != nil {
			err = fmt.Errorf("edit the layered root: bring up /%s: %w", n.path, err)
			break
		}
	}
	if err == nil {
		err = do()
	}
	if serr := e.settle(); serr != nil {
		err = errors.Join(err, fmt.Errorf("edit the layered root: %w", serr))
	}
	return err
}

// edit is one edit of a layered root.
type edit struct {
	r       *Root
	touched []string          // parents before what is in them
	keep    map[string]bool   // of those touched: they stay
	trees   []string          // of which all is touched
	white   map[string]bool   // had a whiteout, which was taken away
	links   map[uint32]string // inode number in the image: where it was brought up
}

// maxLinks is how many symbolic links a path may go through (MAXSYMLINKS of the
// kernel).
const maxLinks = 40

// bring brings a name up, as far as it exists.
func (e *edit) bring(n name) error {
	top, err := e.r.top()
	if err != nil {
		return err
	}
	stack, todo, links := []*node{top}, strings.Split(n.path, "/"), 0
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		dir := stack[len(stack)-1]
		if !isDir(dir.upper) {
			return nil
		}
		child, err := e.raise(dir, part, n.keep)
		if err != nil || child == nil {
			return err
		}
		if child.upper.Mode&unix.S_IFMT == unix.S_IFLNK && (len(todo) > 0 || n.follow) {
			if links++; links > maxLinks {
				return nil // do will say so
			}
			target, err := os.Readlink(e.r.at(child.path))
			if err != nil {
				return err
			}
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		stack = append(stack, child)
	}
	if n.tree {
		last := stack[len(stack)-1]
		e.trees = append(e.trees, last.path)
		return e.raiseTree(last)
	}
	return nil
}

// raise brings one entry of a directory up; nil if there is none.
func (e *edit) raise(dir *node, entry string, keep bool) (*node, error) {
	n, err := e.r.look(dir, entry)
	if err != nil {
		return nil, err
	}
	switch {
	case n.white:
		err = e.r.quietly(n.path, func() error { return unix.Unlink(e.r.at(n.path)) })
		if err == nil {
			e.touch(n.path, keep)
			e.white[n.path] = true
		}
		return nil, err
	case n.absent(), n.upper == nil && e.white[n.path]: // deleted, though its whiteout is away for this edit
		return nil, nil
	case n.upper == nil:
		if err := e.copyUp(n); err != nil {
			return nil, err
		}
		n, err = e.r.look(dir, entry)
	}
	e.touch(n.path, keep)
	return n, err
}

func (e *edit) touch(p string, keep bool) {
	if _, known := e.keep[p]; !known {
		e.touched = append(e.touched, p)
	}
	e.keep[p] = e.keep[p] || keep
}

// raiseTree brings all below a node up.
func (e *edit) raiseTree(n *node) error {
	if !isDir(n.upper) {
		return nil
	}
	upper, err := os.ReadDir(e.r.at(n.path))
	if err != nil {
		return err
	}
	var names []string
	for _, d := range upper {
		names = append(names, d.Name())
	}
	if n.merged != nil {
		lower, err := e.r.base.ReadDir(n.path)
		if err != nil {
			return err
		}
		for _, d := range lower {
			names = append(names, d.Name())
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		child, err := e.raise(n, name, false)
		if err != nil {
			return err
		}
		if child != nil {
			if err := e.raiseTree(child); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyUp makes in the upper layer what the image holds, whole or not at all.
func (e *edit) copyUp(n *node) error {
	ino, tmp := n.lower, path.Join(e.r.scratch, "copy")
	if ino.NLink > 1 && !ino.IsDir() {
		first, err := e.otherName(ino)
		if err != nil {
			return err
		}
		if first != "" {
			return e.r.quietly(n.path, func() error { return os.Link(first, e.r.at(n.path)) })
		}
		e.links[ino.Number] = n.path
	}
	if err := e.r.make(tmp, n.path, ino); err != nil {
		return err
	}
	return e.r.quietly(n.path, func() error { return os.Rename(tmp, e.r.at(n.path)) })
}

// otherName returns where a file with several names is in the upper layer already:
// brought up by another name, or, changed, in the overlay's index; "" if nowhere.
func (e *edit) otherName(ino *squash.Inode) (string, error) {
	if p, ok := e.links[ino.Number]; ok {
		return e.r.at(p), nil
	}
	index := filepath.Join(e.r.work, "index")
	entries, err := os.ReadDir(index)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // never mounted
	}
	for _, d := range entries {
		if number, ok := squash.IndexedInode(d.Name()); ok && number == ino.Number {
			return filepath.Join(index, d.Name()), nil
		}
	}
	return "", err
}

// make makes at tmp what the image holds at p.
func (r *Root) make(tmp, p string, ino *squash.Inode) error {
	xattrs, err := r.base.Xattrs(ino)
	if err != nil {
		return err
	}
	mode := unixMode(ino)
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = os.Mkdir(tmp, 0o700)
	case unix.S_IFREG:
		err = r.copyFile(tmp, p)
	case unix.S_IFLNK:
		err = os.Symlink(ino.Target, tmp)
	default:
		err = unix.Mknod(tmp, mode&unix.S_IFMT|0o600, int(ino.Rdev))
	}
	if err == nil {
		err = os.Lchown(tmp, int(ino.UID), int(ino.GID))
	}
	if err == nil && mode&unix.S_IFMT != unix.S_IFLNK {
		err = unix.Chmod(tmp, mode&0o7777)
	}
	for _, x := range xattrs {
		if err == nil && !isMark(x.Name) {
			if err = unix.Lsetxattr(tmp, x.Name, x.Value, 0); err != nil {
				err = fmt.Errorf("set attribute %s (with IMS_BUILDENV_LAYOUT=unpacked it need not be copied): %w", x.Name, err)
			}
		}
	}
	if err == nil {
		t := unix.Timespec{Sec: int64(ino.MTime)}
		err = unix.UtimesNanoAt(unix.AT_FDCWD, tmp, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW)
	}
	return err
}

func (r *Root) copyFile(to, from string) error {
	src, err := r.base.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// settle takes out of the upper layer what the edit left as it is in the image, and
// hides what it removed.
func (e *edit) settle() error {
	var errs []error
	for _, p := range e.trees {
		// What was moved here, too.
		if err := e.touchTree(p); err != nil {
			errs = append(errs, err)
		}
	}
	for _, p := range slices.Backward(e.touched) {
		if err := e.settleOne(p); err != nil {
			errs = append(errs, fmt.Errorf("settle /%s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func (e *edit) touchTree(p string) error {
	return fs.WalkDir(os.DirFS(e.r.at(p)), ".", func(name string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err == nil && name != "." {
			e.touch(path.Join(p, name), false)
		}
		return err
	})
}

func (e *edit) settleOne(p string) error {
	n, err := e.r.find(p)
	if err != nil || n == nil || n.lower == nil {
		return err
	}
	at := e.r.at(p)
	switch {
	case n.white:
		return nil
	case n.upper == nil:
		return e.r.quietly(p, func() error { return unix.Mknod(at, unix.S_IFCHR, 0) })
	case e.white[p] && isDir(n.upper):
		return unix.Lsetxattr(at, opaqueMark, []byte("y"), 0)
	case e.keep[p]:
		return nil
	}
	same, err := e.r.unchanged(n)
	if err != nil || !same {
		return err
	}
	if _, ours := e.links[n.lower.Number]; n.upper.Nlink > 1 && !isDir(n.upper) && !ours {
		return nil // the user linked it to another name
	}
	return e.r.quietly(p, func() error {
		if isDir(n.upper) {
			if err := unix.Rmdir(at); !errors.Is(err, unix.ENOTEMPTY) {
				return err
			}
			return nil
		}
		return unix.Unlink(at)
	})
}

// unchanged reports whether the upper layer holds what the image does. The entries
// of a directory do not count.
func (r *Root) unchanged(n *node) (bool, error) {
	st, ino := n.upper, n.lower
	if st.Mode != unixMode(ino) || st.Uid != ino.UID || st.Gid != ino.GID || st.Mtim != (unix.Timespec{Sec: int64(ino.MTime)}) {
		return false, nil
	}
	if isDir(st) && n.merged == nil {
		return false, nil // opaque
	}
	upper, err := listXattrs(r.at(n.path))
	if err != nil {
		return false, err
	}
	lower, err := r.base.Xattrs(ino)
	if err != nil {
		return false, err
	}
	lower = slices.DeleteFunc(lower, func(x squash.Xattr) bool { return isMark(x.Name) })
	if len(upper) != len(lower) {
		return false, nil
	}
	for _, x := range lower {
		if value, ok := upper[x.Name]; !ok || !bytes.Equal(value, x.Value) {
			return false, nil
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if st.Size != ino.Size {
			return false, nil
		}
		return r.sameContent(n.path)
	case unix.S_IFLNK:
		target, err := os.Readlink(r.at(n.path))
		return target == ino.Target, err
	case unix.S_IFCHR, unix.S_IFBLK:
		return st.Rdev == ino.Rdev, nil
	}
	return true, nil
}

func (r *Root) sameContent(p string) (bool, error) {
	a, err := os.Open(r.at(p))
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := r.base.Open(p)
	if err != nil {
		return false, err
	}
	defer b.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		switch {
		case errA == nil && errB == nil:
		case isEnd(errA) && isEnd(errB):
			return true, nil
		default:
			return false, errors.Join(errA, errB)
		}
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// quietly runs do, which changes the entry p, and gives its directory the
// modification time back that it had.
func (r *Root) quietly(p string, do func() error) error {
	dir := r.at(path.Dir(p))
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path.Dir(p), Err: err}
	}
	if err := do(); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}, 0)
}

// isMark reports whether an attribute is overlayfs's own, which no image has.
func isMark(name string) bool {
	return strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "trusted.overlay.")
}

// listXattrs returns the attributes of a file without overlayfs's.
func listXattrs(p string) (map[string][]byte, error) {
	const most = 64 << 10 // XATTR_LIST_MAX and XATTR_SIZE_MAX (limits.h)
	buf := make([]byte, most)
	n, err := unix.Llistxattr(p, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	found := map[string][]byte{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || isMark(name) {
			continue
		}
		value := make([]byte, most)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return nil, err
		}
		found[name] = value[:n]
	}
	return found, nil
}

// unixMode is an inode's st_mode.
func unixMode(ino *squash.Inode) uint32 {
	mode := uint32(ino.Mode.Perm())
	for bit, value := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if ino.Mode&bit != 0 {
			mode |= value
		}
	}
	switch t := ino.Mode.Type(); {
	case t == 0:
		return mode | unix.S_IFREG
	case t == fs.ModeDir:
		return mode | unix.S_IFDIR
	case t == fs.ModeSymlink:
		return mode | unix.S_IFLNK
	case t == fs.ModeNamedPipe:
		return mode | unix.S_IFIFO
	case t == fs.ModeSocket:
		return mode | unix.S_IFSOCK
	case t&fs.ModeCharDevice != 0:
		return mode | unix.S_IFCHR
	}
	return mode | unix.S_IFBLK
}
