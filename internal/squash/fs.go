// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

var (
	_ fs.ReadDirFS  = (*Image)(nil)
	_ fs.StatFS     = (*Image)(nil)
	_ fs.ReadLinkFS = (*Image)(nil)
)

// maxSymlinks is how many symlinks a path may go through (MAXSYMLINKS of the
// kernel).
const maxSymlinks = 40

// resolve returns the inode a path leads to. Symlinks are followed inside the
// image only: its root directory is where absolute targets begin and where
// ".." ends. With nofollow, a symlink as last component is not followed.
func (img *Image) resolve(name string, nofollow bool) (*Inode, error) {
	if !validPath(name) {
		return nil, fs.ErrInvalid
	}
	root, err := img.Root()
	if err != nil {
		return nil, err
	}
	stack := []*Inode{root} // the directories from the root to the current one
	todo := strings.Split(name, "/")
	links := 0
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
		if !dir.IsDir() {
			return nil, errNotDir
		}
		e, err := img.lookup(dir, part)
		if err != nil {
			return nil, err
		}
		ino, err := img.child(dir, e)
		if err != nil {
			return nil, err
		}
		if ino.Mode.Type() != fs.ModeSymlink || nofollow && len(todo) == 0 {
			stack = append(stack, ino)
			continue
		}
		if links++; links > maxSymlinks {
			return nil, errors.New("too many levels of symbolic links")
		}
		if strings.HasPrefix(ino.Target, "/") {
			stack = stack[:1]
		}
		todo = append(strings.Split(ino.Target, "/"), todo...)
	}
	return stack[len(stack)-1], nil
}

// validPath is fs.ValidPath for names that need not be UTF-8.
func validPath(name string) bool {
	if name == "." {
		return true
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

var errNotDir = errors.New("not a directory")

// open resolves a path for the operation op.
func (img *Image) open(op, name string, nofollow bool) (*Inode, error) {
	ino, err := img.resolve(name, nofollow)
	if err != nil {
		return nil, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return ino, nil
}

// Open opens a file, a directory, or anything else for Stat. Symlinks are
// followed inside the image, with the image's root as "/". Files also
// implement [io.ReaderAt] and [io.Seeker].
func (img *Image) Open(name string) (fs.File, error) {
	ino, err := img.open("open", name, false)
	if err != nil {
		return nil, err
	}
	info := fileInfo{path.Base(name), ino}
	if ino.IsDir() {
		return &imageDir{img: img, path: name, info: info}, nil
	}
	return &imageFile{img: img, path: name, info: info}, nil
}

// Stat follows symlinks as Open does.
func (img *Image) Stat(name string) (fs.FileInfo, error) {
	ino, err := img.open("stat", name, false)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), ino}, nil
}

// Lstat does not follow a symlink in the last component.
func (img *Image) Lstat(name string) (fs.FileInfo, error) {
	ino, err := img.open("lstat", name, true)
	if err != nil {
		return nil, err
	}
	return fileInfo{path.Base(name), ino}, nil
}

// ReadLink returns a symlink's target as it stands in the image.
func (img *Image) ReadLink(name string) (string, error) {
	ino, err := img.open("readlink", name, true)
	if err != nil {
		return "", err
	}
	if ino.Mode.Type() != fs.ModeSymlink {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return ino.Target, nil
}

// ReadDir returns a directory's entries in the order of their names. The
// entries' inodes are read when Info is called.
func (img *Image) ReadDir(name string) ([]fs.DirEntry, error) {
	ino, err := img.open("readdir", name, false)
	if err != nil {
		return nil, err
	}
	list, err := img.list(ino)
	if err != nil {
		return list, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return list, nil
}

func (img *Image) list(dir *Inode) ([]fs.DirEntry, error) {
	if !dir.IsDir() {
		return nil, errNotDir
	}
	d, err := img.openListing(dir)
	if err != nil {
		return nil, err
	}
	var list []fs.DirEntry
	for {
		e, ok, err := d.next()
		if err != nil || !ok {
			return list, err
		}
		list = append(list, fsDirEntry{img, dir, e})
	}
}

// fsDirEntry implements fs.DirEntry.
type fsDirEntry struct {
	img *Image
	dir *Inode
	e   dirEntry
}

func (d fsDirEntry) Name() string      { return d.e.Name }
func (d fsDirEntry) IsDir() bool       { return d.e.Type == typeDir }
func (d fsDirEntry) Type() fs.FileMode { return d.e.Type.fsMode() }
func (d fsDirEntry) String() string    { return fs.FormatDirEntry(d) }

func (d fsDirEntry) Info() (fs.FileInfo, error) {
	ino, err := d.img.child(d.dir, d.e)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: d.e.Name, Err: err}
	}
	return fileInfo{d.e.Name, ino}, nil
}

// fileInfo implements fs.FileInfo; Sys returns the *Inode.
type fileInfo struct {
	name string
	ino  *Inode
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return i.ino.Size }
func (i fileInfo) Mode() fs.FileMode  { return i.ino.Mode }
func (i fileInfo) ModTime() time.Time { return i.ino.ModTime() }
func (i fileInfo) IsDir() bool        { return i.ino.IsDir() }
func (i fileInfo) Sys() any           { return i.ino }
func (i fileInfo) String() string     { return fs.FormatFileInfo(i) }

// imageDir implements fs.ReadDirFile.
type imageDir struct {
	img    *Image
	path   string
	info   fileInfo
	list   []fs.DirEntry // nil until first read
	read   bool
	closed bool
}

func (d *imageDir) Stat() (fs.FileInfo, error) { return d.info, nil }

func (d *imageDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.path, Err: errors.New("is a directory")}
}

func (d *imageDir) Close() error {
	if d.closed {
		return &fs.PathError{Op: "close", Path: d.path, Err: fs.ErrClosed}
	}
	d.closed = true
	return nil
}

func (d *imageDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.closed {
		return nil, &fs.PathError{Op: "readdir", Path: d.path, Err: fs.ErrClosed}
	}
	if !d.read {
		list, err := d.img.list(d.info.ino)
		if err != nil {
			return nil, &fs.PathError{Op: "readdir", Path: d.path, Err: err}
		}
		d.list, d.read = list, true
	}
	if n <= 0 {
		n = len(d.list)
	} else if len(d.list) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(d.list))
	list := slices.Clone(d.list[:n])
	d.list = d.list[n:]
	return list, nil
}

// imageFile implements fs.File for everything but directories.
type imageFile struct {
	img    *Image
	path   string
	info   fileInfo
	off    int64
	closed bool

	once    sync.Once
	offsets []int64 // of each block in the image; see offset
}

var (
	_ io.ReaderAt = (*imageFile)(nil)
	_ io.Seeker   = (*imageFile)(nil)
)

func (f *imageFile) Stat() (fs.FileInfo, error) { return f.info, nil }

func (f *imageFile) Close() error {
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.path, Err: fs.ErrClosed}
	}
	f.closed = true
	return nil
}

func (f *imageFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.off)
	f.off += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (f *imageFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += f.off
	case io.SeekEnd:
		offset += f.info.ino.Size
	}
	if offset < 0 || whence < io.SeekStart || whence > io.SeekEnd {
		return 0, &fs.PathError{Op: "seek", Path: f.path, Err: fs.ErrInvalid}
	}
	f.off = offset
	return offset, nil
}

// ReadAt implements io.ReaderAt.
func (f *imageFile) ReadAt(p []byte, off int64) (n int, err error) {
	ino := f.info.ino
	switch {
	case f.closed:
		err = fs.ErrClosed
	case off < 0 || !ino.isFile():
		err = fs.ErrInvalid
	}
	if err != nil {
		return 0, &fs.PathError{Op: "read", Path: f.path, Err: err}
	}
	for n < len(p) {
		if off >= ino.Size {
			return n, io.EOF
		}
		b, err := f.at(off)
		if err != nil {
			return n, &fs.PathError{Op: "read", Path: f.path, Err: err}
		}
		if b == nil { // a hole
			bs := int64(f.img.sb.BlockSize)
			hole := min(bs-off%bs, ino.Size-off, int64(len(p)-n))
			clear(p[n:][:hole])
			n += int(hole)
			off += hole
			continue
		}
		m := copy(p[n:], b)
		n += m
		off += int64(m)
	}
	return n, nil
}

// at returns the content from off to the end of its block; nil is a hole.
func (f *imageFile) at(off int64) ([]byte, error) {
	ino, bs := f.info.ino, int64(f.img.sb.BlockSize)
	i := int(off / bs)
	if i >= len(ino.Blocks) {
		b, err := f.img.tail(ino)
		if err != nil {
			return nil, err
		}
		return b[off%bs:], nil
	}
	word := ino.Blocks[i]
	if word == 0 {
		return nil, nil
	}
	b, err := f.img.block(f.offset(i), word)
	if err != nil {
		return nil, err
	}
	if want := ino.blockLen(i, bs); int64(len(b)) != want {
		return nil, corruptf("block %d has %d bytes, want %d", i, len(b), want)
	}
	return b[off%bs:], nil
}

// offset returns where block i begins in the image.
func (f *imageFile) offset(i int) int64 {
	f.once.Do(func() {
		ino := f.info.ino
		f.offsets = make([]int64, len(ino.Blocks))
		pos := ino.Start
		for i, w := range ino.Blocks {
			f.offsets[i] = pos
			n, _ := dataWordSize(w)
			pos += int64(n)
		}
	})
	return f.offsets[i]
}
