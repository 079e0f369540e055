// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"io/fs"
	"math"
	"strings"
)

// Base is an image whose compressed blocks a new image takes over, so that only
// what changed is compressed. Both must have the same compressor and block size.
type Base struct {
	Image  *Image
	Layout Layout
	// MaxDead is the largest share of the data area that may be data nothing
	// refers to any more; zero means 0.1.
	MaxDead float64
}

// maxDead is the default of Base.MaxDead: a rebuilt initrd alone leaves three
// or four per cent of a usual image behind.
const maxDead = 0.1

// Layout says where blocks taken over from a base go.
type Layout uint8

// The layouts.
const (
	// LayoutAuto is LayoutAppend unless too much of it would be dead.
	LayoutAuto Layout = iota
	// LayoutAppend leaves the base's data area where it is, byte for byte, with
	// what is dead in it; new blocks follow. A store that holds the base can
	// copy that part itself.
	LayoutAppend
	// LayoutCompact moves the live blocks together, in the base's order, and
	// compresses anew what is in fragment blocks of which too much is dead.
	LayoutCompact
)

var layoutNames = [...]string{"auto", "append", "compact"}

// ParseLayout reads a layout's name.
func ParseLayout(name string) (Layout, error) {
	for i, n := range layoutNames {
		if n == name {
			return Layout(i), nil
		}
	}
	return 0, fmt.Errorf("unknown layout %q: want %s", name, strings.Join(layoutNames[:], ", "))
}

func (l Layout) String() string { return layoutNames[l] }

// MarshalText implements encoding.TextMarshaler.
func (l Layout) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// BaseStats says what an image took over from its base.
type BaseStats struct {
	Layout Layout `json:"layout"`
	// Refused says why nothing could be taken over; then the rest is zero.
	Refused     string `json:"refused,omitempty"`
	Files       int64  `json:"files"`       // whose data was taken over
	Bytes       int64  `json:"bytes"`       // their content
	CopiedBytes int64  `json:"copiedBytes"` // what that takes in the image, dead data included
	DeadBytes   int64  `json:"deadBytes"`   // data in the image nothing refers to; of fragment blocks, the share
	// Shared is what stands in the image as it does in the base, in ascending
	// order. Ranges of less than a mebibyte are left out.
	Shared []SharedRange `json:"shared,omitempty"`
}

// SharedRange is a range of bytes that two images have in common.
type SharedRange struct {
	From  int64 `json:"from"` // offset in the base
	To    int64 `json:"to"`   // offset in the new image
	Bytes int64 `json:"bytes"`
}

// leastShared is what is worth telling of.
const leastShared = 1 << 20

// baseContent is a regular file whose data is in an image already.
type baseContent struct {
	img *Image
	ref inodeRef
}

// noRef is no inode's reference.
const noRef = inodeRef(math.MaxUint64)

// fileInode reads the inode of a regular file.
func (img *Image) fileInode(ref inodeRef) (*Inode, error) {
	ino, err := img.inode(ref)
	if err == nil && !ino.isFile() {
		err = corruptf("inode %d is a %v, not a file", ino.Number, ino.typ)
	}
	if err != nil {
		return nil, fmt.Errorf("base image: %w", err)
	}
	return ino, nil
}

// Open implements Content.
func (c *baseContent) Open() (ContentReader, error) {
	ino, err := c.img.fileInode(c.ref)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("inode %d of the base image", ino.Number)
	return baseReader{&imageFile{img: c.img, path: name, info: fileInfo{name, ino}}}, nil
}

type baseReader struct{ *imageFile }

// NextData implements ContentReader.
func (r baseReader) NextData(off int64) (int64, error) {
	ino, blockSize := r.info.ino, int64(r.img.sb.BlockSize)
	if off < 0 {
		return 0, &fs.PathError{Op: "seek", Path: r.path, Err: fs.ErrInvalid}
	}
	for i := off / blockSize; i < int64(len(ino.Blocks)); i++ {
		if ino.Blocks[i] != 0 {
			return max(off, i*blockSize), nil
		}
	}
	if ino.tailLen(blockSize) > 0 {
		return max(off, ino.Size-ino.Size%blockSize), nil
	}
	return ino.Size, nil
}
