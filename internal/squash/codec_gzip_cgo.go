// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo LDFLAGS: -l:libdeflate.a
#cgo noescape libdeflate_zlib_compress
#cgo nocallback libdeflate_zlib_compress
#cgo noescape libdeflate_zlib_decompress
#cgo nocallback libdeflate_zlib_decompress
#include <libdeflate.h>
*/
import "C"

import (
	"errors"
	"runtime"
	"unsafe"
)

const gzipImplementation = "libdeflate " + C.LIBDEFLATE_VERSION_STRING

// maxGzipLevel is libdeflate's; the level an image records ends at 9.
const maxGzipLevel = 12

type gzipCompressor struct {
	c *C.struct_libdeflate_compressor
}

func newGzipCompressor(level int) (compressor, error) {
	c := C.libdeflate_alloc_compressor(C.int(level))
	if c == nil {
		return nil, errors.New("allocate a gzip compressor: out of memory")
	}
	g := &gzipCompressor{c}
	runtime.AddCleanup(g, func(c *C.struct_libdeflate_compressor) { C.libdeflate_free_compressor(c) }, c)
	return g, nil
}

func (g *gzipCompressor) Compress(dst, src []byte) (int, bool, error) {
	// libdeflate returns zero when the result does not fit, which is how it
	// wants to be told that a larger result is of no use.
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	n := C.libdeflate_zlib_compress(g.c, unsafe.Pointer(&src[0]), C.size_t(len(src)),
		unsafe.Pointer(&dst[0]), C.size_t(room))
	runtime.KeepAlive(g)
	return int(n), n > 0, nil
}

type gzipDecompressor struct {
	d *C.struct_libdeflate_decompressor
}

func newGzipDecompressor() (decompressor, error) {
	d := C.libdeflate_alloc_decompressor()
	if d == nil {
		return nil, errors.New("allocate a gzip decompressor: out of memory")
	}
	g := &gzipDecompressor{d}
	runtime.AddCleanup(g, func(d *C.struct_libdeflate_decompressor) { C.libdeflate_free_decompressor(d) }, d)
	return g, nil
}

func (g *gzipDecompressor) Decompress(dst, src []byte) (int, error) {
	if len(src) == 0 || len(dst) == 0 {
		return 0, corruptf("empty gzip block")
	}
	var n C.size_t
	res := C.libdeflate_zlib_decompress(g.d, unsafe.Pointer(&src[0]), C.size_t(len(src)),
		unsafe.Pointer(&dst[0]), C.size_t(len(dst)), &n)
	runtime.KeepAlive(g)
	switch res {
	case C.LIBDEFLATE_SUCCESS:
		return int(n), nil
	case C.LIBDEFLATE_INSUFFICIENT_SPACE:
		return 0, corruptf("gzip block holds more than %d bytes", len(dst))
	}
	return 0, corruptf("gzip block is damaged")
}
