// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

/*
#cgo noescape xz_step
#cgo nocallback xz_step
#include <lzma.h>
#include <stdlib.h>

static lzma_stream *xz_open(uint64_t memory) {
	lzma_stream *s = calloc(1, sizeof *s);
	if (s != NULL && lzma_stream_decoder(s, memory, LZMA_CONCATENATED) != LZMA_OK) {
		free(s);
		s = NULL;
	}
	return s;
}

static void xz_close(lzma_stream *s) {
	lzma_end(s);
	free(s);
}

static int xz_step(lzma_stream *s, const void *in, size_t n, size_t *used, void *out, size_t room, size_t *made, int last) {
	s->next_in = in;
	s->avail_in = n;
	s->next_out = out;
	s->avail_out = room;
	lzma_ret ret = lzma_code(s, last ? LZMA_FINISH : LZMA_RUN);
	*used = n - s->avail_in;
	*made = room - s->avail_out;
	s->next_in = NULL;
	s->next_out = NULL;
	return ret;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"unsafe"
)

// xzStreamMemory bounds the dictionary of an archive: xz -9 needs 65 MiB.
const xzStreamMemory = 256 << 20

type xzReader struct {
	s    *C.lzma_stream
	r    io.Reader
	buf  []byte
	in   []byte // what of buf is still to be decoded
	eof  bool
	err  error
	stop runtime.Cleanup
}

// newXZReader decodes a whole .xz file, checking its check sums.
func newXZReader(r io.Reader) (io.ReadCloser, error) {
	s := C.xz_open(xzStreamMemory)
	if s == nil {
		return nil, errors.New("allocate an xz decoder: out of memory")
	}
	x := &xzReader{s: s, r: r, buf: make([]byte, 64<<10)}
	x.stop = runtime.AddCleanup(x, func(s *C.lzma_stream) { C.xz_close(s) }, s)
	return x, nil
}

func (x *xzReader) Read(p []byte) (int, error) {
	for len(p) > 0 && x.err == nil {
		if len(x.in) == 0 && !x.eof {
			n, err := x.r.Read(x.buf)
			if x.in = x.buf[:n]; err == io.EOF {
				x.eof = true
			} else if err != nil {
				x.err = err
				break
			}
		}
		var used, made C.size_t
		last := C.int(0)
		if x.eof {
			last = 1
		}
		ret := C.xz_step(x.s, unsafe.Pointer(unsafe.SliceData(x.in)), C.size_t(len(x.in)), &used,
			unsafe.Pointer(&p[0]), C.size_t(len(p)), &made, last)
		runtime.KeepAlive(x)
		x.in = x.in[used:]
		switch ret {
		case C.LZMA_OK:
		case C.LZMA_STREAM_END:
			x.err = io.EOF
		case C.LZMA_BUF_ERROR:
			if x.eof {
				x.err = io.ErrUnexpectedEOF
			}
		case C.LZMA_MEMLIMIT_ERROR:
			x.err = fmt.Errorf("xz: the archive's dictionary needs more than %d MiB: repack it with xz -9 or less", xzStreamMemory>>20)
		default:
			x.err = fmt.Errorf("xz: the archive is damaged (liblzma error %d)", int(ret))
		}
		if made > 0 {
			return int(made), nil
		}
	}
	return 0, x.err
}

func (x *xzReader) Close() error {
	if x.s != nil {
		x.stop.Stop()
		C.xz_close(x.s)
		x.s, x.err = nil, errors.New("xz: read after close")
	}
	return nil
}
