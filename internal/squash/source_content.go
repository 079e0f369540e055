// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// identity is what lstat says about a file and what differs after any write to
// it, or when the name stands for another file. A write in the same clock tick
// as the walk that keeps the size goes unseen; the tree is to be at rest.
type identity struct {
	link         LinkID
	size         uint64
	mtime, ctime unix.StatxTimestamp
}

func fileIdentity(st *unix.Statx_t) identity {
	return identity{link: linkID(st), size: st.Size, mtime: st.Mtime, ctime: st.Ctime}
}

// differs says how a file differs from now, or nothing.
func (id *identity) differs(now *identity) string {
	switch {
	case now.link != id.link:
		return "it was replaced"
	case now.size != id.size:
		return fmt.Sprintf("its size was %d and is %d", id.size, now.size)
	case now.mtime != id.mtime:
		return "it was written to"
	case now.ctime != id.ctime:
		return "its attributes were changed"
	}
	return ""
}

// dirContent is a regular file in a directory tree.
type dirContent struct {
	source *dirSource
	path   string
	was    identity
	holes  bool // fewer blocks allocated than the size needs
}

// KeepContent implements ContentKeeper.
func (*dirSource) KeepContent(dst []byte, c Content) []byte {
	d := c.(*dirContent)
	holes := uint64(0)
	if d.holes {
		holes = 1
	}
	dst = binary.AppendUvarint(dst, holes)
	dst = binary.AppendUvarint(dst, d.was.link.Dev)
	dst = binary.AppendUvarint(dst, d.was.link.Ino)
	for _, at := range []unix.StatxTimestamp{d.was.mtime, d.was.ctime} {
		dst = binary.AppendVarint(dst, at.Sec)
		dst = binary.AppendUvarint(dst, uint64(at.Nsec))
	}
	return dst
}

// KeptContent implements ContentKeeper.
func (s *dirSource) KeptContent(path string, size int64, b []byte) (Content, []byte) {
	r := recordReader{b}
	c := &dirContent{source: s, path: path, holes: r.uint() == 1}
	c.was.size = uint64(size)
	c.was.link = LinkID{Dev: r.uint(), Ino: r.uint()}
	for _, at := range []*unix.StatxTimestamp{&c.was.mtime, &c.was.ctime} {
		at.Sec, at.Nsec = r.int(), uint32(r.uint())
	}
	return c, r.rest
}

// Open implements Content. It is called from one goroutine.
func (c *dirContent) Open() (ContentReader, error) {
	dir, name := path.Split(c.path)
	dirFD, err := c.source.dirFD(dir)
	if err != nil {
		return nil, vanished("open directory", path.Clean(dir), err)
	}
	// The walk saw a regular file. Should something else have taken its name,
	// O_NONBLOCK keeps a fifo from blocking the open.
	fd, err := unix.Openat(dirFD, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, vanished("open", c.path, err)
	}
	r := &dirReader{dirContent: c, fd: fd}
	if err := r.unchanged(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return r, nil
}

// dirFD opens a directory, one name at a time from the root. Its path is empty
// or ends with a slash.
func (s *dirSource) dirFD(dir string) (int, error) {
	if dir == "" {
		return s.fd, nil
	}
	if dir == s.cacheDir {
		return s.cacheFD, nil
	}
	fd := s.fd
	for name := range strings.SplitSeq(strings.TrimSuffix(dir, "/"), "/") {
		next, err := openDir(fd, name)
		if fd != s.fd {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	if s.cacheFD >= 0 {
		unix.Close(s.cacheFD)
	}
	s.cacheDir, s.cacheFD = strings.Clone(dir), fd
	return fd, nil
}

type dirReader struct {
	*dirContent
	fd int
}

// unchanged compares the open file with what the walk saw.
func (r *dirReader) unchanged() error {
	var st unix.Statx_t
	if err := unix.Statx(r.fd, "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: r.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return changedError(r.path, "it is no regular file any more")
	}
	now := fileIdentity(&st)
	if how := r.was.differs(&now); how != "" {
		return changedError(r.path, how)
	}
	return nil
}

func (r *dirReader) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(r.fd, p[n:], off+int64(n))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return n, &fs.PathError{Op: "read", Path: r.path, Err: err}
		case m == 0:
			return n, changedError(r.path, fmt.Sprintf("it ends at %d of %d bytes", off+int64(n), r.was.size))
		}
		n += m
	}
	return n, nil
}

func (r *dirReader) NextData(off int64) (int64, error) {
	if !r.holes {
		return off, nil
	}
	next, err := unix.Seek(r.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return int64(r.was.size), nil
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP):
		return off, nil // the file system cannot tell: zeroes are found by reading
	case err != nil:
		return 0, &fs.PathError{Op: "seek to data", Path: r.path, Err: err}
	}
	return next, nil
}

func (r *dirReader) Close() error {
	err := r.unchanged()
	if cerr := unix.Close(r.fd); err == nil && cerr != nil {
		err = &fs.PathError{Op: "close", Path: r.path, Err: cerr}
	}
	return err
}
