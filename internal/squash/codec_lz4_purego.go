// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"errors"
	"fmt"

	"github.com/pierrec/lz4/v4"
)

const lz4Implementation = "pierrec/lz4"

const maxLZ4Level = 9

type lz4Compressor struct {
	fast lz4.Compressor
	hc   *lz4.CompressorHC
	buf  []byte
}

func newLZ4Compressor(level int) (compressor, error) {
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
