// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrTooLarge is wrapped by Unpack's error about an image beyond MaxBytes.
var ErrTooLarge = errors.New("image too large")

// processors is how many there are; a program may raise GOMAXPROCS for reasons
// of scheduling.
var processors = runtime.GOMAXPROCS(0)

// UnpackOptions change how Unpack works; the zero value is good.
type UnpackOptions struct {
	// Workers is how many goroutines unpack content; if zero, one more than
	// GOMAXPROCS was when the program began.
	Workers int
	// MaxBytes, if not zero, is how many bytes of content and of extended
	// attributes may be written. Holes do not count. An image whose files
	// hold more is refused before anything is written.
	MaxBytes int64
	// Progress, if not nil, is told now and then how many bytes of content are
	// written, of how many. It is called by one goroutine at a time.
	Progress func(done, total int64)
	Log      *slog.Logger // nil for none
}

// UnpackStats says what Unpack made.
type UnpackStats struct {
	Files     int64 `json:"files"` // inodes, not names
	Dirs      int64 `json:"dirs"`  // with the root
	Symlinks  int64 `json:"symlinks"`
	Specials  int64 `json:"specials"`  // devices, fifos, sockets
	HardLinks int64 `json:"hardLinks"` // names beyond an inode's first
	Bytes     int64 `json:"bytes"`     // sum of the files' sizes
	Written   int64 `json:"written"`   // Bytes without holes
}

// Unpack writes the image's tree to dir, which must be missing or empty, and
// restores owners, modes, modification times, extended attributes, hard links,
// devices and holes. It needs the privileges for what is in the image: CAP_CHOWN
// for owners, CAP_MKNOD for devices, CAP_SETFCAP for file capabilities.
//
// Nothing outside dir is written: everything is made relative to descriptors
// of directories made here, under names that are checked, and no symlink is
// followed. The whole tree is checked before the first write. After an error
// dir is left as it is then; removing it is the caller's business.
func Unpack(ctx context.Context, img *Image, dir string, opt UnpackOptions) (UnpackStats, error) {
	if opt.Workers <= 0 {
		opt.Workers = processors + 1 // one may wait for a lock of the file system
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	stats, err := img.survey(ctx)
	if err != nil {
		return UnpackStats{}, fmt.Errorf("unpack to %s: %w; nothing was written", dir, err)
	}
	if opt.MaxBytes > 0 && stats.Written > opt.MaxBytes {
		return UnpackStats{}, fmt.Errorf("unpack to %s: %w: the files hold %d bytes, the limit is %d; nothing was written", dir, ErrTooLarge, stats.Written, opt.MaxBytes)
	}
	root, err := openTarget(dir)
	if err != nil {
		return UnpackStats{}, fmt.Errorf("unpack to %s: %w", dir, err)
	}
	defer root.Close()
	if err := checkRoom(root, stats.Written, stats.Files+stats.Dirs+stats.Symlinks+stats.Specials-1); err != nil {
		return UnpackStats{}, fmt.Errorf("unpack to %s: %w: free space, or unpack to another volume; nothing was written", dir, err)
	}
	u := &unpacker{img: img, opt: opt, target: dir, total: stats.Written, dirs: newDirFDs(int(root.Fd())), open: map[*fileTask]struct{}{}}
	defer u.dirs.close()
	err = u.run(ctx)
	u.closeFiles()
	if err != nil {
		return UnpackStats{}, fmt.Errorf("unpack to %s: %w; it stopped after %d of %d bytes", dir, err, u.done.Load(), u.total)
	}
	if opt.Progress != nil {
		opt.Progress(u.total, u.total)
	}
	opt.Log.Debug("unpacked", "dir", dir, "files", stats.Files, "dirs", stats.Dirs, "bytes", stats.Bytes, "written", stats.Written)
	return stats, nil
}

// survey walks the tree and counts.
func (img *Image) survey(ctx context.Context) (UnpackStats, error) {
	st := UnpackStats{Dirs: 1}
	w, err := newWalker(img, "")
	if err != nil {
		return st, err
	}
	defer w.close()
	err = w.walk(ctx, func(n *treeName) error {
		switch {
		case n.again:
			st.HardLinks++
		case n.ino.IsDir():
			st.Dirs++
		case n.ino.isFile():
			st.Files++
			st.Bytes += n.ino.Size
			st.Written += n.ino.dataLen(int64(img.sb.BlockSize))
			if st.Bytes < 0 {
				return errorAt(n.path(), corruptf("the files' sizes exceed 63 bits"))
			}
		case n.ino.typ.basic() == typeSymlink:
			st.Symlinks++
		default:
			st.Specials++
		}
		return nil
	})
	return st, err
}

// openTarget makes dir if it is missing and opens it if it is empty. Until its
// own mode is set at the very end, nobody else may enter it.
func openTarget(dir string) (*os.File, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	switch names, err := f.Readdirnames(1); {
	case err == nil:
		f.Close()
		return nil, fmt.Errorf("the directory is not empty, it has %q: unpack to a new or empty one", names[0])
	case !errors.Is(err, io.EOF):
		f.Close()
		return nil, err
	}
	// This also takes away a setgid bit, which new directories would inherit.
	if err := unix.Fchmod(int(f.Fd()), 0o700); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "set mode of", Path: dir, Err: err}
	}
	return f, nil
}

// unpacker is the sink that makes files, and what makes everything else.
type unpacker struct {
	img    *Image
	opt    UnpackOptions
	target string
	total  int64
	dirs   *dirFDs

	subdirs []*treeDir // in the order they were made
	links   []hardLink

	done   atomic.Int64
	xattrs atomic.Int64 // bytes of attributes written

	progressMu sync.Mutex
	progressAt atomic.Int64

	made [0o1000]atomic.Pointer[access] // what files made with a mode got; see madeAs

	mu   sync.Mutex
	open map[*fileTask]struct{} // what several workers may write to
}

// hardLink is a further name of an inode, made when the first one is there.
type hardLink struct {
	first *linkName
	dir   *treeDir
	name  string
}

func (u *unpacker) run(ctx context.Context) error {
	w, err := newWalker(u.img, "")
	if err != nil {
		return err
	}
	defer w.close()
	w.named = true
	err = u.img.extract(ctx, u.opt.Workers, u, u.progress, func(ctx context.Context, x *extractor) error {
		return w.walk(ctx, func(n *treeName) error { return u.make(ctx, n, x) })
	})
	if err != nil {
		return err
	}
	for _, l := range u.links {
		if err := u.link(l); err != nil {
			return err
		}
	}
	// Children before parents: what a directory had made in it has changed its
	// times, and its mode may shut us out.
	for i := len(u.subdirs) - 1; i >= 0; i-- {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := u.finishDir(u.subdirs[i]); err != nil {
			return err
		}
	}
	return u.finishDir(w.root)
}

// make makes one name; files are left to the workers.
func (u *unpacker) make(ctx context.Context, n *treeName, x *extractor) error {
	switch {
	case n.again:
		u.links = append(u.links, hardLink{n.link, n.dir, n.name})
		return nil
	case n.ino.isFile():
		return x.add(ctx, &fileTask{dir: n.dir, name: n.name, ino: n.ino, fd: -1})
	}
	dir, err := u.dirs.get(n.dir)
	if err != nil {
		return err
	}
	defer dir.put()
	if n.sub != nil {
		u.subdirs = append(u.subdirs, n.sub)
		return u.explain("make directory", n.path(), ignoringEINTR(func() error { return unix.Mkdirat(dir.fd, n.name, 0o700) }))
	}
	return u.makeNode(dir.fd, n)
}

// makeNode makes a symlink, device, fifo or socket. They cannot be opened, so
// they are named relative to their directory, in which only we can have put
// something else under the name.
func (u *unpacker) makeNode(dirFD int, n *treeName) error {
	ino, typ := n.ino, n.ino.typ.basic()
	var err error
	if typ == typeSymlink {
		err = unix.Symlinkat(ino.Target, dirFD, n.name)
	} else {
		format := map[inodeType]uint32{typeBlock: unix.S_IFBLK, typeChar: unix.S_IFCHR, typeFifo: unix.S_IFIFO, typeSocket: unix.S_IFSOCK}[typ]
		err = unix.Mknodat(dirFD, n.name, format|0o600, int(ino.Rdev))
	}
	if err != nil {
		return u.explain("make "+typ.String(), n.path(), err)
	}
	if err := unix.Fchownat(dirFD, n.name, int(ino.UID), int(ino.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return u.explain(ownerOp(ino), n.path(), err)
	}
	err = u.setXattrs(ino, n.path, func(name string, value []byte) error {
		return unix.Lsetxattr(procPath(dirFD, n.name), name, value, 0)
	})
	if err != nil {
		return err
	}
	if typ != typeSymlink {
		if err := unix.Fchmodat(dirFD, n.name, unixPerm(ino.Mode), 0); err != nil {
			return u.explain("set mode of", n.path(), err)
		}
	}
	ts := times(ino)
	err = unix.UtimesNanoAt(dirFD, n.name, ts[:], unix.AT_SYMLINK_NOFOLLOW)
	return u.explain("set times of", n.path(), err)
}

// link makes a further name of an inode.
func (u *unpacker) link(l hardLink) error {
	from, err := u.dirs.get(l.first.dir)
	if err != nil {
		return err
	}
	defer from.put()
	to, err := u.dirs.get(l.dir)
	if err != nil {
		return err
	}
	defer to.put()
	return u.explain("make hard link", l.dir.join(l.name), unix.Linkat(from.fd, l.first.name, to.fd, l.name, 0))
}

// finishDir restores a directory's metadata.
func (u *unpacker) finishDir(d *treeDir) error {
	dir, err := u.dirs.get(d)
	if err != nil {
		return err
	}
	defer dir.put()
	is, err := u.look(dir.fd, d.path)
	if err != nil {
		return err
	}
	return u.restore(dir.fd, d.ino, &is, d.path)
}

// access is the owner of a file or directory, and its permissions.
type access struct{ uid, gid, perm uint32 }

// look asks for those of an open one.
func (u *unpacker) look(fd int, name func() string) (access, error) {
	var is unix.Stat_t
	if err := unix.Fstat(fd, &is); err != nil {
		return access{}, u.explain("look at", name(), err)
	}
	return access{is.Uid, is.Gid, is.Mode & 0o7777}, nil
}

// restore restores the metadata of an open file or directory, which is as its
// making left it. The order matters: changing the owner takes setuid bits and
// capabilities away. Most files have been made with the owner and mode they
// need, and what is right is not set.
func (u *unpacker) restore(fd int, ino *Inode, is *access, name func() string) error {
	chown := is.uid != ino.UID || is.gid != ino.GID
	if chown {
		if err := unix.Fchown(fd, int(ino.UID), int(ino.GID)); err != nil {
			return u.explain(ownerOp(ino), name(), err)
		}
	}
	err := u.setXattrs(ino, name, func(attr string, value []byte) error { return unix.Fsetxattr(fd, attr, value, 0) })
	if err != nil {
		return err
	}
	if perm := unixPerm(ino.Mode); chown || is.perm != perm {
		if err := unix.Fchmod(fd, perm); err != nil {
			return u.explain("set mode of", name(), err)
		}
	}
	ts := times(ino)
	if err := futimens(fd, ts[:]); err != nil {
		return u.explain("set times of", name(), err)
	}
	return nil
}

// setXattrs reads an inode's attributes and calls set for each.
func (u *unpacker) setXattrs(ino *Inode, name func() string, set func(string, []byte) error) error {
	if ino.xattr == noXattr {
		return nil
	}
	list, err := u.img.Xattrs(ino)
	if err != nil {
		return errorAt(name(), err)
	}
	for _, x := range list {
		if sum := u.xattrs.Add(int64(len(x.Value))); u.opt.MaxBytes > 0 && sum > u.opt.MaxBytes-u.total {
			return fmt.Errorf("%s: extended attributes exceed the limit of %d bytes for the whole tree", name(), u.opt.MaxBytes)
		}
		if err := set(x.Name, x.Value); err != nil {
			return u.explainXattr(x, name(), err)
		}
	}
	return nil
}

// progress counts, and reports each further 4 MiB.
func (u *unpacker) progress(n int64) {
	const step = 4 << 20
	done := u.done.Add(n)
	if u.opt.Progress == nil || done-u.progressAt.Load() < step || !u.progressMu.TryLock() {
		return
	}
	defer u.progressMu.Unlock()
	// Who had the lock a moment ago may have come further.
	if done-u.progressAt.Load() >= step {
		u.progressAt.Store(done)
		u.opt.Progress(done, u.total)
	}
}
