// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// The library has four levels for the 22 of libzstd, and makes larger images.
const zstdImplementation = "klauspost/compress"

type zstdCompressor struct {
	enc *zstd.Encoder
	buf []byte
}

func newZstdCompressor(level, blockSize int) (compressor, error) {
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
