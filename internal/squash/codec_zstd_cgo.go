// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo LDFLAGS: -l:libzstd.a
#cgo noescape ZSTD_compress2
#cgo nocallback ZSTD_compress2
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
	"maps"
	"runtime"
	"unsafe"
)

const zstdImplementation = "libzstd " + C.ZSTD_VERSION_STRING

// zstdCompressor makes the frames mksquashfs makes: in one call, so that they
// hold their content's size and their window is no larger than that, which the
// kernel insists on (fs/squashfs/zstd_wrapper.c).
type zstdCompressor struct{ c *C.ZSTD_CCtx }

// zstdTuned is what to search with instead of a level's own parameters, on
// blocks of the default size. libzstd chooses for content of any kind; on the
// blocks of root file systems these take a tenth to a fifth less time for less
// than 0.5 % more bytes.
var zstdTuned = map[int]map[C.ZSTD_cParameter]C.int{
	9:  {C.ZSTD_c_strategy: C.ZSTD_lazy},
	15: {C.ZSTD_c_searchLog: 4, C.ZSTD_c_chainLog: 17, C.ZSTD_c_targetLength: 32},
}

func newZstdCompressor(level, blockSize int) (compressor, error) {
	c := C.ZSTD_createCCtx()
	if c == nil {
		return nil, errors.New("allocate a zstd compressor: out of memory")
	}
	z := &zstdCompressor{c}
	runtime.AddCleanup(z, func(c *C.ZSTD_CCtx) { C.ZSTD_freeCCtx(c) }, c)
	parameters := map[C.ZSTD_cParameter]C.int{C.ZSTD_c_compressionLevel: C.int(level)}
	if blockSize == DefaultBlockSize {
		maps.Copy(parameters, zstdTuned[level])
	}
	for p, value := range parameters {
		if n := C.ZSTD_CCtx_setParameter(c, p, value); C.ZSTD_isError(n) != 0 {
			return nil, fmt.Errorf("set up a zstd compressor: %s", C.GoString(C.ZSTD_getErrorName(n)))
		}
	}
	return z, nil
}

func (z *zstdCompressor) Compress(dst, src []byte) (int, bool, error) {
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	n := C.ZSTD_compress2(z.c, unsafe.Pointer(&dst[0]), C.size_t(room),
		unsafe.Pointer(&src[0]), C.size_t(len(src)))
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
