// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"fmt"
	"io/fs"
)

// inodeType is the first field of an inode. Extended kinds are the basic ones
// plus seven.
type inodeType uint16

const (
	typeDir     inodeType = 1
	typeFile    inodeType = 2
	typeSymlink inodeType = 3
	typeBlock   inodeType = 4
	typeChar    inodeType = 5
	typeFifo    inodeType = 6
	typeSocket  inodeType = 7

	typeExtDir     inodeType = 8
	typeExtFile    inodeType = 9
	typeExtSymlink inodeType = 10
	typeExtBlock   inodeType = 11
	typeExtChar    inodeType = 12
	typeExtFifo    inodeType = 13
	typeExtSocket  inodeType = 14

	extendedDelta = 7
)

// basic returns the basic kind, which is what directory entries hold.
func (t inodeType) basic() inodeType {
	if t.extended() {
		return t - extendedDelta
	}
	return t
}

func (t inodeType) extended() bool { return t > typeSocket }
func (t inodeType) valid() bool    { return t >= typeDir && t <= typeExtSocket }

// fsMode returns the io/fs type bits.
func (t inodeType) fsMode() fs.FileMode {
	switch t.basic() {
	case typeDir:
		return fs.ModeDir
	case typeSymlink:
		return fs.ModeSymlink
	case typeBlock:
		return fs.ModeDevice
	case typeChar:
		return fs.ModeDevice | fs.ModeCharDevice
	case typeFifo:
		return fs.ModeNamedPipe
	case typeSocket:
		return fs.ModeSocket
	}
	return 0
}

func (t inodeType) String() string {
	switch t.basic() {
	case typeDir:
		return "directory"
	case typeFile:
		return "file"
	case typeSymlink:
		return "symlink"
	case typeBlock:
		return "block device"
	case typeChar:
		return "character device"
	case typeFifo:
		return "fifo"
	case typeSocket:
		return "socket"
	}
	return fmt.Sprintf("inode type %d", uint16(t))
}

// inodeRecord is an inode as it stands in the inode table. Which fields count
// depends on Type; the zero value of the others is ignored.
type inodeRecord struct {
	Type     inodeType
	Mode     uint16 // permission bits with setuid, setgid and sticky: 0..07777
	UIDIndex uint16 // into the id table
	GIDIndex uint16
	MTime    uint32
	Number   uint32 // 1..superblock.Inodes
	NLink    uint32 // not stored in basic files, where it is one
	Xattr    uint32 // extended kinds: index into the xattr id table, or noXattr

	// Files. Directories use Start for the metadata block of their listing,
	// relative to the directory table, and Size for its length + dirSizeBias.
	Start      uint64 // byte offset of the first data block in the image
	Size       uint64
	Sparse     uint64 // extended files: bytes in holes, informational
	Fragment   uint32 // index into the fragment table, or noFragment
	FragOffset uint32 // where the tail begins in the fragment block
	Blocks     []uint32

	// Directories.
	DirOffset  uint16 // of the listing in its first metadata block
	Parent     uint32 // inode number; of the root: Inodes + 1
	IndexCount uint16 // decoded count; append uses len(Index)
	Index      []dirIndex

	Target string // symlinks
	Rdev   uint32 // devices, in the kernel's new_encode_dev form
}

// needsExtended tells whether a basic inode cannot hold the record.
func (r *inodeRecord) needsExtended() bool {
	if r.Xattr != noXattr {
		return true
	}
	switch r.Type.basic() {
	case typeDir:
		return r.Size > maxBasicDirSize || len(r.Index) > 0
	case typeFile:
		return r.NLink > 1 || r.Start > 0xffffffff || r.Size > maxBasicFileSize || r.Sparse > 0
	}
	return false
}

// blockCount returns the number of size words behind a file's inode.
func blockCount(size uint64, fragment, blockSize uint32) uint64 {
	n := size / uint64(blockSize)
	if fragment == noFragment && size%uint64(blockSize) != 0 {
		n++
	}
	return n
}

// append appends the record to dst. It refuses fields the chosen Type cannot
// hold; the caller adds the path.
func (r *inodeRecord) append(dst []byte) ([]byte, error) {
	if err := r.check(); err != nil {
		return dst, err
	}
	le := binary.LittleEndian
	u16 := func(v uint16) { dst = le.AppendUint16(dst, v) }
	u32 := func(v uint32) { dst = le.AppendUint32(dst, v) }
	u64 := func(v uint64) { dst = le.AppendUint64(dst, v) }

	u16(uint16(r.Type))
	u16(r.Mode)
	u16(r.UIDIndex)
	u16(r.GIDIndex)
	u32(r.MTime)
	u32(r.Number)
	switch r.Type {
	case typeDir:
		u32(uint32(r.Start))
		u32(r.NLink)
		u16(uint16(r.Size))
		u16(r.DirOffset)
		u32(r.Parent)
	case typeExtDir:
		u32(r.NLink)
		u32(uint32(r.Size))
		u32(uint32(r.Start))
		u32(r.Parent)
		u16(uint16(len(r.Index)))
		u16(r.DirOffset)
		u32(r.Xattr)
		for _, x := range r.Index {
			dst = x.append(dst)
		}
	case typeFile:
		u32(uint32(r.Start))
		u32(r.Fragment)
		u32(r.FragOffset)
		u32(uint32(r.Size))
		for _, w := range r.Blocks {
			u32(w)
		}
	case typeExtFile:
		u64(r.Start)
		u64(r.Size)
		u64(r.Sparse)
		u32(r.NLink)
		u32(r.Fragment)
		u32(r.FragOffset)
		u32(r.Xattr)
		for _, w := range r.Blocks {
			u32(w)
		}
	case typeSymlink, typeExtSymlink:
		u32(r.NLink)
		u32(uint32(len(r.Target)))
		dst = append(dst, r.Target...)
	case typeBlock, typeChar, typeExtBlock, typeExtChar:
		u32(r.NLink)
		u32(r.Rdev)
	default: // fifo, socket
		u32(r.NLink)
	}
	if r.Type >= typeExtSymlink {
		u32(r.Xattr)
	}
	return dst, nil
}

// check refuses what append would have to cut.
func (r *inodeRecord) check() error {
	if !r.Type.valid() {
		return fmt.Errorf("inode type %d does not exist", r.Type)
	}
	if r.Mode > 0o7777 {
		return fmt.Errorf("mode %#o has more than the 12 permission bits", r.Mode)
	}
	if !r.Type.extended() && r.needsExtended() {
		return fmt.Errorf("a basic %v inode cannot hold this %v", r.Type, r.Type)
	}
	switch r.Type.basic() {
	case typeDir:
		if r.Start > 0xffffffff || r.Size > 0xffffffff {
			return fmt.Errorf("directory listing of %d bytes at %d of the directory table: the limit is 4 GiB", r.Size, r.Start)
		}
		if r.DirOffset >= metaBlockSize {
			return fmt.Errorf("directory offset %d: the limit is %d", r.DirOffset, metaBlockSize-1)
		}
		if len(r.Index) > 0xffff {
			return fmt.Errorf("%d directory index entries: the limit is 65535", len(r.Index))
		}
	case typeSymlink:
		if n := len(r.Target); n == 0 || n > maxSymlinkLen {
			return fmt.Errorf("symlink target of %d bytes: want 1 to %d", n, maxSymlinkLen)
		}
	}
	return nil
}

// blockListChunk bounds what is allocated for a block list before its words
// have been seen to exist.
const blockListChunk = 1024 // words

// decodeInode reads one inode record. Block sizes and the length of the block
// list are checked against blockSize; the directory index is left unread, the
// source then stands at its first entry.
func decodeInode(src *metaCursor, blockSize uint32) (r inodeRecord, err error) {
	le := binary.LittleEndian
	b, err := src.take(16)
	if err != nil {
		return r, err
	}
	r = inodeRecord{
		Type:     inodeType(le.Uint16(b)),
		Mode:     le.Uint16(b[2:]),
		UIDIndex: le.Uint16(b[4:]),
		GIDIndex: le.Uint16(b[6:]),
		MTime:    le.Uint32(b[8:]),
		Number:   le.Uint32(b[12:]),
		NLink:    1,
		Xattr:    noXattr,
		Fragment: noFragment,
	}
	if !r.Type.valid() {
		return r, corruptf("inode type %d does not exist", r.Type)
	}
	if r.Mode > 0o7777 {
		// The kernel takes the type bits from the inode type; a writer that
		// also puts them here is tolerated as it is there.
		r.Mode &= 0o7777
	}
	if b, err = src.take(r.Type.fixedLen()); err != nil {
		return r, err
	}
	switch r.Type {
	case typeDir:
		r.Start = uint64(le.Uint32(b))
		r.NLink = le.Uint32(b[4:])
		r.Size = uint64(le.Uint16(b[8:]))
		r.DirOffset = le.Uint16(b[10:])
		r.Parent = le.Uint32(b[12:])
	case typeExtDir:
		r.NLink = le.Uint32(b)
		r.Size = uint64(le.Uint32(b[4:]))
		r.Start = uint64(le.Uint32(b[8:]))
		r.Parent = le.Uint32(b[12:])
		r.IndexCount = le.Uint16(b[16:])
		r.DirOffset = le.Uint16(b[18:])
		r.Xattr = le.Uint32(b[20:])
	case typeFile:
		r.Start = uint64(le.Uint32(b))
		r.Fragment = le.Uint32(b[4:])
		r.FragOffset = le.Uint32(b[8:])
		r.Size = uint64(le.Uint32(b[12:]))
		err = r.decodeBlocks(src, blockSize)
	case typeExtFile:
		r.Start = le.Uint64(b)
		r.Size = le.Uint64(b[8:])
		r.Sparse = le.Uint64(b[16:])
		r.NLink = le.Uint32(b[24:])
		r.Fragment = le.Uint32(b[28:])
		r.FragOffset = le.Uint32(b[32:])
		r.Xattr = le.Uint32(b[36:])
		err = r.decodeBlocks(src, blockSize)
	case typeSymlink, typeExtSymlink:
		r.NLink = le.Uint32(b)
		err = r.decodeTarget(src, le.Uint32(b[4:]))
	case typeBlock, typeChar, typeExtBlock, typeExtChar:
		r.NLink = le.Uint32(b)
		r.Rdev = le.Uint32(b[4:])
		if r.Type.extended() {
			r.Xattr = le.Uint32(b[8:])
		}
	default: // fifo, socket
		r.NLink = le.Uint32(b)
		if r.Type.extended() {
			r.Xattr = le.Uint32(b[4:])
		}
	}
	return r, err
}

// fixedLen is the length of the fields between the common header and the
// variable part.
func (t inodeType) fixedLen() int {
	switch t {
	case typeDir, typeFile:
		return 16
	case typeExtDir:
		return 24
	case typeExtFile:
		return 40
	case typeExtBlock, typeExtChar:
		return 12
	case typeSymlink, typeExtSymlink, typeBlock, typeChar, typeExtFifo, typeExtSocket:
		return 8
	}
	return 4 // fifo, socket
}

func (r *inodeRecord) decodeBlocks(src *metaCursor, blockSize uint32) error {
	if r.Fragment != noFragment && r.Size%uint64(blockSize) == 0 {
		return corruptf("file of %d bytes has a fragment but no tail for it", r.Size)
	}
	left := blockCount(r.Size, r.Fragment, blockSize)
	r.Blocks = make([]uint32, 0, min(left, blockListChunk))
	for left > 0 {
		n := min(left, blockListChunk)
		b, err := src.take(int(n) * 4)
		if err != nil {
			return fmt.Errorf("block list of a file of %d bytes: %w", r.Size, err)
		}
		for i := 0; i < len(b); i += 4 {
			w := binary.LittleEndian.Uint32(b[i:])
			if err := checkDataWord(w, blockSize); err != nil {
				return err
			}
			r.Blocks = append(r.Blocks, w)
		}
		left -= n
	}
	return nil
}

func (r *inodeRecord) decodeTarget(src *metaCursor, n uint32) error {
	if n == 0 || n > maxSymlinkLen {
		return corruptf("symlink target of %d bytes", n)
	}
	b, err := src.take(int(n))
	if err != nil {
		return err
	}
	r.Target = string(b)
	if !r.Type.extended() {
		return nil
	}
	if b, err = src.take(4); err != nil {
		return err
	}
	r.Xattr = binary.LittleEndian.Uint32(b)
	return nil
}
