// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// LayersOptions says more of an overlay.
type LayersOptions struct {
	// Work is the overlay's work directory. It is needed for trees mounted with
	// index=on: there the names of a hard-linked file that were not touched
	// lead to its changed inode by way of the index kept there.
	Work string
	// Exclude and SpoolDir are as in DirOptions.
	Exclude  func(path string) bool
	SpoolDir string
}

// LayersSource returns the tree that overlayfs shows when an image is mounted as
// its only lower layer below the directory upper; nothing needs to be mounted,
// and nothing may be. Files that are only in the image are not read.
//
// Whiteouts, opaque directories and the inode index mean what they mean to the
// kernel (Documentation/filesystems/overlayfs.rst), with the attributes of both
// mount options, trusted.overlay. and user.overlay. A redirected directory or a
// file whose data was not copied up, which only mounts with redirect_dir or
// metacopy make, is an error.
func LayersSource(base *Image, upper string, opt LayersOptions) (Source, error) {
	up, err := DirSource(upper, DirOptions{SpoolDir: opt.SpoolDir})
	if err != nil {
		return nil, err
	}
	s := &layersSource{base: base, upper: up.(*dirSource), opt: opt}
	if opt.Work != "" {
		if err := s.readIndex(path.Join(opt.Work, "index")); err != nil {
			s.Close()
			return nil, fmt.Errorf("index of the overlay: %w", err)
		}
	}
	return s, nil
}

type layersSource struct {
	base  *Image
	upper *dirSource
	opt   LayersOptions

	seen visits // of base

	index *dirSource        // nil if there is none
	moved map[uint32]string // inode number in the image: name in the index
}

func (s *layersSource) Close() error {
	err := s.upper.Close()
	if s.index != nil {
		err = errors.Join(err, s.index.Close())
	}
	return err
}

// readIndex notes which hard-linked inodes of the image were changed.
func (s *layersSource) readIndex(dir string) error {
	index, err := DirSource(dir, DirOptions{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	s.index, s.moved = index.(*dirSource), map[uint32]string{}
	fd, err := openDir(s.index.fd, ".")
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if number, ok := IndexedInode(name); ok {
			s.moved[number] = name
		}
	}
	return nil
}

// IndexedInode reads the name of an entry in the index of an overlay's work
// directory, which holds the changed inode of a file with several names. It
// returns the inode's number in the image. The name is, in hexadecimal, a struct
// ovl_fb (fs/overlayfs/overlayfs.h) with the file handle of the inode in the lower
// layer. That of SquashFS is the inode number and a generation of zero.
func IndexedInode(name string) (uint32, bool) {
	const (
		version, magic = 0, 0xfb
		fileidIno32Gen = 1  // include/linux/exportfs.h
		header         = 21 // version, magic, length, flags, type, uuid
	)
	b, err := hex.DecodeString(name)
	if err != nil || len(b) < header+8 || b[0] != version || b[1] != magic || b[4] != fileidIno32Gen {
		return 0, false
	}
	return binary.NativeEndian.Uint32(b[header:]), true
}

// Walk implements Source.
func (s *layersSource) Walk(ctx context.Context, fn func(*Entry) error) error {
	root, err := s.base.Root()
	if err != nil {
		return errorAt(".", err)
	}
	s.seen = newVisits(s.base)
	if err := s.seen.note(root); err != nil {
		return errorAt(".", err)
	}
	if err := unix.Statx(s.upper.fd, "", unix.AT_EMPTY_PATH, statMask, &s.upper.rootSt); err != nil {
		return &fs.PathError{Op: "stat", Path: ".", Err: err}
	}
	e := Entry{Path: "."}
	if err := s.upper.fill(&e, s.upper.fd, ".", &s.upper.rootSt); err != nil {
		return err
	}
	if err := fn(&e); err != nil {
		return err
	}
	fd, err := openDir(s.upper.fd, ".")
	if err != nil {
		return &fs.PathError{Op: "open directory", Path: ".", Err: err}
	}
	defer unix.Close(fd)
	return s.walkDir(ctx, layers{fd, root}, ".", fn)
}

// layers is a directory in each layer: a descriptor or -1, an inode or nil.
type layers struct {
	upper int
	lower *Inode
}

// walkDir yields what is in a directory.
func (s *layersSource) walkDir(ctx context.Context, dir layers, at string, fn func(*Entry) error) error {
	if strings.Count(at, "/") >= maxDepth {
		return errorAt(at, errTooDeep)
	}
	names, err := s.names(dir, at)
	if err != nil {
		return err
	}
	defer names.done()
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name, inUpper, below, err := names.next()
		if err != nil || name == "" {
			return err
		}
		p := path.Join(at, name)
		if s.opt.Exclude != nil && s.opt.Exclude(p) {
			continue
		}
		var ino *Inode
		if below != nil {
			if ino, err = s.lower(*below); err != nil {
				return errorAt(p, err)
			}
		}
		if inUpper {
			err = s.walkUpper(ctx, dir.upper, name, p, ino, fn)
		} else {
			err = s.walkLower(ctx, p, ino, fn)
		}
		if err != nil {
			return err
		}
	}
}

// layerNames merges the names a directory has in both layers.
type layerNames struct {
	at    string
	upper *nameList // nil for none
	lower *listing  // nil for none

	name  string // next in upper, or empty
	entry *dirEntry
}

func (s *layersSource) names(dir layers, at string) (*layerNames, error) {
	n := &layerNames{at: at}
	var err error
	if dir.upper >= 0 {
		if n.upper, err = s.upper.names.read(dir.upper); err != nil {
			return nil, &fs.PathError{Op: "read directory", Path: at, Err: err}
		}
	}
	if dir.lower != nil {
		if n.lower, err = s.base.openListing(dir.lower); err != nil {
			return nil, errorAt(at, err)
		}
	}
	if err = n.nextUpper(); err == nil {
		err = n.nextLower()
	}
	return n, err
}

func (n *layerNames) nextUpper() (err error) {
	if n.name = ""; n.upper != nil {
		n.name, _, err = n.upper.next()
	}
	return err
}

func (n *layerNames) nextLower() error {
	if n.entry = nil; n.lower == nil {
		return nil
	}
	e, ok, err := n.lower.next()
	if err != nil {
		return errorAt(n.at, err)
	}
	if ok {
		n.entry = &e
	}
	return nil
}

// next returns the next name, empty at the end, and where it is.
func (n *layerNames) next() (name string, inUpper bool, below *dirEntry, err error) {
	name, inUpper = n.name, n.name != ""
	if n.entry != nil && (!inUpper || n.entry.Name <= name) {
		inUpper = n.entry.Name == name
		name, below = n.entry.Name, n.entry
		err = n.nextLower()
	}
	if inUpper && err == nil {
		err = n.nextUpper()
	}
	return name, inUpper, below, err
}

func (n *layerNames) done() {
	if n.upper != nil {
		n.upper.done()
	}
}

// lower reads an inode of the image.
func (s *layersSource) lower(e dirEntry) (*Inode, error) {
	ino, err := s.base.entryInode(e)
	if err != nil || !ino.IsDir() {
		return ino, err
	}
	return ino, s.seen.note(ino)
}

// walkUpper yields a name that is in the upper layer; lower is what the image
// has there, or nil.
func (s *layersSource) walkUpper(ctx context.Context, dirFD int, name, p string, lower *Inode, fn func(*Entry) error) error {
	var st unix.Statx_t
	if err := unix.Statx(dirFD, name, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil {
		return vanished("stat", p, err)
	}
	marks, err := readMarks(dirFD, name)
	if err != nil {
		return vanished("read overlay attributes", p, err)
	}
	kind := st.Mode & unix.S_IFMT
	switch {
	case kind == unix.S_IFCHR && st.Rdev_major == 0 && st.Rdev_minor == 0, marks.whiteout && kind == unix.S_IFREG && st.Size == 0:
		return nil
	case marks.redirect:
		return fmt.Errorf("%s: overlayfs was mounted with redirect_dir: move the directory by copying, or unpack the image", p)
	case marks.metacopy:
		return fmt.Errorf("%s: overlayfs was mounted with metacopy, and the file's content was not copied up: unpack the image instead", p)
	}
	e := Entry{Path: p}
	if err := s.upper.fill(&e, dirFD, name, &st); err != nil {
		return err
	}
	if kind == unix.S_IFREG {
		e.Content = s.upper.contentOf(p, &st)
	}
	if err := fn(&e); err != nil || kind != unix.S_IFDIR {
		return err
	}
	if marks.opaque || lower != nil && !lower.IsDir() {
		lower = nil
	}
	fd, err := openDir(dirFD, name)
	if err != nil {
		return vanished("open directory", p, err)
	}
	defer unix.Close(fd)
	return s.walkDir(ctx, layers{fd, lower}, p, fn)
}

// walkLower yields a name that is in the image only.
func (s *layersSource) walkLower(ctx context.Context, p string, ino *Inode, fn func(*Entry) error) error {
	if ino.NLink > 1 && !ino.IsDir() {
		if name, ok := s.moved[ino.Number]; ok {
			return s.walkIndexed(p, name, fn)
		}
	}
	e := Entry{Path: p, Mode: inodeMode(ino), UID: ino.UID, GID: ino.GID, Mtime: int64(ino.MTime), Target: ino.Target}
	var err error
	if e.Xattrs, err = s.base.Xattrs(ino); err != nil {
		return errorAt(p, err)
	}
	e.Xattrs = slices.DeleteFunc(e.Xattrs, func(x Xattr) bool { return isOverlayXattr(x.Name) })
	switch ino.typ.basic() {
	case typeFile:
		e.Size, e.Content = ino.Size, &baseContent{img: s.base, ref: ino.ref}
	case typeBlock, typeChar:
		e.Major, e.Minor = unix.Major(ino.Rdev), unix.Minor(ino.Rdev)
	}
	if ino.NLink > 1 && !ino.IsDir() {
		e.Link = LinkID{Dev: lowerDev, Ino: uint64(ino.Number)}
	}
	if err := fn(&e); err != nil || !ino.IsDir() {
		return err
	}
	return s.walkDir(ctx, layers{-1, ino}, p, fn)
}

// lowerDev is the device of the image's inodes in a LinkID: none that a
// directory can have.
const lowerDev = 1<<64 - 1

// inodeMode is an inode's st_mode.
func inodeMode(ino *Inode) uint32 {
	for format, typ := range inodeTypes {
		if typ == ino.typ.basic() {
			return format | unixPerm(ino.Mode)
		}
	}
	return 0
}

// walkIndexed yields a name in the image whose inode was changed by another of
// its names.
func (s *layersSource) walkIndexed(p, name string, fn func(*Entry) error) error {
	var st unix.Statx_t
	if err := unix.Statx(s.index.fd, name, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil {
		return vanished("stat index entry of", p, err)
	}
	e := Entry{Path: p}
	if err := s.index.fill(&e, s.index.fd, name, &st); err != nil {
		return err
	}
	e.Link = linkID(&st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Content = s.index.contentOf(name, &st)
	case unix.S_IFDIR:
		return corruptf("%s: its entry in the overlay's index is a directory", p)
	}
	return fn(&e)
}

// KeepContent implements ContentKeeper.
func (s *layersSource) KeepContent(dst []byte, c Content) []byte {
	if d := c.(*dirContent); d.source == s.index {
		return s.index.KeepContent(appendBytes(dst, d.path), c)
	}
	return s.upper.KeepContent(appendBytes(dst, ""), c)
}

// KeptContent implements ContentKeeper.
func (s *layersSource) KeptContent(path string, size int64, b []byte) (Content, []byte) {
	r := recordReader{b}
	if name := string(r.bytes()); name != "" {
		return s.index.KeptContent(name, size, r.rest)
	}
	return s.upper.KeptContent(path, size, r.rest)
}

// overlayMarks are the attributes by which overlayfs notes what an inode in the
// upper layer means.
type overlayMarks struct{ opaque, whiteout, redirect, metacopy bool }

func readMarks(dirFD int, name string) (m overlayMarks, err error) {
	p := procPath(dirFD, name)
	list, err := growing(func(buf []byte) (int, error) { return unix.Llistxattr(p, buf) })
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			err = nil
		}
		return m, err
	}
	for key := range strings.SplitSeq(string(list), "\x00") {
		if !isOverlayXattr(key) {
			continue
		}
		switch _, mark, _ := strings.Cut(key, ".overlay."); mark {
		case "opaque":
			value, err := growing(func(buf []byte) (int, error) { return unix.Lgetxattr(p, key, buf) })
			if err != nil {
				return m, err
			}
			// "x" says that whiteouts in the directory may be attributes.
			m.opaque = m.opaque || string(value) == "y"
		case "whiteout":
			m.whiteout = true
		case "redirect":
			m.redirect = true
		case "metacopy":
			m.metacopy = true
		}
	}
	return m, nil
}
