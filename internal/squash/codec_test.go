// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// sample returns n bytes that compress to about half.
func sample(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	words := noise(2000)
	for i := 0; i < n; {
		w := r.IntN(len(words) - 8)
		i += copy(b[i:], words[w:w+3+r.IntN(6)])
	}
	return b
}

// noise returns n bytes that do not compress.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(3, 4))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestCodecRoundTrip(t *testing.T) {
	for _, tc := range []struct {
		c     Compressor
		level int
	}{{Gzip, 0}, {Gzip, 1}, {Gzip, 9}, {Zstd, 0}, {Zstd, 1}, {Zstd, 15}, {Zstd, 22}, {LZ4, 0}, {LZ4, 1}, {LZ4, maxLZ4Level}, {XZ, 0}, {XZ, 1}, {XZ, 9}} {
		comp, err := newCompressor(Options{Compressor: tc.c, Level: tc.level, BlockSize: DefaultBlockSize})
		if err != nil {
			t.Fatal(err)
		}
		dec, err := newDecompressor(tc.c)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{50, metaBlockSize, DefaultBlockSize - 1, DefaultBlockSize} {
			src := sample(n)
			packed := make([]byte, n)
			p, ok, err := comp.Compress(packed, src)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				if n > metaBlockSize {
					t.Errorf("%v level %d: %d bytes did not become smaller", tc.c, tc.level, n)
				}
				continue
			}
			if p >= n {
				t.Errorf("%v level %d: %d bytes became %d", tc.c, tc.level, n, p)
			}
			out := make([]byte, DefaultBlockSize)
			m, err := dec.Decompress(out, packed[:p])
			if err != nil || !bytes.Equal(out[:m], src) {
				t.Errorf("%v level %d: %d bytes came back as %d, %v", tc.c, tc.level, n, m, err)
			}
			if m, err = dec.Decompress(out[:n], packed[:p]); err != nil || m != n {
				t.Errorf("%v level %d: %d bytes into a buffer of that length: %d, %v", tc.c, tc.level, n, m, err)
			}
			guarded := bytes.Repeat([]byte{0xa5}, n+64)
			if _, err := dec.Decompress(guarded[:n-1], packed[:p]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%v level %d: no error for a block one byte too long: %v", tc.c, tc.level, err)
			}
			if !bytes.Equal(guarded[n-1:], bytes.Repeat([]byte{0xa5}, 65)) {
				t.Errorf("%v level %d: wrote behind its buffer", tc.c, tc.level)
			}
			if _, err := dec.Decompress(out, packed[:p-1]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%v level %d: no error for a block cut short: %v", tc.c, tc.level, err)
			}
		}
		src := noise(DefaultBlockSize)
		if n, ok, err := comp.Compress(make([]byte, len(src)), src); n != 0 || ok || err != nil {
			t.Errorf("%v level %d: noise gave %d, %v, %v", tc.c, tc.level, n, ok, err)
		}
		if _, err := newCompressor(Options{Compressor: tc.c, Level: 99, BlockSize: DefaultBlockSize}); err == nil {
			t.Errorf("%v: level 99 was accepted", tc.c)
		}
	}
}

func TestXZ(t *testing.T) {
	dec, err := newDecompressor(XZ)
	if err != nil {
		t.Fatal(err)
	}
	src := sample(20000)
	for _, check := range []byte{xz.None, xz.CRC32, xz.CRC64, xz.SHA256} {
		var b bytes.Buffer
		w, err := xz.WriterConfig{CheckSum: check, NoCheckSum: check == xz.None}.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(src); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		out := make([]byte, len(src))
		n, err := dec.Decompress(out, b.Bytes())
		if err != nil || !bytes.Equal(out[:n], src) {
			t.Errorf("check %d: %d bytes, %v", check, n, err)
		}
		if _, err := dec.Decompress(out[:len(src)-1], b.Bytes()); !errors.Is(err, ErrCorrupt) {
			t.Errorf("check %d: no error for a block one byte too long: %v", check, err)
		}
		if check == xz.CRC32 || check == xz.CRC64 {
			bad := bytes.Clone(b.Bytes())
			bad[len(bad)/2] ^= 1
			if _, err := dec.Decompress(out, bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("check %d: no error for a flipped bit: %v", check, err)
			}
		}
	}
}

// A streaming zstd writer declares a window larger than the block; unsquashfs
// reads that, so we do.
func TestZstdForeignWindow(t *testing.T) {
	src := sample(5000)
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, zstd.WithWindowSize(8<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(src); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil { // forget the content size
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dec, err := newDecompressor(Zstd)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, 8192)
	n, err := dec.Decompress(out, b.Bytes())
	if err != nil || !bytes.Equal(out[:n], src) {
		t.Fatalf("%d bytes, %v", n, err)
	}
}
