// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// packOver packs a base with one more file, which has the content of one of its
// files, and looks whether the result is right.
func packOver(ctx context.Context, t testing.TB, base *Image, upper string, l Layout) (Stats, error) {
	t.Helper()
	src, err := LayersSource(base, upper, LayersOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	out := &memOut{}
	st, err := Pack(ctx, src, out, Options{Workers: 2, Base: &Base{Image: base, Layout: l}})
	if err != nil {
		return st, err
	}
	img, err := open(out.b)
	if err == nil {
		err = Verify(ctx, img, true)
	}
	if err != nil {
		if ctx.Err() == nil {
			t.Errorf("%v: the image is not one: %v", l, err)
		}
		return st, nil
	}
	budget := int64(1 << 20) // what of the content is compared
	fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Errorf("%v: %v", l, err)
		}
		if err != nil || ctx.Err() != nil || budget < 0 {
			return fs.SkipAll
		}
		if !d.Type().IsRegular() || name == upperName {
			return nil
		}
		want, err := readSome(base, name)
		if err != nil {
			return nil // neither can the other be read, or the block was made anew
		}
		budget -= int64(len(want))
		if got, err := readSome(img, name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: %s holds %.40q, in the base %.40q: %v", l, name, got, want, err)
		}
		return nil
	})
	return st, nil
}

// upperName is the name of the file that packOver's upper layer has.
const upperName = "in the upper layer"

func upperLayer(t testing.TB, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, upperName), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// readSome reads the beginning of a file.
func readSome(img *Image, name string) ([]byte, error) {
	f, err := img.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10))
}

// TestHostileBases: what no honest base holds is an error, or is right in the new
// image as well.
func TestHostileBases(t *testing.T) {
	upper := upperLayer(t, "content")
	at := func(off, n int) fragmentEntry { return fragmentEntry{uint64(superblockSize + off), dataWord(n, true)} }
	tail := func(fragment, off uint32, size int) func(*inodeRecord) {
		return func(r *inodeRecord) { r.Fragment, r.FragOffset, r.Blocks, r.Size = fragment, off, nil, uint64(size) }
	}
	for name, c := range map[string]struct {
		forge func(*forgery)
		ok    bool
	}{
		"honest": {func(f *forgery) { f.root().put("a", f.file("content")) }, true},
		"extents overlap": {func(f *forgery) {
			f.data = []byte("dead data")
			f.root().put("a", f.file("content"))
			for i := range 5 {
				f.root().put(fmt.Sprint("b", i), f.file("")).fix = func(r *inodeRecord) {
					r.Start, r.Size, r.Blocks = uint64(superblockSize+i), uint64(10-i), []uint32{dataWord(10-i, true)}
				}
			}
		}, true},
		"fragments overlap": {func(f *forgery) {
			f.data = []byte("dead data and a fragment")
			f.frags = []fragmentEntry{at(10, 14), at(12, 12), at(10, 14), at(0, 9)}
			for i := range f.frags[:3] {
				f.root().put(fmt.Sprint("t", i), f.file("")).fix = tail(uint32(i), uint32(i), 9)
			}
			f.root().put("u", f.file("")).fix = func(r *inodeRecord) {
				r.Start, r.Size, r.Blocks = superblockSize+11, 5, []uint32{dataWord(5, true)}
			}
		}, true},
		"many tails in the same bytes": {func(f *forgery) {
			f.data = []byte("a fragment")
			f.frags = []fragmentEntry{at(0, 10)}
			for i := range 2000 {
				f.root().put(fmt.Sprintf("t%04d", i), f.file("")).fix = tail(0, uint32(i%3), 7)
			}
		}, true},
		"fragment out of range": {func(f *forgery) { f.root().put("a", f.file("x")).fix = tail(3, 0, 1) }, false},
		"fragment outside the image": {func(f *forgery) {
			f.root().put("a", f.file("x")).fix = tail(0, 0, 1)
			f.frags = []fragmentEntry{at(1<<30, 9)}
		}, false},
		"extent outside the image": {func(f *forgery) { f.root().put("a", f.file("x")).fix = func(r *inodeRecord) { r.Start = 1 << 20 } }, false},
		"extent in the options": {func(f *forgery) {
			f.data = stored(make([]byte, 8))
			f.root().put("a", f.file("content")).fix = func(r *inodeRecord) { r.Start = superblockSize + 1 }
			f.sb = func(s *superblock) { s.Flags |= flagCompressorOptions }
		}, false},
		"an inode nobody names out of range": {func(f *forgery) { f.file("x").fix = tail(7, 0, 1) }, false},
	} {
		for _, l := range []Layout{LayoutAppend, LayoutCompact} {
			t.Run(fmt.Sprint(name, " ", l), func(t *testing.T) {
				f := newForgery()
				c.forge(f)
				img, err := open(f.image(t))
				if err != nil {
					t.Fatal(err)
				}
				st, err := packOver(t.Context(), t, img, upper, l)
				if (err == nil) != c.ok {
					t.Errorf("%v", err)
				}
				if c.ok && (st.Base == nil || st.Base.Refused != "" || st.Base.Files == 0 && len(f.nodes) > 2) {
					t.Errorf("nothing was taken over: %+v", st.Base)
				}
			})
		}
	}
}

// FuzzBase packs over any base. It must end in an error or in an image that holds
// what the base does.
func FuzzBase(f *testing.F) {
	upper := upperLayer(f, "content")
	honest := newForgery()
	honest.data, honest.frags = []byte("a fragment"), []fragmentEntry{{superblockSize, dataWord(10, true)}}
	honest.root().put("a", honest.file("content"))
	honest.root().put("b", honest.file("")).fix = func(r *inodeRecord) { r.Fragment, r.FragOffset, r.Blocks, r.Size = 0, 2, nil, 8 }
	f.Add(honest.image(f))
	for _, c := range []Compressor{Gzip, Zstd, XZ, LZ4} {
		out, _ := packMem(f, dirSourceOf(f, upper, DirOptions{}), Options{Compressor: c, BlockSize: MinBlockSize})
		f.Add(out.b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := open(b)
		if err != nil || img.Info().Inodes > 1000 {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		for _, l := range []Layout{LayoutAppend, LayoutCompact} {
			packOver(ctx, t, img, upper, l)
		}
	})
}

// FuzzIndex reads any records in an index of the right image, one of them of the
// file that is there. No record may harm, or give a file another's content.
func FuzzIndex(f *testing.F) {
	dir := upperLayer(f, "content")
	out, _ := packMem(f, dirSourceOf(f, dir, DirOptions{}), Options{BlockSize: MinBlockSize})
	img := out.image(f)
	tree, index := unpacked(f, img)
	honest, err := os.ReadFile(index)
	if err != nil {
		f.Fatal(err)
	}
	record := honest[indexHeaderSize:][:indexRecordSize]
	f.Add(record[20:], []byte(nil))
	f.Fuzz(func(t *testing.T, ref, more []byte) {
		b := slices.Concat(honest[:indexHeaderSize], record[:20], ref, more)
		sum := sha256.Sum256(b)
		name := filepath.Join(t.TempDir(), "index")
		if err := os.WriteFile(name, append(b, sum[:]...), 0o600); err != nil {
			t.Fatal(err)
		}
		x, err := OpenIndex(name, img)
		if err != nil {
			return
		}
		out, _ := packMem(t, dirSourceOf(t, tree, DirOptions{Index: x}), Options{Base: &Base{Image: img}})
		if b, err := fs.ReadFile(out.image(t), upperName); string(b) != "content" {
			t.Errorf("%q, %v", b, err)
		}
	})
}
