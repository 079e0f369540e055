// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ulikunitz/xz"
)

// The seeds in testdata/fuzz are images of a few kilobytes, most of them stored
// uncompressed, so that a changed byte is not just a wrong check sum. They were
// made with mksquashfs, gensquashfs and the forgery of this package.

// FuzzOpen reads all there is in an image through the fs.FS and Verify. Nothing
// may panic, hang, or take much memory.
func FuzzOpen(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		names, budget := 0, int64(4<<20)
		walked := fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
			if names++; names > 5000 {
				return fs.SkipAll
			}
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if _, err := img.Lstat(name); err != nil {
				return err
			}
			if _, err := img.Xattrs(info.Sys().(*Inode)); err != nil {
				return err
			}
			if !info.Mode().IsRegular() || budget <= 0 {
				return nil
			}
			r, err := img.Open(name)
			if err != nil {
				return err
			}
			defer r.Close()
			n, err := io.Copy(io.Discard, io.LimitReader(r, budget))
			budget -= n
			return err
		})
		verified := Verify(ctx, img, true)
		if verified == nil && walked != nil {
			// Only content is beyond the structure.
			if err := Verify(ctx, img, false); err == nil {
				t.Errorf("verified, but the walk says %v", walked)
			}
		}
	})
}

// FuzzUnpack unpacks an image. What it makes must stay in its directory.
func FuzzUnpack(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil || img.Info().Inodes > 1000 {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		parent, err := os.MkdirTemp("", "fuzz-unpack")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(parent)
		st, err := Unpack(ctx, img, filepath.Join(parent, "root"), UnpackOptions{Workers: 2, MaxBytes: 1 << 20})
		list, lerr := os.ReadDir(parent)
		if lerr != nil || len(list) > 1 || len(list) == 1 && list[0].Name() != "root" {
			t.Fatalf("wrote outside its directory: %v, %v", list, lerr)
		}
		if err != nil {
			return
		}
		names := int64(0)
		err = filepath.WalkDir(filepath.Join(parent, "root"), func(string, fs.DirEntry, error) error {
			names++
			return nil
		})
		if want := st.Files + st.Dirs + st.Symlinks + st.Specials + st.HardLinks; err != nil || names != want {
			t.Errorf("%d names, want %d: %v", names, want, err)
		}
	})
}

// FuzzDecompress feeds the codecs directly: in an image, most changed blocks
// end at a check sum. A block must never unpack to more than its buffer.
func FuzzDecompress(f *testing.F) {
	for _, c := range []Compressor{Gzip, Zstd, LZ4, XZ} {
		comp, err := newCompressor(Options{Compressor: c, BlockSize: MinBlockSize})
		if err != nil {
			f.Fatal(err)
		}
		buf := make([]byte, MinBlockSize)
		n, ok, err := comp.Compress(buf, sample(MinBlockSize))
		if err != nil || !ok {
			f.Fatal(err)
		}
		f.Add(uint16(c), buf[:n])
	}
	var b bytes.Buffer
	w, err := xz.NewWriter(&b)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := w.Write(sample(3000)); err != nil {
		f.Fatal(err)
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(XZ), b.Bytes())
	f.Fuzz(func(t *testing.T, method uint16, src []byte) {
		dec, err := newDecompressor(Compressor(method))
		if err != nil {
			return
		}
		guard := bytes.Repeat([]byte{0x5a}, 16)
		dst := append(make([]byte, MinBlockSize), guard...)
		n, err := dec.Decompress(dst[:MinBlockSize], src)
		if n < 0 || n > MinBlockSize || err != nil && n != 0 {
			t.Errorf("%d bytes, %v", n, err)
		}
		if !bytes.Equal(dst[MinBlockSize:], guard) {
			t.Error("wrote behind the buffer")
		}
	})
}
