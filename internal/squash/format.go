// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
)

// ErrCorrupt is what every error about an image's content unwraps to: the
// image is damaged, or was made to do damage.
var ErrCorrupt = errors.New("corrupt squashfs image")

// corruptf returns an error that unwraps to ErrCorrupt.
func corruptf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// Limits and sizes of the format (squashfs_fs.h).
const (
	superblockSize  = 96
	superblockMagic = 0x73717368 // "hsqs" in little-endian order
	versionMajor    = 4
	versionMinor    = 0

	// MinBlockSize and MaxBlockSize bound the data block size, a power of two.
	MinBlockSize = 4 << 10
	MaxBlockSize = 1 << 20
	// DefaultBlockSize is the block size mksquashfs picks, too.
	DefaultBlockSize = 128 << 10

	metaBlockSize  = 8192 // bytes of content in each metadata block but a table's last
	metaHeaderSize = 2

	maxNameLen       = 256       // SQUASHFS_NAME_LEN
	maxSymlinkLen    = 65535     // fs/squashfs/inode.c accepts up to a page, unsquashfs 65535
	maxDirEntries    = 256       // SQUASHFS_DIR_COUNT, entries per directory header
	maxIDs           = 65535     // no_ids is 16 bits wide, and zero ids is invalid
	maxBasicDirSize  = 0xffff    // file_size of a basic directory, which includes dirSizeBias
	maxBasicFileSize = 1<<32 - 1 // file_size of a basic file
	maxXattrNameLen  = 65535     // size of an xattr key, without its prefix
	maxXattrValueLen = 65536     // XATTR_SIZE_MAX of the kernel

	// dirSizeBias is added to a directory listing's length in its inode: the
	// kernel counts the invisible "." and "..".
	dirSizeBias = 3

	noFragment = 0xffffffff // fragment index of a file without one
	noXattr    = 0xffffffff // xattr index of an inode without attributes
	noTable    = math.MaxUint64
)

// Superblock flags.
const (
	flagUncompressedInodes    = 1 << 0
	flagUncompressedData      = 1 << 1
	flagCheck                 = 1 << 2 // unused since 4.0
	flagUncompressedFragments = 1 << 3
	flagNoFragments           = 1 << 4
	flagAlwaysFragments       = 1 << 5
	flagDuplicates            = 1 << 6
	flagExportable            = 1 << 7
	flagUncompressedXattrs    = 1 << 8
	flagNoXattrs              = 1 << 9
	flagCompressorOptions     = 1 << 10
	flagUncompressedIDs       = 1 << 11
)

// superblock is the first 96 bytes of an image. Positions are byte offsets
// from the start of the image; a table that is absent has noTable.
type superblock struct {
	Inodes        uint32
	ModTime       uint32 // seconds since 1970
	BlockSize     uint32
	Fragments     uint32
	Compressor    Compressor
	Flags         uint16
	IDs           uint16
	RootInode     inodeRef
	BytesUsed     uint64
	IDTable       uint64
	XattrTable    uint64
	InodeTable    uint64
	DirTable      uint64
	FragmentTable uint64
	ExportTable   uint64
}

// append appends the 96 bytes of the superblock to dst.
func (s *superblock) append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, superblockMagic)
	dst = le.AppendUint32(dst, s.Inodes)
	dst = le.AppendUint32(dst, s.ModTime)
	dst = le.AppendUint32(dst, s.BlockSize)
	dst = le.AppendUint32(dst, s.Fragments)
	dst = le.AppendUint16(dst, uint16(s.Compressor))
	dst = le.AppendUint16(dst, blockLog(s.BlockSize))
	dst = le.AppendUint16(dst, s.Flags)
	dst = le.AppendUint16(dst, s.IDs)
	dst = le.AppendUint16(dst, versionMajor)
	dst = le.AppendUint16(dst, versionMinor)
	dst = le.AppendUint64(dst, uint64(s.RootInode))
	for _, v := range [...]uint64{s.BytesUsed, s.IDTable, s.XattrTable, s.InodeTable,
		s.DirTable, s.FragmentTable, s.ExportTable} {
		dst = le.AppendUint64(dst, v)
	}
	return dst
}

// decodeSuperblock reads the superblock from the first 96 bytes of an image
// and checks what can be checked without the image's size.
func decodeSuperblock(b []byte) (superblock, error) {
	var s superblock
	if len(b) < superblockSize {
		return s, corruptf("%d bytes are too few for a superblock", len(b))
	}
	le := binary.LittleEndian
	switch magic := le.Uint32(b); magic {
	case superblockMagic:
	case bits.ReverseBytes32(superblockMagic):
		return s, errors.New("big-endian squashfs image: only version 4.0, which is little-endian, is supported")
	default:
		return s, corruptf("no squashfs image: magic is %#08x, want %#08x", magic, superblockMagic)
	}
	if major, minor := le.Uint16(b[28:]), le.Uint16(b[30:]); major != versionMajor || minor != versionMinor {
		return s, fmt.Errorf("squashfs version %d.%d: only 4.0 is supported", major, minor)
	}
	s = superblock{
		Inodes:        le.Uint32(b[4:]),
		ModTime:       le.Uint32(b[8:]),
		BlockSize:     le.Uint32(b[12:]),
		Fragments:     le.Uint32(b[16:]),
		Compressor:    Compressor(le.Uint16(b[20:])),
		Flags:         le.Uint16(b[24:]),
		IDs:           le.Uint16(b[26:]),
		RootInode:     inodeRef(le.Uint64(b[32:])),
		BytesUsed:     le.Uint64(b[40:]),
		IDTable:       le.Uint64(b[48:]),
		XattrTable:    le.Uint64(b[56:]),
		InodeTable:    le.Uint64(b[64:]),
		DirTable:      le.Uint64(b[72:]),
		FragmentTable: le.Uint64(b[80:]),
		ExportTable:   le.Uint64(b[88:]),
	}
	if err := checkBlockSize(int64(s.BlockSize)); err != nil {
		return s, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if log := le.Uint16(b[22:]); log != blockLog(s.BlockSize) {
		return s, corruptf("block size is %d but its logarithm is given as %d", s.BlockSize, log)
	}
	return s, nil
}

// validate checks the superblock against an image of size bytes: every table
// inside, in the order every writer uses, and as long as its count needs.
func (s *superblock) validate(size int64) error {
	if s.BytesUsed > math.MaxInt64 || int64(s.BytesUsed) > size {
		return corruptf("superblock says %d bytes are used, the image has %d: it was cut short", s.BytesUsed, size)
	}
	if s.Inodes == 0 {
		return corruptf("no inodes")
	}
	if s.IDs == 0 {
		return corruptf("no user and group ids")
	}
	if s.InodeTable < superblockSize || s.InodeTable >= s.DirTable {
		return corruptf("inode table at %d, directory table at %d", s.InodeTable, s.DirTable)
	}
	// The tables follow each other in this order (mksquashfs.c, kernel
	// super.c); each optional one must lie behind the one before it.
	prev, prevName := s.DirTable, "directory"
	for _, t := range [...]struct {
		name string
		pos  uint64
		need bool
	}{
		{"fragment", s.FragmentTable, s.Fragments > 0},
		{"export", s.ExportTable, false},
		{"id", s.IDTable, true},
		{"xattr", s.XattrTable, false},
	} {
		if t.pos == noTable {
			if t.need {
				return corruptf("the %s table is missing", t.name)
			}
			continue
		}
		if t.pos < prev || t.pos >= s.BytesUsed {
			return corruptf("%s table at %d: want it behind the %s table at %d and before %d",
				t.name, t.pos, prevName, prev, s.BytesUsed)
		}
		prev, prevName = t.pos, t.name
	}
	return nil
}

// checkBlockSize refuses data block sizes the format does not allow.
func checkBlockSize(n int64) error {
	if n < MinBlockSize || n > MaxBlockSize || n&(n-1) != 0 {
		return fmt.Errorf("block size %d: want a power of two from %d to %d", n, MinBlockSize, MaxBlockSize)
	}
	return nil
}

// blockLog returns the base-2 logarithm of a block size.
func blockLog(blockSize uint32) uint16 { return uint16(bits.Len32(blockSize) - 1) }

// Data and fragment block size words: the stored length, and a bit that says
// the block is stored as it is. A word of zero is a block of zeroes that has no
// bytes in the image.
const (
	dataStoredBit = 1 << 24
	dataSizeMask  = dataStoredBit - 1
)

// dataWord returns the size word of a block that takes n bytes in the image.
func dataWord(n int, stored bool) uint32 {
	if stored {
		return uint32(n) | dataStoredBit
	}
	return uint32(n)
}

// dataWordSize splits a size word.
func dataWordSize(w uint32) (n int, stored bool) {
	return int(w & dataSizeMask), w&dataStoredBit != 0
}

// checkDataWord refuses a size word that no block of blockSize bytes can have.
func checkDataWord(w, blockSize uint32) error {
	if w&^uint32(dataStoredBit|dataSizeMask) != 0 || w&dataSizeMask > blockSize {
		return corruptf("block size word %#x exceeds the block size %d", w, blockSize)
	}
	return nil
}

// metaStoredBit in a metadata block's 16-bit header says the block is stored
// as it is; the other bits are its length in the image.
const metaStoredBit = 1 << 15

// metaHeader returns the header of a metadata block of n bytes in the image.
func metaHeader(n int, stored bool) uint16 {
	if stored {
		return uint16(n) | metaStoredBit
	}
	return uint16(n)
}

// metaHeaderLen splits a metadata block header. Zero stands for 32,768
// (SQUASHFS_COMPRESSED_SIZE), which the caller refuses as too long.
func metaHeaderLen(h uint16) (n int, stored bool) {
	n = int(h &^ metaStoredBit)
	if n == 0 {
		n = metaStoredBit
	}
	return n, h&metaStoredBit != 0
}

// metaRef is a position in a table of metadata blocks: the block's offset from
// the start of the table in the upper 48 bits, the offset inside the block's
// content in the lower 16.
type metaRef uint64

// inodeRef is a metaRef into the inode table.
type inodeRef = metaRef

func makeRef(block uint64, offset int) metaRef { return metaRef(block<<16 | uint64(offset)&0xffff) }

func (r metaRef) block() uint64 { return uint64(r) >> 16 }
func (r metaRef) offset() int   { return int(r & 0xffff) }

// Lengths of the fixed-size table entries.
const (
	fragmentEntrySize = 16
	idEntrySize       = 4
	exportEntrySize   = 8
	xattrIDSize       = 16
	tablePointerSize  = 8
)

// fragmentEntry locates one fragment block.
type fragmentEntry struct {
	Start uint64 // byte offset in the image
	Size  uint32 // size word, see dataWord
}

func (e fragmentEntry) append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, e.Start)
	dst = binary.LittleEndian.AppendUint32(dst, e.Size)
	return append(dst, 0, 0, 0, 0)
}

func decodeFragmentEntry(b []byte) fragmentEntry {
	return fragmentEntry{Start: binary.LittleEndian.Uint64(b), Size: binary.LittleEndian.Uint32(b[8:])}
}

// tableBlocks returns how many metadata blocks hold n entries of entrySize
// bytes, which is also the number of 64-bit pointers in the table's index.
func tableBlocks(n uint64, entrySize int) uint64 {
	return (n*uint64(entrySize) + metaBlockSize - 1) / metaBlockSize
}
