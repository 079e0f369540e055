// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"io/fs"
	"math"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Inode is one inode of an image, checked against the image's tables. It is
// what Sys of a [fs.FileInfo] of the image returns. It must not be changed.
type Inode struct {
	Mode   fs.FileMode // type, permissions, setuid, setgid, sticky
	UID    uint32
	GID    uint32
	MTime  uint32 // seconds since 1970
	Number uint32 // 1 to Info.Inodes
	NLink  uint32 // as stored; one for files that cannot have more
	Size   int64  // of a file's content, or a symlink's target; else 0
	Target string // of a symlink
	Rdev   uint64 // of a device, as mknod(2) takes it

	// Where a file's data is, for programs that copy it as it stands.
	// Blocks holds the size words of the full blocks and, when there is no
	// fragment, of the tail: bits 0..23 are the length in the image, bit 24
	// means stored uncompressed, zero means a hole. The blocks follow each
	// other from byte Start of the image.
	Start      int64
	Blocks     []uint32
	Fragment   uint32 // index of the fragment block, or NoFragment
	FragOffset uint32 // of the tail in the unpacked fragment block

	ref   inodeRef
	xattr uint32
	typ   inodeType

	// Directories.
	listing    metaRef // into the directory table
	listingLen int64
	parent     uint32
	indexCount int
}

// NoFragment in Inode.Fragment says that a file has no tail in a fragment.
const NoFragment = noFragment

// ModTime returns the modification time; the format has whole seconds.
func (i *Inode) ModTime() time.Time { return time.Unix(int64(i.MTime), 0) }

// IsDir tells whether the inode is a directory.
func (i *Inode) IsDir() bool { return i.typ.basic() == typeDir }

// isFile tells whether the inode is a regular file.
func (i *Inode) isFile() bool { return i.typ.basic() == typeFile }

// tailLen is the number of bytes a file has in its fragment.
func (i *Inode) tailLen(blockSize int64) int64 {
	if i.Fragment == noFragment {
		return 0
	}
	return i.Size % blockSize
}

// dataLen is the number of bytes a file has outside of holes.
func (i *Inode) dataLen(blockSize int64) int64 {
	n := i.Size
	for b, w := range i.Blocks {
		if w == 0 {
			n -= min(blockSize, i.Size-int64(b)*blockSize)
		}
	}
	return n
}

// Root returns the image's root directory.
func (img *Image) Root() (*Inode, error) {
	ino, err := img.inode(img.sb.RootInode)
	if err != nil {
		return nil, err
	}
	if !ino.IsDir() {
		return nil, corruptf("the root inode is a %v", ino.typ)
	}
	return ino, nil
}

// inode reads and checks the inode at ref.
func (img *Image) inode(ref inodeRef) (*Inode, error) {
	c := metaCursor{img: img}
	if err := c.seek(img.inodes, ref); err != nil {
		return nil, err
	}
	r, err := decodeInode(&c, img.sb.BlockSize)
	if err != nil {
		return nil, err
	}
	ino, err := img.checkInode(&r)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", r.Number, err)
	}
	ino.ref = ref
	return ino, nil
}

// checkInode turns a record into an Inode.
func (img *Image) checkInode(r *inodeRecord) (*Inode, error) {
	if r.Number == 0 || r.Number > img.sb.Inodes {
		return nil, corruptf("the number is outside 1..%d", img.sb.Inodes)
	}
	if int(r.UIDIndex) >= len(img.ids) || int(r.GIDIndex) >= len(img.ids) {
		return nil, corruptf("owner %d:%d is outside the table of %d ids", r.UIDIndex, r.GIDIndex, len(img.ids))
	}
	if r.Xattr != noXattr && img.xattrIDs != nil && uint64(r.Xattr) >= img.xattrIDs.count {
		return nil, corruptf("xattr index %d is outside the table of %d", r.Xattr, img.xattrIDs.count)
	}
	ino := &Inode{
		Mode:     r.Type.fsMode() | permMode(r.Mode),
		UID:      img.ids[r.UIDIndex],
		GID:      img.ids[r.GIDIndex],
		MTime:    r.MTime,
		Number:   r.Number,
		NLink:    r.NLink,
		Fragment: noFragment,
		xattr:    r.Xattr,
		typ:      r.Type,
	}
	switch r.Type.basic() {
	case typeDir:
		ino.listing = makeRef(r.Start, int(r.DirOffset))
		ino.parent = r.Parent
		ino.indexCount = int(r.IndexCount)
		if r.Size > dirSizeBias {
			ino.listingLen = int64(r.Size) - dirSizeBias
		}
		if ino.listingLen > img.dirsRaw {
			return nil, corruptf("a listing of %d bytes is longer than the directory table", ino.listingLen)
		}
	case typeFile:
		return ino, img.checkFile(ino, r)
	case typeSymlink:
		if strings.IndexByte(r.Target, 0) >= 0 {
			return nil, corruptf("symlink target %q contains a NUL byte", r.Target)
		}
		ino.Target, ino.Size = r.Target, int64(len(r.Target))
	case typeBlock, typeChar:
		// include/linux/kdev_t.h, new_decode_dev
		ino.Rdev = unix.Mkdev(r.Rdev>>8&0xfff, r.Rdev&0xff|r.Rdev>>12&0xfff00)
	}
	return ino, nil
}

// checkFile fills in and checks a file's data description.
func (img *Image) checkFile(ino *Inode, r *inodeRecord) error {
	if r.Size > math.MaxInt64 || r.Start > math.MaxInt64 {
		return corruptf("size %d, data at %d", r.Size, r.Start)
	}
	ino.Size, ino.Start, ino.Blocks = int64(r.Size), int64(r.Start), r.Blocks
	ino.Fragment, ino.FragOffset = r.Fragment, r.FragOffset
	var sum uint64
	for _, w := range r.Blocks {
		n, _ := dataWordSize(w)
		sum += uint64(n)
	}
	if end := img.sb.InodeTable; sum > 0 && (r.Start < uint64(img.dataAt) || r.Start > end || sum > end-r.Start) {
		return corruptf("%d bytes of data at %d lie outside the data area, from %d to %d", sum, r.Start, img.dataAt, end)
	}
	if r.Fragment == noFragment {
		return nil
	}
	if r.Fragment >= img.sb.Fragments {
		return corruptf("fragment %d of %d", r.Fragment, img.sb.Fragments)
	}
	bs := uint64(img.sb.BlockSize)
	if tail := r.Size % bs; uint64(r.FragOffset)+tail > bs {
		return corruptf("a tail of %d bytes at %d of a fragment reaches beyond it", tail, r.FragOffset)
	}
	return nil
}

// permMode converts the twelve permission bits.
func permMode(m uint16) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	if m&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if m&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if m&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

// unixPerm is the reverse of permMode.
func unixPerm(mode fs.FileMode) uint32 {
	m := uint32(mode.Perm())
	if mode&fs.ModeSetuid != 0 {
		m |= unix.S_ISUID
	}
	if mode&fs.ModeSetgid != 0 {
		m |= unix.S_ISGID
	}
	if mode&fs.ModeSticky != 0 {
		m |= unix.S_ISVTX
	}
	return m
}
