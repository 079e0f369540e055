// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
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

type zstdCompressor struct {
	enc *zstd.Encoder
	buf []byte
}

func newZstdCompressor(level, blockSize int) (compressor, error) {
	level, err := checkLevel(Zstd, level, defaultZstdLevel, 1, 22)
	if err != nil {
		return nil, err
	}
	// The kernel allows a window of the larger of the block size and a metadata
	// block (fs/squashfs/zstd_wrapper.c) and fails to read others.
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
		zstd.WithWindowSize(max(blockSize, metaBlockSize)),
		zstd.WithSingleSegment(true),
		zstd.WithEncoderCRC(false),
		zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, fmt.Errorf("zstd level %d: %w", level, err)
	}
	return &zstdCompressor{enc: enc}, nil
}

func (z *zstdCompressor) Compress(dst, src []byte) (int, bool, error) {
	if len(src) == 0 {
		return 0, false, nil
	}
	// EncodeAll may grow what it appends to; its own buffer takes that.
	z.buf = z.enc.EncodeAll(src, z.buf[:0])
	if len(z.buf) >= len(src) || len(z.buf) > len(dst) {
		return 0, false, nil
	}
	return copy(dst, z.buf), true, nil
}

// zstdMaxWindow is the window of zstd --long at its usual limit.
const zstdMaxWindow = 128 << 20

type zstdDecompressor struct{ dec *zstd.Decoder }

func newZstdDecompressor() (decompressor, error) {
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecodeAllCapLimit(true), // never more than the destination holds
		// unsquashfs reads frames of streaming writers, whose window is larger
		// than the block. DecodeAll uses the destination as its window, so
		// nothing of that size is allocated.
		zstd.WithDecoderMaxMemory(zstdMaxWindow),
		zstd.WithDecoderMaxWindow(zstdMaxWindow))
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	return &zstdDecompressor{dec}, nil
}

func (z *zstdDecompressor) Decompress(dst, src []byte) (int, error) {
	out, err := z.dec.DecodeAll(src, dst[:0:len(dst)])
	if err != nil {
		return 0, corruptf("zstd block: %v", err)
	}
	if len(out) > len(dst) {
		return 0, corruptf("zstd block holds more than %d bytes", len(dst))
	}
	if len(out) > 0 && &out[0] != &dst[0] {
		copy(dst, out)
	}
	return len(out), nil
}

// lz4 level zero is the fast method, 1 to 9 the high-compression one.
type lz4Compressor struct {
	fast lz4.Compressor
	hc   *lz4.CompressorHC
	buf  []byte
}

func newLZ4Compressor(level int) (compressor, error) {
	level, err := checkLevel(LZ4, level, 0, 1, 9)
	if err != nil {
		return nil, err
	}
	z := &lz4Compressor{}
	if level > 0 {
		z.hc = &lz4.CompressorHC{Level: lz4.CompressionLevel(1 << (8 + level))}
	}
	return z, nil
}

func (z *lz4Compressor) Compress(dst, src []byte) (n int, ok bool, err error) {
	if len(src) == 0 {
		return 0, false, nil
	}
	// With less room than the bound the library may give up early on input
	// that would fit.
	if bound := lz4.CompressBlockBound(len(src)); len(z.buf) < bound {
		z.buf = make([]byte, bound)
	}
	if z.hc != nil {
		n, err = z.hc.CompressBlock(src, z.buf)
	} else {
		n, err = z.fast.CompressBlock(src, z.buf)
	}
	if err != nil && !errors.Is(err, lz4.ErrInvalidSourceShortBuffer) {
		return 0, false, fmt.Errorf("compress an lz4 block: %w", err)
	}
	if err != nil || n == 0 || n >= len(src) || n > len(dst) {
		return 0, false, nil
	}
	return copy(dst, z.buf[:n]), true, nil
}

type lz4Decompressor struct{}

func (lz4Decompressor) Decompress(dst, src []byte) (int, error) {
	n, err := lz4.UncompressBlock(src, dst)
	if err != nil {
		return 0, corruptf("lz4 block is damaged or holds more than %d bytes", len(dst))
	}
	return n, nil
}
