// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// memSource is a tree given as entries in the order of a walk; the root need
// not be given.
type memSource []Entry

func (s memSource) Walk(ctx context.Context, fn func(*Entry) error) error {
	if len(s) == 0 || s[0].Path != "." {
		if err := fn(&Entry{Path: ".", Mode: unix.S_IFDIR | 0o755}); err != nil {
			return err
		}
	}
	for _, e := range s {
		if err := fn(&e); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (memSource) Close() error { return nil }

func memDir(path string) Entry { return Entry{Path: path, Mode: unix.S_IFDIR | 0o755} }

func memFile(path string, content []byte) Entry {
	return Entry{Path: path, Mode: unix.S_IFREG | 0o644, Size: int64(len(content)), Content: memContent(content)}
}

// memContent is a file in memory.
type memContent []byte

func (c memContent) Open() (ContentReader, error)          { return c, nil }
func (c memContent) Close() error                          { return nil }
func (c memContent) NextData(off int64) (int64, error)     { return off, nil }
func (c memContent) ReadAt(p []byte, o int64) (int, error) { return bytes.NewReader(c).ReadAt(p, o) }

// hollow is a file of the given size with data only at its end, which must not
// be read anywhere else.
type hollow struct {
	size int64
	data []byte
}

func memHollow(path string, size int64, data string) Entry {
	return Entry{Path: path, Mode: unix.S_IFREG | 0o644, Size: size, Content: hollow{size, []byte(data)}}
}

func (h hollow) Open() (ContentReader, error) { return h, nil }
func (h hollow) Close() error                 { return nil }

func (h hollow) NextData(off int64) (int64, error) { return max(off, h.size-int64(len(h.data))), nil }

func (h hollow) ReadAt(p []byte, off int64) (int, error) {
	if off+MaxBlockSize < h.size-int64(len(h.data)) {
		return 0, fmt.Errorf("read of a hole at %d", off)
	}
	clear(p)
	for i := range p {
		if at := off + int64(i) - (h.size - int64(len(h.data))); at >= 0 {
			p[i] = h.data[at]
		}
	}
	return len(p), nil
}

// memOut is an image in memory.
type memOut struct {
	mu sync.Mutex
	b  []byte
}

func (o *memOut) WriteAt(p []byte, off int64) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if need := int(off) + len(p); need > len(o.b) {
		o.b = append(o.b, make([]byte, need-len(o.b))...)
	}
	return copy(o.b[off:], p), nil
}

func (o *memOut) image(t testing.TB) *Image {
	t.Helper()
	img, err := Open(bytes.NewReader(o.b), int64(len(o.b)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// packMem packs to memory.
func packMem(t testing.TB, src Source, opt Options) (*memOut, Stats) {
	t.Helper()
	out := &memOut{}
	st, err := Pack(t.Context(), src, out, opt)
	if err != nil {
		t.Fatal(err)
	}
	if st.BytesOut != int64(len(out.b)) || len(out.b)%imagePadding != 0 {
		t.Fatalf("image of %d bytes, reported as %d", len(out.b), st.BytesOut)
	}
	return out, st
}

// packDir packs a directory to a file and returns its path.
func packDir(t testing.TB, dir string, opt Options) (string, Stats) {
	t.Helper()
	return packSource(t, dirSourceOf(t, dir, DirOptions{}), opt)
}

func packSource(t testing.TB, src Source, opt Options) (string, Stats) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.sqsh")
	st, err := PackFile(t.Context(), src, path, opt)
	if err != nil {
		t.Fatal(err)
	}
	return path, st
}

func dirSourceOf(t testing.TB, dir string, opt DirOptions) Source {
	t.Helper()
	src, err := DirSource(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return src
}

var _ io.WriterAt = (*memOut)(nil)
