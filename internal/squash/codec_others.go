// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"encoding/binary"
	"io"

	"github.com/anchore/go-lzo"
	"github.com/ulikunitz/xz/lzma"
)

// readBlock reads all of r into dst, which must hold it.
func readBlock(r io.Reader, dst []byte, method string) (int, error) {
	var over [1]byte // asked for when dst is full: r must have nothing more
	n, idle := 0, 0
	for {
		buf := dst[n:]
		if len(buf) == 0 {
			buf = over[:]
		}
		m, err := r.Read(buf)
		if m > 0 && n == len(dst) {
			return 0, corruptf("%s block holds more than %d bytes", method, len(dst))
		}
		n += m
		switch {
		case err == io.EOF:
			return n, nil
		case err != nil:
			return 0, corruptf("%s block: %v", method, err)
		case m > 0:
			idle = 0
		default:
			if idle++; idle > 100 {
				return 0, corruptf("%s block: %v", method, io.ErrNoProgress)
			}
		}
	}
}

// storer is the compressor that never makes anything smaller.
type storer struct{}

func (storer) Compress(_, _ []byte) (int, bool, error) { return 0, false, nil }

// lzoDecompressor reads LZO1X blocks, of mksquashfs -comp lzo.
type lzoDecompressor struct{}

func (lzoDecompressor) Decompress(dst, src []byte) (n int, err error) {
	// The library checks bounds by hand; should it have missed one, that is
	// damage in the block and not the end of the program.
	defer func() {
		if r := recover(); r != nil {
			n, err = 0, corruptf("lzo block: %v", r)
		}
	}()
	if n, err = lzo.Decompress(src, dst); err != nil || n > len(dst) {
		return 0, corruptf("lzo block: %v", err)
	}
	return n, nil
}

// lzmaDecompressor reads blocks in the format of .lzma files, of mksquashfs
// -comp lzma.
type lzmaDecompressor struct{}

func (lzmaDecompressor) Decompress(dst, src []byte) (int, error) {
	const properties, header = 1, 13 // then four bytes of dictionary size, eight of content size
	if len(src) < header {
		return 0, corruptf("lzma block of %d bytes", len(src))
	}
	if size := binary.LittleEndian.Uint64(src[5:]); size > uint64(len(dst)) {
		return 0, corruptf("lzma block of %d bytes, want no more than %d", size, len(dst))
	}
	// A dictionary larger than the content is never used, but would be
	// allocated.
	var h [header]byte
	copy(h[:], src)
	binary.LittleEndian.PutUint32(h[properties:], uint32(max(len(dst), lzma.MinDictCap)))
	r, err := lzma.ReaderConfig{DictCap: max(len(dst), lzma.MinDictCap)}.NewReader(
		io.MultiReader(bytes.NewReader(h[:]), bytes.NewReader(src[header:])))
	if err != nil {
		return 0, corruptf("lzma block: %v", err)
	}
	return readBlock(r, dst, "lzma")
}
