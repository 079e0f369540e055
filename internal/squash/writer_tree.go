// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFileBlocks bounds the block list of one file, which is held in memory
// while the file is written: 2 TiB at the default block size. Only sparse
// files get there.
const maxFileBlocks = 1 << 24

// inode is what the writer keeps of an inode between the walk and its inode
// record. A tree may have millions, so it is kept small.
type inode struct {
	content Content
	target  string
	dir     *directory
	size    int64
	number  uint32
	nlink   uint32
	xattr   uint32
	mtime   uint32
	rdev    uint32
	typ     inodeType
	mode    uint16
	uid     uint16 // indexes into the id table
	gid     uint16
	packed  bool // its inode record is written, or about to be
}

type directory struct {
	parent  *inode
	entries []dirent
}

// dirent is one name of an inode.
type dirent struct {
	name string
	ino  *inode
}

// inventory is the result of walking a source.
type inventory struct {
	opt      *Options
	root     *inode
	inodes   int64
	files    int64
	bytes    int64            // content of all files
	sizes    map[int64]uint32 // how many files have a size: only those with company can be duplicates
	ids      idTable
	xattrs   *xattrTable
	warnings warnings

	links map[LinkID]*inode
	stack []*inode // the open directories of the walk
	last  []string // in each, the last name seen
}

// scan walks the source and numbers the inodes.
func (t *inventory) scan(ctx context.Context, src Source) error {
	t.sizes = map[int64]uint32{}
	t.links = map[LinkID]*inode{}
	if err := src.Walk(ctx, t.add); err != nil {
		return err
	}
	if t.root == nil {
		return errors.New("the source has no root directory")
	}
	if t.inodes >= math.MaxUint32 {
		return fmt.Errorf("%d inodes: the limit is %d", t.inodes, uint32(math.MaxUint32-1))
	}
	t.links, t.stack, t.last = nil, nil, nil
	t.root.number = 1
	next := uint32(2)
	number(t.root, &next)
	return nil
}

// number gives the inodes of each directory neighbouring numbers, because
// directory entries hold small differences.
func number(d *inode, next *uint32) {
	for _, e := range d.dir.entries {
		if e.ino.number == 0 {
			e.ino.number = *next
			*next++
		}
	}
	for _, e := range d.dir.entries {
		if e.ino.dir != nil {
			number(e.ino, next)
		}
	}
}

// add takes one entry of the walk.
func (t *inventory) add(e *Entry) error {
	parent, name, err := t.place(e)
	if err != nil {
		return err
	}
	if e.Note != "" {
		t.warnings.add(e.Path, e.Note)
	}
	isDir := e.Mode&unix.S_IFMT == unix.S_IFDIR
	if isDir && e.Link != (LinkID{}) {
		return fmt.Errorf("%s: a directory cannot have hard links", e.Path)
	}
	ino := t.links[e.Link]
	if ino == nil {
		if ino, err = t.newInode(e); err != nil {
			return err
		}
		if e.Link != (LinkID{}) {
			t.links[e.Link] = ino
		}
	} else if ino.nlink == math.MaxUint32 {
		return fmt.Errorf("%s: more than %d hard links", e.Path, uint32(math.MaxUint32))
	} else {
		ino.nlink++
	}
	if parent == nil {
		t.root = ino
	} else {
		parent.dir.entries = append(parent.dir.entries, dirent{name, ino})
		if isDir {
			parent.nlink++
		}
	}
	if isDir {
		ino.nlink = 2
		ino.dir = &directory{parent: parent}
		t.stack = append(t.stack, ino)
		t.last = append(t.last, "")
	}
	return nil
}

// place finds the directory an entry belongs to, and holds the source to the
// order it promises: the packer would otherwise write an image whose lookups
// fail.
func (t *inventory) place(e *Entry) (parent *inode, name string, err error) {
	if e.Path == "." {
		if t.root != nil || e.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, "", errors.New("the root must come first in the walk, and be a directory")
		}
		return nil, "", nil
	}
	dir, name := path.Split(e.Path)
	depth := strings.Count(dir, "/") + 1
	if depth > len(t.stack) {
		return nil, "", fmt.Errorf("%s: came before its directory in the walk", e.Path)
	}
	clear(t.stack[depth:])
	t.stack, t.last = t.stack[:depth], t.last[:depth]
	// A path that only has the right depth would have to follow another
	// directory of that depth, whose own name came later than this one's.
	if want := strings.Join(t.last[:depth-1], "/"); strings.TrimSuffix(dir, "/") != want {
		return nil, "", fmt.Errorf("%s: walked out of order, inside directory %q", e.Path, want)
	}
	switch {
	case name == "" || name == "." || name == ".." || strings.ContainsRune(name, 0):
		return nil, "", fmt.Errorf("%q: %q cannot be a name", e.Path, name)
	case len(name) > maxNameLen:
		return nil, "", fmt.Errorf("%s: name of %d bytes: the limit is %d", e.Path, len(name), maxNameLen)
	case name <= t.last[depth-1]:
		return nil, "", fmt.Errorf("%s: came after %q in the walk: names must be unique and in byte order", e.Path, t.last[depth-1])
	}
	name = strings.Clone(name) // the path is not kept
	t.last[depth-1] = name
	return t.stack[depth-1], name, nil
}

var inodeTypes = map[uint32]inodeType{
	unix.S_IFDIR: typeDir, unix.S_IFREG: typeFile, unix.S_IFLNK: typeSymlink, unix.S_IFBLK: typeBlock,
	unix.S_IFCHR: typeChar, unix.S_IFIFO: typeFifo, unix.S_IFSOCK: typeSocket,
}

// newInode makes an entry's inode, refusing what the format cannot hold.
func (t *inventory) newInode(e *Entry) (*inode, error) {
	ino := &inode{nlink: 1, typ: inodeTypes[e.Mode&unix.S_IFMT], mode: uint16(e.Mode & 0o7777)}
	var err error
	if ino.uid, err = t.ids.index(e.UID); err == nil {
		ino.gid, err = t.ids.index(e.GID)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.Path, err)
	}
	ino.mtime = t.mtime(e)
	switch ino.typ {
	case typeDir, typeFifo, typeSocket:
	case typeFile:
		if err := t.addFile(e, ino); err != nil {
			return nil, err
		}
	case typeSymlink:
		if n := len(e.Target); n == 0 || n > maxSymlinkLen {
			return nil, fmt.Errorf("%s: symlink target of %d bytes: want 1 to %d", e.Path, n, maxSymlinkLen)
		}
		ino.target = e.Target
	case typeBlock, typeChar:
		if e.Major > 0xfff || e.Minor > 0xfffff {
			return nil, fmt.Errorf("%s: device %d:%d: the limits are 4095:1048575", e.Path, e.Major, e.Minor)
		}
		// new_encode_dev of the kernel
		ino.rdev = e.Minor&0xff | e.Major<<8 | (e.Minor&^0xff)<<12
	default:
		return nil, fmt.Errorf("%s: mode %#o is of no known type", e.Path, e.Mode)
	}
	var lost []string
	ino.xattr, lost, err = t.xattrs.add(e.Xattrs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.Path, err)
	}
	for _, name := range lost {
		t.warnings.add(e.Path, "extended attribute "+name+" left out: SquashFS holds user., trusted. and security. only")
	}
	t.inodes++
	return ino, nil
}

func (t *inventory) addFile(e *Entry, ino *inode) error {
	blockSize := int64(t.opt.BlockSize)
	if e.Size < 0 || (e.Size-1)/blockSize >= maxFileBlocks {
		return fmt.Errorf("%s: size %d: the limit is %d with blocks of %d bytes: choose larger blocks or leave the file out",
			e.Path, e.Size, maxFileBlocks*blockSize, blockSize)
	}
	if e.Content == nil {
		return fmt.Errorf("%s: the source gave no content", e.Path)
	}
	if t.bytes+e.Size < t.bytes {
		return fmt.Errorf("%s: the files are larger than %d bytes together", e.Path, int64(math.MaxInt64))
	}
	ino.size, ino.content = e.Size, e.Content
	t.files++
	t.bytes += e.Size
	t.sizes[e.Size]++
	return nil
}

// mtime returns the time an inode gets.
func (t *inventory) mtime(e *Entry) uint32 {
	sec := e.Mtime
	if t.opt.Epoch != nil {
		sec = min(sec, t.opt.Epoch.Unix())
	}
	if m := clampTime(sec); int64(m) != sec {
		t.warnings.add(e.Path, fmt.Sprintf("modification time %d s became %d: SquashFS holds 1970 to 2106 only", sec, m))
	}
	return clampTime(sec)
}

// clampTime puts seconds since 1970 into the 32 bits of the format.
func clampTime(sec int64) uint32 { return uint32(min(max(sec, 0), math.MaxUint32)) }

// idTable numbers user and group ids, which share one table.
type idTable struct {
	ids     []uint32
	indexes map[uint32]uint16
}

func (t *idTable) index(id uint32) (uint16, error) {
	if i, ok := t.indexes[id]; ok {
		return i, nil
	}
	if len(t.ids) == maxIDs {
		return 0, fmt.Errorf("user or group id %d is one too many: the limit is %d different ones in an image", id, maxIDs)
	}
	if t.indexes == nil {
		t.indexes = map[uint32]uint16{}
	}
	i := uint16(len(t.ids))
	t.ids = append(t.ids, id)
	t.indexes[id] = i
	return i, nil
}

// warnings collects what the user should know. It does not grow without bound
// with a tree where every file has the same flaw.
type warnings struct {
	list []string
	more int
}

const maxWarnings = 1000

func (w *warnings) add(path, text string) {
	if len(w.list) == maxWarnings {
		w.more++
		return
	}
	w.list = append(w.list, path+": "+text)
}

func (w *warnings) all() []string {
	if w.more > 0 {
		return append(w.list, fmt.Sprintf("%d more of this kind", w.more))
	}
	return w.list
}
