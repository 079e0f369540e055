// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
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

// inode is what the writer knows of an inode on its way into the image.
type inode struct {
	name    string // the first of its names
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
	base    inodeRef // of a file that keeps the data it has in the base, or noRef
}

type directory struct {
	parent uint32 // inode number; zero for the root
	listed int64  // bytes that what is in it takes in writer.entries
}

// inventory is the result of walking a source: a record for each name, in the
// order of the walk.
type inventory struct {
	opt       *Options
	src       Source
	records   recordLog
	contents  []Content // of a source that is no ContentKeeper
	baseImage *Image    // that files have their content from
	inodes    int64
	files     int64
	bytes     int64 // content of all files
	data      int64 // what of it is not known to be holes
	sizes     sizeSet
	ids       idTable
	xattrs    *xattrTable
	warnings  warnings
	linked    *table // linkedInodes by LinkID

	// With a base, for each file in the order of the walk: the inode there
	// whose data it keeps, or noRef. What is changed is to be looked for there.
	kept    []inodeRef
	changed []changedFile
	taken   int // files taken from the records

	last    []string // the last name seen in each open directory of the walk
	scratch []byte

	number uint32 // of the last inode taken from the records
}

// linkedInode is what is known of an inode that may have several names: behind
// its LinkID the number of names, then its own number, zero before its first name
// is taken from the records, and its type.
type linkedInode []byte

const (
	linkIDSize      = 16
	linkedInodeSize = linkIDSize + 9
)

func (l linkedInode) nlink() uint32  { return binary.LittleEndian.Uint32(l[linkIDSize:]) }
func (l linkedInode) number() uint32 { return binary.LittleEndian.Uint32(l[linkIDSize+4:]) }
func (l linkedInode) typ() inodeType { return inodeType(l[linkIDSize+8]) }

func (l linkedInode) addName() { binary.LittleEndian.PutUint32(l[linkIDSize:], l.nlink()+1) }

func (l linkedInode) set(number uint32, typ inodeType) {
	binary.LittleEndian.PutUint32(l[linkIDSize+4:], number)
	l[linkIDSize+8] = byte(typ)
}

func (t *inventory) link(i int) linkedInode { return t.linked.at(i) }

// scan walks the source.
func (t *inventory) scan(ctx context.Context, src Source) error {
	t.src = src
	if err := src.Walk(ctx, t.add); err != nil {
		return err
	}
	if t.inodes == 0 {
		return errors.New("the source has no root directory")
	}
	if t.inodes >= math.MaxUint32 {
		return fmt.Errorf("%d inodes: the limit is %d", t.inodes, uint32(math.MaxUint32-1))
	}
	t.last, t.scratch = nil, nil
	t.linked.freeze()
	return nil
}

// add takes one entry of the walk.
func (t *inventory) add(e *Entry) error {
	up, name, err := t.place(e)
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
	t.scratch = binary.AppendUvarint(t.scratch[:0], uint64(up))
	t.scratch = appendBytes(t.scratch, name)
	link, known := 0, false // one more than the place in linked
	if e.Link != (LinkID{}) {
		if link, known, err = t.noteLink(e); err != nil {
			return err
		}
	}
	t.scratch = binary.AppendUvarint(t.scratch, uint64(link))
	if !known {
		ino, err := t.newInode(e)
		if err != nil {
			return err
		}
		t.appendInode(ino)
	}
	if isDir {
		t.last = append(t.last, "")
	}
	return t.records.add(t.scratch)
}

// noteLink counts a name of an inode that may have several. It returns one more
// than the inode's place in linked.
func (t *inventory) noteLink(e *Entry) (link int, known bool, err error) {
	var id [linkIDSize]byte
	binary.LittleEndian.PutUint64(id[:], e.Link.Dev)
	binary.LittleEndian.PutUint64(id[8:], e.Link.Ino)
	i, known := t.linked.find(id[:])
	if !known {
		if i, err = t.linked.add(id[:]); err != nil {
			return 0, false, err
		}
	}
	l := t.link(i)
	if l.nlink() == math.MaxUint32 {
		return 0, false, fmt.Errorf("%s: more than %d hard links", e.Path, uint32(math.MaxUint32))
	}
	l.addName()
	return i + 1, known, nil
}

// appendInode appends what next makes the inode from.
func (t *inventory) appendInode(ino *inode) {
	b := append(t.scratch, byte(ino.typ))
	for _, v := range []uint64{uint64(ino.mode), uint64(ino.uid), uint64(ino.gid), uint64(ino.mtime), uint64(ino.xattr + 1), uint64(ino.rdev), uint64(ino.size)} {
		b = binary.AppendUvarint(b, v)
	}
	switch ino.typ {
	case typeSymlink:
		b = appendBytes(b, ino.target)
	case typeFile:
		ref := uint64(0)
		inBase, ok := ino.content.(*baseContent)
		if ok {
			t.baseImage, ref = inBase.img, uint64(inBase.ref)+1
		}
		b = binary.AppendUvarint(b, ref)
		if ok {
			break
		}
		if keeper, ok := t.src.(ContentKeeper); ok {
			b = keeper.KeepContent(b, ino.content)
		} else {
			b = binary.AppendUvarint(b, uint64(len(t.contents)))
			t.contents = append(t.contents, ino.content)
		}
	}
	t.scratch = b
}

// treeRecord is one name of the tree.
type treeRecord struct {
	up    int // how many directories end before it
	ino   *inode
	again bool // the name is a further one of the inode, of which only number and type are given
}

// next takes the next name from the records; dir is the path of a directory so
// many levels up.
func (t *inventory) next(dir func(up int) string) (rec treeRecord, ok bool, err error) {
	r, err := t.records.next()
	if r == nil || err != nil {
		return rec, false, err
	}
	rec.up = int(r.uint())
	name := string(r.bytes())
	var linked linkedInode
	if link := r.uint(); link > 0 {
		linked = t.link(int(link - 1))
		if linked.number() > 0 {
			rec.ino, rec.again = &inode{name: name, number: linked.number(), typ: linked.typ()}, true
			return rec, true, nil
		}
	}
	t.number++
	ino := &inode{name: name, number: t.number, nlink: 1, typ: inodeType(r.rest[0])}
	r.rest = r.rest[1:]
	ino.mode, ino.uid, ino.gid = uint16(r.uint()), uint16(r.uint()), uint16(r.uint())
	ino.mtime, ino.xattr, ino.rdev, ino.size = uint32(r.uint()), uint32(r.uint())-1, uint32(r.uint()), int64(r.uint())
	switch ino.typ {
	case typeSymlink:
		ino.target = string(r.bytes())
	case typeFile:
		ino.base = noRef
		if t.kept != nil {
			ino.base = t.kept[t.taken]
			t.taken++
		}
		if ref := r.uint(); ref > 0 {
			ino.content = &baseContent{img: t.baseImage, ref: inodeRef(ref - 1)}
		} else if keeper, ok := t.src.(ContentKeeper); ok {
			ino.content, r.rest = keeper.KeptContent(path.Join(dir(rec.up), name), ino.size, r.rest)
		} else {
			i := r.uint()
			ino.content, t.contents[i] = t.contents[i], nil
		}
	}
	if linked != nil {
		linked.set(ino.number, ino.typ)
		ino.nlink = linked.nlink()
	}
	rec.ino = ino
	return rec, true, nil
}

// place finds the directory an entry belongs to, and holds the source to the
// order it promises: the packer would otherwise write an image whose lookups
// fail. It returns how many directories of the walk end here.
func (t *inventory) place(e *Entry) (up int, name string, err error) {
	if e.Path == "." {
		if t.inodes > 0 || e.Mode&unix.S_IFMT != unix.S_IFDIR {
			return 0, "", errors.New("the root must come first in the walk, and be a directory")
		}
		return 0, "", nil
	}
	dir, name := path.Split(e.Path)
	depth := strings.Count(dir, "/") + 1
	if depth > len(t.last) {
		return 0, "", fmt.Errorf("%s: came before its directory in the walk", e.Path)
	}
	up = len(t.last) - depth
	t.last = t.last[:depth]
	// A path that only has the right depth would have to follow another
	// directory of that depth, whose own name came later than this one's.
	if want := strings.Join(t.last[:depth-1], "/"); strings.TrimSuffix(dir, "/") != want {
		return 0, "", fmt.Errorf("%s: walked out of order, inside directory %q", e.Path, want)
	}
	switch {
	case name == "" || name == "." || name == ".." || strings.ContainsRune(name, 0):
		return 0, "", fmt.Errorf("%q: %q cannot be a name", e.Path, name)
	case len(name) > maxNameLen:
		return 0, "", fmt.Errorf("%s: name of %d bytes: the limit is %d", e.Path, len(name), maxNameLen)
	case name <= t.last[depth-1]:
		return 0, "", fmt.Errorf("%s: came after %q in the walk: names must be unique and in byte order", e.Path, t.last[depth-1])
	}
	t.last[depth-1] = name
	return up, name, nil
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
	t.noteBase(e)
	t.files++
	t.bytes += e.Size
	t.data += e.Size - min(max(e.Holes, 0), e.Size)
	t.sizes.add(e.Size)
	return nil
}

// sizeSet tells which sizes more than one file has: only those can be
// duplicates. Sizes that are equal modulo its length count as one, which costs
// the digest of a file now and then.
type sizeSet struct{ once, again [1 << 16]uint64 }

func sizeBit(size int64) (word int, bit uint64) { return int(size >> 6 & 0xffff), 1 << (size & 63) }

func (s *sizeSet) add(size int64) {
	word, bit := sizeBit(size)
	s.again[word] |= s.once[word] & bit
	s.once[word] |= bit
}

func (s *sizeSet) shared(size int64) bool {
	word, bit := sizeBit(size)
	return s.again[word]&bit != 0
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
