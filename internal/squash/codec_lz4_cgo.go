// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo LDFLAGS: -l:liblz4.a
#cgo noescape LZ4_compress_fast_extState
#cgo nocallback LZ4_compress_fast_extState
#cgo noescape LZ4_compress_HC_extStateHC
#cgo nocallback LZ4_compress_HC_extStateHC
#cgo noescape LZ4_decompress_safe
#cgo nocallback LZ4_decompress_safe
#include <lz4.h>
#include <lz4hc.h>
*/
import "C"

import "unsafe"

const lz4Implementation = "liblz4 " + C.LZ4_VERSION_STRING

// maxLZ4Level is the one of mksquashfs -Xhc.
const maxLZ4Level = C.LZ4HC_CLEVEL_MAX

type lz4Compressor struct {
	level int
	state []uint64 // the library's working memory, which it wants aligned
}

func newLZ4Compressor(level int) (compressor, error) {
	size := C.LZ4_sizeofState()
	if level > 0 {
		size = C.LZ4_sizeofStateHC()
	}
	return &lz4Compressor{level: level, state: make([]uint64, (int(size)+7)/8)}, nil
}

func (z *lz4Compressor) Compress(dst, src []byte) (int, bool, error) {
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	state, in, out := unsafe.Pointer(&z.state[0]), (*C.char)(unsafe.Pointer(&src[0])), (*C.char)(unsafe.Pointer(&dst[0]))
	var n C.int // zero when the result does not fit
	if z.level > 0 {
		n = C.LZ4_compress_HC_extStateHC(state, in, out, C.int(len(src)), C.int(room), C.int(z.level))
	} else {
		n = C.LZ4_compress_fast_extState(state, in, out, C.int(len(src)), C.int(room), 1)
	}
	return int(n), n > 0, nil
}

type lz4Decompressor struct{}

func (lz4Decompressor) Decompress(dst, src []byte) (int, error) {
	if len(src) == 0 || len(dst) == 0 {
		return 0, corruptf("empty lz4 block")
	}
	n := C.LZ4_decompress_safe((*C.char)(unsafe.Pointer(&src[0])), (*C.char)(unsafe.Pointer(&dst[0])), C.int(len(src)), C.int(len(dst)))
	if n < 0 {
		return 0, corruptf("lz4 block is damaged or holds more than %d bytes", len(dst))
	}
	return int(n), nil
}
