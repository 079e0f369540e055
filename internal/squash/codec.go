// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"strings"
)

// Compressor is a compression method, with the number it has in the
// superblock.
type Compressor uint16

// The methods of SquashFS 4.0.
const (
	Gzip Compressor = 1 // a zlib stream, in spite of its name
	LZMA Compressor = 2
	LZO  Compressor = 3
	XZ   Compressor = 4
	LZ4  Compressor = 5
	Zstd Compressor = 6
)

// None asks the packer to store everything as it is. It is not in the format:
// such an image says gzip, as those of mksquashfs -noI -noD -noF -noX do.
const None Compressor = 1 << 15

var compressorNames = map[Compressor]string{
	Gzip: "gzip", LZMA: "lzma", LZO: "lzo", XZ: "xz", LZ4: "lz4", Zstd: "zstd", None: "none",
}

// ParseCompressor returns the method of a name mksquashfs -comp knows.
func ParseCompressor(name string) (Compressor, error) {
	for c, n := range compressorNames {
		if n == strings.ToLower(name) {
			return c, nil
		}
	}
	return 0, fmt.Errorf("unknown compressor %q: use gzip, xz, zstd, lz4 or none", name)
}

func (c Compressor) String() string {
	if n, ok := compressorNames[c]; ok {
		return n
	}
	return fmt.Sprintf("compressor %d", uint16(c))
}

// MarshalText makes the name, not the number, appear in JSON.
func (c Compressor) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText is the reverse of MarshalText.
func (c *Compressor) UnmarshalText(b []byte) (err error) {
	*c, err = ParseCompressor(string(b))
	return err
}

// Implementations names the library behind each method in this binary, with its
// version where the library tells, and whether blocks are read without it.
// Binaries built with and without cgo differ: either reads what the other writes,
// but compresses to other bytes.
func Implementations() map[Compressor]string {
	return map[Compressor]string{Gzip: gzipImplementation, XZ: xzImplementation, LZ4: lz4Implementation, Zstd: zstdImplementation}
}

// compressor packs blocks. It is not safe for concurrent use: each worker has
// its own.
type compressor interface {
	// Compress writes src, packed, to dst and returns its length. ok is false,
	// and n zero, when that would take len(src) bytes or more, or does not fit
	// dst: the block is then to be stored as it is. dst needs room for
	// len(src)-1 bytes, and is only written within its length.
	Compress(dst, src []byte) (n int, ok bool, err error)
}

// decompressor unpacks blocks. It is not safe for concurrent use.
type decompressor interface {
	// Decompress writes what src unpacks to into dst and returns its length.
	// It is an error when that is more than len(dst), or when src is damaged.
	Decompress(dst, src []byte) (n int, err error)
}

// What the methods do when the caller asks for no level (zero), and the level
// mksquashfs takes an image for that does not say.
const (
	// defaultGzipLevel in libdeflate gives smaller images than zlib's level 9
	// at a twelfth of the time (docs/squashfs.md has the curve).
	defaultGzipLevel = 6
	// defaultZstdLevel gives images as small as zlib's level 9. The next level
	// that is much smaller, 15, takes seven times as long.
	defaultZstdLevel = 9
	defaultXZLevel   = 6

	impliedGzipLevel = 9
	impliedZstdLevel = 15
)

// zstdMaxWindow is the window of zstd --long at its usual limit.
const zstdMaxWindow = 128 << 20

// level returns the level to work with.
func (o *Options) level() (int, error) {
	limits := map[Compressor]struct{ def, highest int }{
		Gzip: {defaultGzipLevel, maxGzipLevel},
		XZ:   {defaultXZLevel, 9},
		LZ4:  {0, maxLZ4Level}, // zero is the fast method, the others are the high-compression one
		Zstd: {defaultZstdLevel, 22},
		None: {0, 0},
	}
	l, ok := limits[o.Compressor]
	switch {
	case !ok:
		return 0, fmt.Errorf("writing %v is not built in: use gzip, xz, zstd or lz4", o.Compressor)
	case o.Level == 0:
		return l.def, nil
	case o.Level < 0 || o.Level > l.highest:
		return 0, fmt.Errorf("%v level %d: want 1 to %d, or 0 for the default", o.Compressor, o.Level, l.highest)
	}
	return o.Level, nil
}

// dictSize returns the size of the xz dictionary to work with.
func (o *Options) dictSize() (int, error) {
	d := o.DictSize
	switch {
	case d == 0:
		return max(o.BlockSize, metaBlockSize), nil
	case o.Compressor != XZ:
		return 0, fmt.Errorf("dictionary size %d: only xz has a dictionary", d)
	case d < metaBlockSize || d > max(o.BlockSize, metaBlockSize) || d&(d-1) != 0 && d != 3*(d&-d):
		// The rule of the kernel (fs/squashfs/xz_wrapper.c).
		return 0, fmt.Errorf("dictionary size %d: want 8192 to the block size, a power of two or three times one", d)
	}
	return d, nil
}

// newCompressor returns a compressor for blocks of up to the larger of the
// block size and a metadata block.
func newCompressor(opt Options) (compressor, error) {
	if err := checkBlockSize(int64(opt.BlockSize)); err != nil {
		return nil, err
	}
	level, err := opt.level()
	if err != nil {
		return nil, err
	}
	dict, err := opt.dictSize()
	if err != nil {
		return nil, err
	}
	switch opt.Compressor {
	case Gzip:
		return newGzipCompressor(level)
	case XZ:
		return newXZCompressor(level, dict)
	case LZ4:
		return newLZ4Compressor(level)
	case Zstd:
		return newZstdCompressor(level, opt.BlockSize)
	}
	return storer{}, nil
}

// newDecompressor returns a decompressor.
func newDecompressor(c Compressor) (decompressor, error) {
	switch c {
	case Gzip:
		return newGzipDecompressor()
	case LZMA:
		return lzmaDecompressor{}, nil
	case LZO:
		return lzoDecompressor{}, nil
	case XZ:
		return newXZDecompressor()
	case LZ4:
		return lz4Decompressor{}, nil
	case Zstd:
		return newZstdDecompressor()
	}
	return nil, fmt.Errorf("%v is no compressor of SquashFS 4.0", c)
}
