// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zlib"
)

const gzipImplementation = "klauspost/compress"

const maxGzipLevel = 9

type gzipCompressor struct {
	w   *zlib.Writer
	out boundedWriter
}

func newGzipCompressor(level int) (compressor, error) {
	w, err := zlib.NewWriterLevel(io.Discard, level)
	if err != nil {
		return nil, fmt.Errorf("gzip level %d: %w", level, err)
	}
	return &gzipCompressor{w: w}, nil
}

func (g *gzipCompressor) Compress(dst, src []byte) (int, bool, error) {
	room := min(len(dst), len(src)-1)
	if room <= 0 {
		return 0, false, nil
	}
	g.out = boundedWriter{buf: dst[:room]}
	g.w.Reset(&g.out)
	_, err := g.w.Write(src)
	if err == nil {
		err = g.w.Close()
	}
	switch {
	case errors.Is(err, errNoRoom):
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("compress a gzip block: %w", err)
	}
	return g.out.n, true, nil
}

var errNoRoom = errors.New("result is not smaller than its input")

// boundedWriter writes to a slice and fails when that is full.
type boundedWriter struct {
	buf []byte
	n   int
}

func (w *boundedWriter) Write(p []byte) (int, error) {
	n := copy(w.buf[w.n:], p)
	w.n += n
	if n < len(p) {
		return n, errNoRoom
	}
	return n, nil
}

type gzipDecompressor struct {
	r   io.ReadCloser
	src bytes.Reader
}

func newGzipDecompressor() (decompressor, error) { return &gzipDecompressor{}, nil }

func (g *gzipDecompressor) Decompress(dst, src []byte) (int, error) {
	g.src.Reset(src)
	var err error
	if g.r == nil {
		g.r, err = zlib.NewReader(&g.src)
	} else {
		err = g.r.(zlib.Resetter).Reset(&g.src, nil)
	}
	if err != nil {
		return 0, corruptf("gzip block: %v", err)
	}
	return readBlock(g.r, dst, "gzip")
}
