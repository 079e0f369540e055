// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo LDFLAGS: -l:libzstd.a
#cgo noescape ZSTD_compressCCtx
#cgo nocallback ZSTD_compressCCtx
#cgo noescape ZSTD_decompressDCtx
#cgo nocallback ZSTD_decompressDCtx
#include <zstd.h>
#include <zstd_errors.h>

static int is_too_small(size_t code) { return ZSTD_getErrorCode(code) == ZSTD_error_dstSize_tooSmall; }
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"
)

const zstdImplementation = "libzstd " + C.ZSTD_VERSION_STRING

// zstdCompressor makes the frames mksquashfs makes: in one call, so that they
// hold their content's size and their window is no larger than that, which the
// kernel insists on (fs/squashfs/zstd_wrapper.c).
type zstdCompressor struct {
	c     *C.ZSTD_CCtx
	level C.int
}

func newZstdCompressor(level, _ int) (compressor, error) {
	c := C.ZSTD_createCCtx()
	if c == nil {
		return nil, errors.New("allocate a zstd compressor: out of memory")
	}
	z := &zstdCompressor{c, C.int(level)}
	runtime.AddCleanup(z, func(c *C.ZSTD_CCtx) { C.ZSTD_freeCCtx(c) }, c)
	return z, nil
}

func (z *zstdCompressor) Compress(dst, src []byte) (int, bool, error) {
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	n := C.ZSTD_compressCCtx(z.c, unsafe.Pointer(&dst[0]), C.size_t(room),
		unsafe.Pointer(&src[0]), C.size_t(len(src)), z.level)
	runtime.KeepAlive(z)
	switch {
	case C.ZSTD_isError(n) == 0:
		return int(n), true, nil
	case C.is_too_small(n) != 0:
		return 0, false, nil
	}
	return 0, false, fmt.Errorf("compress a zstd block: %s", C.GoString(C.ZSTD_getErrorName(n)))
}

type zstdDecompressor struct{ d *C.ZSTD_DCtx }

func newZstdDecompressor() (decompressor, error) {
	d := C.ZSTD_createDCtx()
	if d == nil {
		return nil, errors.New("allocate a zstd decompressor: out of memory")
	}
	z := &zstdDecompressor{d}
	runtime.AddCleanup(z, func(d *C.ZSTD_DCtx) { C.ZSTD_freeDCtx(d) }, d)
	return z, nil
}

// Decompress uses dst as the window, so a frame's word for its window's size
// costs no memory.
func (z *zstdDecompressor) Decompress(dst, src []byte) (int, error) {
	if len(src) == 0 || len(dst) == 0 {
		return 0, corruptf("empty zstd block")
	}
	n := C.ZSTD_decompressDCtx(z.d, unsafe.Pointer(&dst[0]), C.size_t(len(dst)),
		unsafe.Pointer(&src[0]), C.size_t(len(src)))
	runtime.KeepAlive(z)
	switch {
	case C.ZSTD_isError(n) == 0:
		return int(n), nil
	case C.is_too_small(n) != 0:
		return 0, corruptf("zstd block holds more than %d bytes", len(dst))
	}
	return 0, corruptf("zstd block: %s", C.GoString(C.ZSTD_getErrorName(n)))
}
