// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package squash

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/squash/internal/xz"
	"github.com/ulikunitz/xz/lzma"
)

// xzStream wraps the chunks of LZMA2 that unpack to n bytes. header is what the
// block's header has between its size and its padding.
func xzStream(chunks []byte, n int, header ...byte) []byte {
	pad := func(b []byte) []byte {
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
		return b
	}
	sum := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b)) }
	flags := []byte{0, 0}
	s := append([]byte("\xfd7zXZ\x00"), sum(flags)...)
	header = pad(append([]byte{0}, header...))
	header[0] = byte(len(header) / 4)
	header = sum(header)
	s = pad(append(append(s, header...), chunks...))
	index := binary.AppendUvarint([]byte{0, 1}, uint64(len(header)+len(chunks)))
	index = pad(binary.AppendUvarint(index, uint64(n)))
	s = append(s, sum(index)...)
	footer := append(binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4)), flags...)
	s = binary.LittleEndian.AppendUint32(s, crc32.ChecksumIEEE(footer))
	return append(append(s, footer...), "YZ"...)
}

// lzma2Chunks packs src.
func lzma2Chunks(t testing.TB, src []byte, conf lzma.Writer2Config) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := conf.NewWriter2(&b)
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

// sameXZ gives a stream to our decoder and to liblzma, which must agree.
func sameXZ(t *testing.T, library decompressor, room int, src []byte) (accepted bool) {
	t.Helper()
	var own xz.Decoder
	got, want := make([]byte, room), make([]byte, room)
	n, err := own.Decode(got, src)
	m, libraryErr := library.Decompress(want, src)
	if (err == nil) != (libraryErr == nil) || !bytes.Equal(got[:n], want[:m]) {
		t.Errorf("%d bytes, %v; liblzma: %d bytes, %v", n, err, m, libraryErr)
	}
	return err == nil
}

func TestXZHeaders(t *testing.T) {
	library, err := newXZLibrary()
	if err != nil {
		t.Fatal(err)
	}
	src := append(append(noise(5000), sample(5000)...), noise(5000)...) // the last ones are a match far away
	chunks := lzma2Chunks(t, src, lzma.Writer2Config{})
	packed, unpacked := binary.AppendUvarint(nil, uint64(len(chunks))), binary.AppendUvarint(nil, uint64(len(src)))
	wrong := binary.AppendUvarint(nil, uint64(len(src)+1))
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	filter := []byte{0x21, 1, 22}
	for name, tc := range map[string]struct {
		header []byte
		want   bool
	}{
		"no sizes":              {join([]byte{0}, filter), true},
		"packed size":           {join([]byte{0x40}, packed, filter), true},
		"unpacked size":         {join([]byte{0x80}, unpacked, filter), true},
		"both sizes":            {join([]byte{0xc0}, packed, unpacked, filter), true},
		"wrong packed size":     {join([]byte{0x40}, wrong, filter), false},
		"wrong unpacked size":   {join([]byte{0x80}, wrong, filter), false},
		"no packed size at all": {join([]byte{0x40, 0}, filter), false},
		"size in a byte more":   {join([]byte{0x80}, []byte{unpacked[0], unpacked[1] | 0x80, 0}, filter), false},
		"size without end":      {join([]byte{0x80}, bytes.Repeat([]byte{0xff}, 12)), false},
		"size of ten bytes":     {join([]byte{0x80}, bytes.Repeat([]byte{0x80}, 9), []byte{1}, filter), false},
		"nothing after flags":   {[]byte{0xc0}, false},
		"small dictionary":      {[]byte{0, 0x21, 1, 0}, false},
		"padding of a word":     {join([]byte{0}, filter, make([]byte, 8)), true},
		"padding not of zeroes": {join([]byte{0}, filter, []byte{0, 0, 1}), false},
	} {
		t.Run(name, func(t *testing.T) {
			if sameXZ(t, library, len(src), xzStream(chunks, len(src), tc.header...)) != tc.want {
				t.Errorf("accepted: %v", !tc.want)
			}
		})
	}
}

// FuzzXZ wraps chunks in a stream that says what they unpack to, according to a
// third library, so that only the chunks decide. That is for streams our decoder
// reads; the others are liblzma's alone.
func FuzzXZ(f *testing.F) {
	const room = 20000
	for _, conf := range []lzma.Writer2Config{
		{}, {Properties: &lzma.Properties{LC: 0, LP: 3, PB: 1}}, {Properties: &lzma.Properties{LC: 4, LP: 0, PB: 4}},
	} {
		for _, src := range [][]byte{sample(40), sample(room), noise(300), bytes.Repeat([]byte("abc"), 2000)} {
			f.Add(lzma2Chunks(f, src, conf), byte(0))
		}
	}
	library, err := newXZLibrary()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, chunks []byte, dictionary byte) {
		n := 0
		r, err := lzma.Reader2Config{DictCap: 1 << 16}.NewReader2(bytes.NewReader(chunks))
		if err == nil {
			n, _ = io.ReadFull(r, make([]byte, room))
		}
		sameXZ(t, library, room, xzStream(chunks, n, 0, 0x21, 1, dictionary%23))
	})
}
