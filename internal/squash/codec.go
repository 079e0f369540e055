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

var compressorNames = map[Compressor]string{
	Gzip: "gzip", LZMA: "lzma", LZO: "lzo", XZ: "xz", LZ4: "lz4", Zstd: "zstd",
}

// ParseCompressor returns the method of a name mksquashfs -comp knows.
func ParseCompressor(name string) (Compressor, error) {
	for c, n := range compressorNames {
		if n == strings.ToLower(name) {
			return c, nil
		}
	}
	return 0, fmt.Errorf("unknown compressor %q: use gzip, zstd or lz4", name)
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

// GzipImplementation names the library that reads and writes gzip images in
// this binary, with its version where the library tells.
func GzipImplementation() string { return gzipImplementation }

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

// Levels of the compressors when the caller asks for none (zero).
const (
	// defaultGzipLevel in libdeflate gives smaller images than zlib's level 9
	// at a tenth of the time (measured on a Debian root, 128 KiB blocks).
	defaultGzipLevel = 6
	defaultZstdLevel = 9
)

// newCompressor returns a compressor for blocks of up to the larger of
// blockSize and a metadata block. Level zero is the method's default.
func newCompressor(c Compressor, level, blockSize int) (compressor, error) {
	if err := checkBlockSize(int64(blockSize)); err != nil {
		return nil, err
	}
	switch c {
	case Gzip:
		return newGzipCompressor(level)
	case Zstd:
		return newZstdCompressor(level, blockSize)
	case LZ4:
		return newLZ4Compressor(level)
	}
	return nil, fmt.Errorf("writing %v is not built in: use gzip, zstd or lz4", c)
}

// newDecompressor returns a decompressor.
func newDecompressor(c Compressor) (decompressor, error) {
	switch c {
	case Gzip:
		return newGzipDecompressor()
	case Zstd:
		return newZstdDecompressor()
	case LZ4:
		return lz4Decompressor{}, nil
	case XZ:
		return xzDecompressor{}, nil
	}
	return nil, fmt.Errorf("reading %v is not built in: repack the image with gzip, zstd, xz or lz4", c)
}

// checkLevel refuses a level outside lowest..highest and replaces zero.
func checkLevel(c Compressor, level, def, lowest, highest int) (int, error) {
	if level == 0 {
		return def, nil
	}
	if level < lowest || level > highest {
		return 0, fmt.Errorf("%v level %d: want %d to %d, or 0 for the default %d", c, level, lowest, highest, def)
	}
	return level, nil
}
