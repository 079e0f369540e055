// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"
)

// Image is an open SquashFS image. It is safe for concurrent use and holds no
// resource besides memory and the reader it was given.
type Image struct {
	r       io.ReaderAt
	sb      superblock
	options *compressorOptions // nil when the writer left none
	dataAt  int64              // where data may begin: behind the superblock and the options

	inodes    metaTable
	dirs      metaTable
	ids       []uint32
	fragments *lookupTable // nil without fragments
	exports   *lookupTable // nil without export table
	xattrIDs  *lookupTable // nil without xattrs
	xattrKV   metaTable

	inodesRaw int64 // upper bounds of the decoded tables
	dirsRaw   int64

	meta metaCache
	data dataCache
	seen dirRegistry

	decMu sync.Mutex
	decs  []decompressor // idle ones
}

// Open reads and checks the superblock and the tables' indexes of an image of
// size bytes. Anything behind the image proper, such as padding, is ignored.
func Open(r io.ReaderAt, size int64) (*Image, error) {
	img := &Image{r: r, dataAt: superblockSize}
	buf := make([]byte, min(max(size, 0), superblockSize))
	if err := img.readAt(buf, 0); err != nil {
		return nil, fmt.Errorf("read squashfs superblock: %w", err)
	}
	var err error
	if img.sb, err = decodeSuperblock(buf); err != nil {
		return nil, err
	}
	if err := img.sb.validate(size); err != nil {
		return nil, err
	}
	dec, err := newDecompressor(img.sb.Compressor)
	if err != nil {
		return nil, err
	}
	img.putDecompressor(dec)
	if err := img.loadOptions(); err != nil {
		return nil, err
	}
	if err := img.loadTables(); err != nil {
		return nil, err
	}
	if _, err := img.Root(); err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	return img, nil
}

// loadOptions reads the compressor options behind the superblock.
func (img *Image) loadOptions() error {
	if img.sb.Flags&flagCompressorOptions == 0 {
		return nil
	}
	b, err := img.metaBlockAt(superblockSize, int64(img.sb.InodeTable))
	if err != nil {
		return fmt.Errorf("compressor options: %w", err)
	}
	img.dataAt = b.next
	img.options, err = decodeCompressorOptions(b.data, img.sb.Compressor)
	return err
}

// loadTables reads the index of each table, from the last to the first: where
// a table's blocks begin, the one before it must have ended.
func (img *Image) loadTables() error {
	sb := &img.sb
	end := int64(sb.BytesUsed)
	lowest := int64(sb.DirTable)
	if sb.XattrTable != noTable {
		first, err := img.loadXattrTable(int64(sb.XattrTable), lowest, end)
		if err != nil {
			return err
		}
		end = first
	}
	ids, err := img.loadTable("id", int64(sb.IDTable), lowest, end, uint64(sb.IDs), idEntrySize)
	if err != nil {
		return err
	}
	end = ids.start
	if sb.ExportTable != noTable {
		img.exports, err = img.loadTable("export", int64(sb.ExportTable), lowest, end, uint64(sb.Inodes), exportEntrySize)
		if err != nil {
			return err
		}
		end = img.exports.start
	}
	if sb.Fragments > 0 {
		img.fragments, err = img.loadTable("fragment", int64(sb.FragmentTable), lowest, end, uint64(sb.Fragments), fragmentEntrySize)
		if err != nil {
			return err
		}
		end = img.fragments.start
	}
	img.inodes = metaTable{"inode", int64(sb.InodeTable), int64(sb.DirTable)}
	img.dirs = metaTable{"directory", int64(sb.DirTable), end}

	img.ids = make([]uint32, sb.IDs)
	for i := range img.ids {
		b, err := ids.entry(img, uint64(i))
		if err != nil {
			return err
		}
		img.ids[i] = binary.LittleEndian.Uint32(b)
	}
	if img.inodesRaw, err = img.rawBound(img.inodes); err != nil {
		return err
	}
	const smallestInode = 20 // a fifo
	if int64(sb.Inodes) > img.inodesRaw/smallestInode {
		return corruptf("superblock counts %d inodes, the inode table holds no more than %d", sb.Inodes, img.inodesRaw/smallestInode)
	}
	img.dirsRaw, err = img.rawBound(img.dirs)
	return err
}

// loadXattrTable reads the xattr tables' header and index and returns where
// the first of their blocks begins.
func (img *Image) loadXattrTable(pos, lowest, end int64) (int64, error) {
	if pos > end-xattrTableHeaderSize {
		return 0, corruptf("xattr table at %d is cut short", pos)
	}
	buf := make([]byte, xattrTableHeaderSize)
	if err := img.readAt(buf, pos); err != nil {
		return 0, fmt.Errorf("xattr table: %w", err)
	}
	h := decodeXattrTableHeader(buf)
	if h.KeyValues < uint64(lowest) || h.KeyValues > uint64(pos) {
		return 0, corruptf("xattr table: keys at %d: want them from %d to %d", h.KeyValues, lowest, pos)
	}
	// The index follows the header, so the table's blocks end at pos.
	t, err := img.loadTable("xattr id", pos+xattrTableHeaderSize, int64(h.KeyValues), end, uint64(h.IDs), xattrIDSize)
	if err != nil {
		return 0, err
	}
	t.end = pos
	if h.IDs == 0 {
		t.start = pos
	}
	img.xattrIDs = t
	img.xattrKV = metaTable{"xattr", int64(h.KeyValues), t.start}
	return int64(h.KeyValues), nil
}

// readAt fills buf from the image; that the image ends earlier is an error.
func (img *Image) readAt(buf []byte, pos int64) error {
	n, err := img.r.ReadAt(buf, pos)
	if n == len(buf) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d of the image: %w", len(buf), pos, err)
}

// decompress unpacks one block with an idle decompressor.
func (img *Image) decompress(dst, src []byte) (int, error) {
	dec, err := img.getDecompressor()
	if err != nil {
		return 0, err
	}
	defer img.putDecompressor(dec)
	return dec.Decompress(dst, src)
}

func (img *Image) getDecompressor() (decompressor, error) {
	img.decMu.Lock()
	if n := len(img.decs); n > 0 {
		dec := img.decs[n-1]
		img.decs = img.decs[:n-1]
		img.decMu.Unlock()
		return dec, nil
	}
	img.decMu.Unlock()
	return newDecompressor(img.sb.Compressor)
}

func (img *Image) putDecompressor(dec decompressor) {
	img.decMu.Lock()
	img.decs = append(img.decs, dec)
	img.decMu.Unlock()
}

// Info is what an image says of itself. Table positions are byte offsets; -1
// stands for a table the image does not have.
type Info struct {
	Compressor        Compressor         `json:"compressor"`
	CompressorOptions *compressorOptions `json:"compressorOptions,omitempty"`
	BlockSize         int64              `json:"blockSize"`
	Created           time.Time          `json:"created"`
	BytesUsed         int64              `json:"bytesUsed"`
	Flags             []string           `json:"flags"`

	Inodes    int64 `json:"inodes"`
	Fragments int64 `json:"fragments"`
	IDs       int64 `json:"ids"`
	XattrIDs  int64 `json:"xattrIds"`

	InodeTable    int64 `json:"inodeTable"`
	DirTable      int64 `json:"directoryTable"`
	FragmentTable int64 `json:"fragmentTable"`
	ExportTable   int64 `json:"exportTable"`
	IDTable       int64 `json:"idTable"`
	XattrTable    int64 `json:"xattrTable"`
}

var flagNames = [...]string{"uncompressed-inodes", "uncompressed-data", "check", "uncompressed-fragments",
	"no-fragments", "always-fragments", "duplicates", "exportable", "uncompressed-xattrs", "no-xattrs",
	"compressor-options", "uncompressed-ids"}

// Info returns the superblock and what the tables' headers count.
func (img *Image) Info() Info {
	sb := &img.sb
	pos := func(v uint64) int64 {
		if v > math.MaxInt64 {
			return -1
		}
		return int64(v)
	}
	info := Info{
		Compressor: sb.Compressor, CompressorOptions: img.options, BlockSize: int64(sb.BlockSize),
		Created: time.Unix(int64(sb.ModTime), 0).UTC(), BytesUsed: int64(sb.BytesUsed), Flags: []string{},
		Inodes: int64(sb.Inodes), Fragments: int64(sb.Fragments), IDs: int64(sb.IDs),
		InodeTable: pos(sb.InodeTable), DirTable: pos(sb.DirTable), FragmentTable: pos(sb.FragmentTable),
		ExportTable: pos(sb.ExportTable), IDTable: pos(sb.IDTable), XattrTable: pos(sb.XattrTable),
	}
	for i, name := range flagNames {
		if sb.Flags&(1<<i) != 0 {
			info.Flags = append(info.Flags, name)
		}
	}
	if img.xattrIDs != nil {
		info.XattrIDs = int64(img.xattrIDs.count)
	}
	return info
}
