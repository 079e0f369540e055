// SPDX-License-Identifier: Apache-2.0

package xz

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	ulikunitz "github.com/ulikunitz/xz"
	ulzma "github.com/ulikunitz/xz/lzma"
)

// content returns n bytes with what LZMA has symbols for: literals after
// matches and after literals, short and long matches, near and far ones, and
// distances that come again.
func content(n int) []byte {
	r := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, 0, n+300)
	for len(b) < n {
		switch k := r.IntN(8); {
		case k == 0 || len(b) < 20:
			b = append(b, byte(r.IntN(40)), byte(r.Uint32()))
		case k < 3:
			b = append(b, bytes.Repeat(b[len(b)-1-r.IntN(19):], 1+r.IntN(12))...)
		default:
			at := r.IntN(len(b))
			b = append(b, b[at:min(at+2+r.IntN(30), len(b))]...)
			b = append(b, b[max(0, at-r.IntN(7)):at]...)
		}
	}
	return b[:n]
}

// pack packs src, with the other library.
func pack(t testing.TB, src []byte, conf ulikunitz.WriterConfig) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := conf.NewWriter(&b)
	if err == nil {
		_, err = w.Write(src)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestDecode(t *testing.T) {
	var d Decoder
	for _, n := range []int{1, 2, 300, 5000, 128 << 10, 1 << 20} {
		src := content(n)
		for _, conf := range []ulikunitz.WriterConfig{
			{}, {CheckSum: ulikunitz.CRC32}, {CheckSum: ulikunitz.SHA256}, {NoCheckSum: true}, {DictCap: 4096},
			{Properties: &ulzma.Properties{LC: 0, LP: 0, PB: 0}}, {Properties: &ulzma.Properties{LC: 4, LP: 0, PB: 4}},
			{Properties: &ulzma.Properties{LC: 1, LP: 3, PB: 1}}, {Properties: &ulzma.Properties{LC: 0, LP: 4, PB: 3}},
		} {
			packed := pack(t, src, conf)
			out := make([]byte, n+10)
			if m, err := d.Decode(out, packed); err != nil || !bytes.Equal(out[:m], src) {
				t.Errorf("%d bytes, %+v: %d bytes, %v", n, conf, m, err)
			}
			if m, err := d.Decode(out[:n], packed); err != nil || !bytes.Equal(out[:m], src) {
				t.Errorf("%d bytes, %+v, into as many: %d bytes, %v", n, conf, m, err)
			}
			if _, err := d.Decode(out[:n-1], packed); !errors.Is(err, errLong) {
				t.Errorf("%d bytes, %+v, into one less: %v", n, conf, err)
			}
		}
	}
}

// Every byte of a stream matters, and none may be missing.
func TestDamage(t *testing.T) {
	var d Decoder
	src := content(150)
	for _, check := range []byte{ulikunitz.CRC32, ulikunitz.CRC64, ulikunitz.SHA256} {
		packed := pack(t, src, ulikunitz.WriterConfig{CheckSum: check, DictCap: 4096})
		out := make([]byte, len(src))
		if _, err := d.Decode(out, append(slices.Clone(packed), 0)); err != nil {
			t.Errorf("check %d, with a byte behind the stream: %v", check, err)
		}
		for i := range packed {
			if _, err := d.Decode(out, packed[:i]); err == nil {
				t.Errorf("check %d: no error for %d of %d bytes", check, i, len(packed))
			}
			bad := slices.Clone(packed)
			for bit := range 8 {
				bad[i] = packed[i] ^ 1<<bit
				if _, err := d.Decode(out, bad); err == nil {
					t.Errorf("check %d: no error for bit %d of byte %d", check, bit, i)
				}
			}
		}
	}
}

// What a header can say that is no damage.
func TestUnsupported(t *testing.T) {
	src := content(600)
	header := func(change func(h []byte)) []byte {
		packed := pack(t, src, ulikunitz.WriterConfig{DictCap: 4096})
		h := packed[headerLen:][:(int(packed[headerLen])+1)*4]
		change(h)
		binary.LittleEndian.PutUint32(h[len(h)-4:], crc32.ChecksumIEEE(h[:len(h)-4]))
		return packed
	}
	two := ulikunitz.WriterConfig{BlockSize: 300}
	for name, packed := range map[string][]byte{
		"two filters":      header(func(h []byte) { h[1] |= 1 }),
		"another filter":   header(func(h []byte) { h[2] = 0x04 }),
		"a reserved flag":  header(func(h []byte) { h[1] |= 0x20 }),
		"a large size":     header(func(h []byte) { h[4] = 41 }),
		"padding not zero": header(func(h []byte) { h[5] = 1 }),
		"two blocks":       pack(t, src, two),
		"no block":         append(pack(t, src, two)[:headerLen:headerLen], 0, 0, 0, 0),
	} {
		var d Decoder
		if n, err := d.Decode(make([]byte, 600), packed); !errors.Is(err, ErrUnsupported) || n != 0 {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
}

// FuzzLZMA2 gives a sequence of chunks to the assembly, to the code in Go it
// stands for, and to another library. All must make the same of it, and nobody
// may write behind the buffer.
func FuzzLZMA2(f *testing.F) {
	const room = 20000
	for _, conf := range []ulzma.Writer2Config{
		{}, {Properties: &ulzma.Properties{LC: 0, LP: 2, PB: 0}}, {Properties: &ulzma.Properties{LC: 4, LP: 0, PB: 4}},
	} {
		for _, src := range [][]byte{content(30), content(room), bytes.Repeat([]byte("a"), 5000), bytes.Repeat([]byte("abc"), 300)} {
			var b bytes.Buffer
			w, err := conf.NewWriter2(&b)
			if err != nil {
				f.Fatal(err)
			}
			for part := range slices.Chunk(src, 7000) {
				if _, err = w.Write(part); err == nil {
					err = w.Flush()
				}
				if err != nil {
					f.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				f.Fatal(err)
			}
			f.Add(b.Bytes())
		}
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		guard := bytes.Repeat([]byte{0xa5}, 64)
		var got [2][]byte
		var took [2]int
		var errs [2]error
		for i, decode := range []decoder{(*lzma).decode, (*lzma).decodeGo} {
			l := &lzma{dict: 1<<32 - 1}
			dst := append(make([]byte, room), guard...)
			var n int
			n, took[i], errs[i] = l.lzma2(dst[:room], src, decode)
			if got[i] = dst[:n]; !bytes.Equal(dst[room:], guard) {
				t.Error("wrote behind the buffer")
			}
		}
		if !bytes.Equal(got[0], got[1]) || took[0] != took[1] || errs[0] != errs[1] {
			t.Fatalf("assembly: %d bytes from %d, %v; Go: %d bytes from %d, %v", len(got[0]), took[0], errs[0], len(got[1]), took[1], errs[1])
		}
		if errs[0] != nil {
			return
		}
		r, err := ulzma.NewReader2(bytes.NewReader(src))
		if err != nil {
			t.Fatalf("accepts what the other does not: %v", err)
		}
		if other, err := io.ReadAll(r); err != nil || !bytes.Equal(other, got[0]) {
			t.Errorf("%d bytes, the other %d, %v", len(got[0]), len(other), err)
		}
	})
}
