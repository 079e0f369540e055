// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/ulikunitz/xz"
)

// The library has one way to compress, whatever the level, and makes larger
// images.
const xzImplementation = "ulikunitz/xz (own decoder)"

type xzCompressor struct {
	dict int
	out  bytes.Buffer
}

func newXZCompressor(_, dictSize int) (compressor, error) {
	return &xzCompressor{dict: dictSize}, nil
}

func (x *xzCompressor) Compress(dst, src []byte) (int, bool, error) {
	if len(src) == 0 {
		return 0, false, nil
	}
	x.out.Reset()
	dict := x.dict
	if len(src) <= metaBlockSize {
		dict = metaBlockSize
	}
	w, err := xz.WriterConfig{DictCap: dict, CheckSum: xz.CRC32}.NewWriter(&x.out)
	if err == nil {
		_, err = w.Write(src)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return 0, false, fmt.Errorf("compress an xz block: %w", err)
	}
	if n := x.out.Len(); n >= len(src) || n > len(dst) {
		return 0, false, nil
	}
	return copy(dst, x.out.Bytes()), true, nil
}

// xzLibrary stands where other builds have a library that reads filters.
type xzLibrary struct{}

func newXZLibrary() (decompressor, error) { return xzLibrary{}, nil }

func (xzLibrary) Decompress(_, _ []byte) (int, error) {
	return 0, errors.New("xz block uses a filter beside LZMA2 (mksquashfs -Xbcj) or something rarer: this build reads plain LZMA2 only")
}
