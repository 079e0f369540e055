// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo LDFLAGS: -l:liblzma.a
#cgo noescape xz_pack
#cgo nocallback xz_pack
#cgo noescape xz_unpack
#cgo nocallback xz_unpack
#include <lzma.h>
#include <stdlib.h>

// The library allocates its tables, some megabytes, for every block. This
// keeps them for the next one, which saves mapping and clearing the pages.
#define SLOTS 24

typedef struct {
	void *p;
	size_t size;
	int used;
} slot;

typedef struct {
	lzma_allocator a;
	slot slots[SLOTS];
} pool;

static void *pool_alloc(void *opaque, size_t n, size_t size) {
	pool *l = opaque;
	size_t want = n * size;
	slot *empty = NULL;
	for (slot *s = l->slots; s < l->slots + SLOTS; s++) {
		if (s->p == NULL) {
			if (empty == NULL)
				empty = s;
		} else if (!s->used && s->size == want) {
			s->used = 1;
			return s->p;
		}
	}
	void *p = malloc(want);
	if (p != NULL && empty != NULL) {
		empty->p = p;
		empty->size = want;
		empty->used = 1;
	}
	return p;
}

static void pool_free(void *opaque, void *p) {
	pool *l = opaque;
	for (slot *s = l->slots; p != NULL && s < l->slots + SLOTS; s++)
		if (s->p == p) {
			s->used = 0;
			return;
		}
	free(p);
}

static pool *pool_new(void) {
	pool *l = calloc(1, sizeof *l);
	if (l != NULL)
		l->a = (lzma_allocator){pool_alloc, pool_free, l};
	return l;
}

// pool_trim gives back what is not in use.
static void pool_trim(pool *l) {
	for (slot *s = l->slots; s < l->slots + SLOTS; s++)
		if (!s->used) {
			free(s->p);
			s->p = NULL;
		}
}

static void pool_delete(pool *l) {
	pool_trim(l);
	free(l);
}

// Both return the length of the result, or minus an lzma_ret.
static long xz_pack(pool *l, uint32_t preset, uint32_t dict, void *dst, size_t room, const void *src, size_t n) {
	lzma_options_lzma options;
	if (lzma_lzma_preset(&options, preset))
		return -LZMA_OPTIONS_ERROR;
	options.dict_size = dict;
	// Levels from 6 on look for matches of up to 64 bytes, which in a block
	// this short costs a twelfth of the time for less than 0.1 % of the size.
	if (options.nice_len > 48)
		options.nice_len = 48;
	lzma_filter filters[] = {{LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, NULL}};
	size_t out = 0;
	lzma_ret ret = lzma_stream_buffer_encode(filters, LZMA_CHECK_CRC32, &l->a, src, n, dst, &out, room);
	return ret == LZMA_OK ? (long)out : -(long)ret;
}

static long xz_unpack(pool *l, uint64_t memory, void *dst, size_t room, const void *src, size_t n) {
	size_t in = 0, out = 0;
	uint64_t limit = memory;
	lzma_ret ret = lzma_stream_buffer_decode(&limit, 0, &l->a, src, &in, n, dst, &out, room);
	if (ret != LZMA_OK)
		pool_trim(l); // a stranger's dictionary size is not worth keeping
	return ret == LZMA_OK ? (long)out : -(long)ret;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"
)

const xzImplementation = "liblzma " + C.LZMA_VERSION_STRING + " (own decoder)"

type xzCompressor struct {
	pool  *C.pool
	level C.uint32_t
	dict  C.uint32_t
}

func newXZPool() (*C.pool, error) {
	if p := C.pool_new(); p != nil {
		return p, nil
	}
	return nil, errors.New("allocate for xz: out of memory")
}

func newXZCompressor(level, dictSize int) (compressor, error) {
	p, err := newXZPool()
	if err != nil {
		return nil, err
	}
	x := &xzCompressor{p, C.uint32_t(level), C.uint32_t(dictSize)}
	runtime.AddCleanup(x, func(p *C.pool) { C.pool_delete(p) }, p)
	return x, nil
}

func (x *xzCompressor) Compress(dst, src []byte) (int, bool, error) {
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	// mksquashfs gives metadata blocks a dictionary of their own size, and so
	// can we: anything that small does with it.
	dict := C.uint32_t(metaBlockSize)
	if len(src) > metaBlockSize {
		dict = x.dict
	}
	n := C.xz_pack(x.pool, x.level, dict, unsafe.Pointer(&dst[0]), C.size_t(room), unsafe.Pointer(&src[0]), C.size_t(len(src)))
	runtime.KeepAlive(x)
	switch {
	case n > 0:
		return int(n), true, nil
	case n == -C.LZMA_BUF_ERROR:
		return 0, false, nil
	}
	return 0, false, fmt.Errorf("compress an xz block: liblzma error %d", -n)
}

// xzMemory bounds what a block may make the library allocate. The dictionary of
// a SquashFS image's blocks is no larger than a block; unsquashfs has the same
// limit.
const xzMemory = 32 << 20

// xzLibrary reads all filters liblzma knows, and checks the check sums.
type xzLibrary struct{ pool *C.pool }

func newXZLibrary() (decompressor, error) {
	p, err := newXZPool()
	if err != nil {
		return nil, err
	}
	x := &xzLibrary{p}
	runtime.AddCleanup(x, func(p *C.pool) { C.pool_delete(p) }, p)
	return x, nil
}

func (x *xzLibrary) Decompress(dst, src []byte) (int, error) {
	if len(src) == 0 || len(dst) == 0 {
		return 0, corruptf("empty xz block")
	}
	n := C.xz_unpack(x.pool, xzMemory, unsafe.Pointer(&dst[0]), C.size_t(len(dst)), unsafe.Pointer(&src[0]), C.size_t(len(src)))
	runtime.KeepAlive(x)
	switch {
	case n >= 0:
		return int(n), nil
	case n == -C.LZMA_MEMLIMIT_ERROR:
		return 0, corruptf("xz block wants more than %d bytes of memory", xzMemory)
	case n == -C.LZMA_BUF_ERROR:
		return 0, corruptf("xz block is cut short or holds more than %d bytes", len(dst))
	}
	return 0, corruptf("xz block is damaged (liblzma error %d)", -n)
}
