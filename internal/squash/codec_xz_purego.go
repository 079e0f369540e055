// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// The library has one way to compress, whatever the level, and makes larger
// images.
const xzImplementation = "ulikunitz/xz"

type xzCompressor struct {
	dict int
	out  bytes.Buffer
}

func newXZCompressor(_, dictSize int) (compressor, error) {
	return &xzCompressor{dict: dictSize}, nil
}

func (x *xzCompressor) Compress(dst, src []byte) (int, bool, error) {
	if len(src) == 0 {
		return 0, false, nil
	}
	x.out.Reset()
	dict := x.dict
	if len(src) <= metaBlockSize {
		dict = metaBlockSize
	}
	w, err := xz.WriterConfig{DictCap: dict, CheckSum: xz.CRC32}.NewWriter(&x.out)
	if err == nil {
		_, err = w.Write(src)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return 0, false, fmt.Errorf("compress an xz block: %w", err)
	}
	if n := x.out.Len(); n >= len(src) || n > len(dst) {
		return 0, false, nil
	}
	return copy(dst, x.out.Bytes()), true, nil
}

// xzDecompressor reads xz streams of one block and the LZMA2 filter, which is
// what every SquashFS writer makes. The container is parsed here, because the
// dictionary size in it is a stranger's word for up to 4 GiB of memory; a
// dictionary larger than the block's content is never needed.
type xzDecompressor struct{}

func newXZDecompressor() (decompressor, error) { return xzDecompressor{}, nil }

var crc64ECMA = crc64.MakeTable(crc64.ECMA)

// Decompress checks the headers' and the content's check sums.
func (xzDecompressor) Decompress(dst, src []byte) (int, error) {
	data, check, err := xzBlock(src)
	if err != nil {
		return 0, err
	}
	in := bytes.NewReader(data)
	r, err := lzma.Reader2Config{DictCap: max(len(dst), lzma.MinDictCap)}.NewReader2(in)
	if err != nil {
		return 0, corruptf("xz block: %v", err)
	}
	n, err := readBlock(r, dst, "xz")
	if err != nil {
		return 0, err
	}
	// The block is padded with zeroes to a multiple of four; data starts at one.
	end := len(data) - in.Len()
	sum := data[min((end+3)&^3, len(data)):]
	ok := true
	switch check {
	case 0x0:
	case 0x1:
		ok = len(sum) >= 4 && binary.LittleEndian.Uint32(sum) == crc32.ChecksumIEEE(dst[:n])
	case 0x4:
		ok = len(sum) >= 8 && binary.LittleEndian.Uint64(sum) == crc64.Checksum(dst[:n], crc64ECMA)
	}
	if !ok {
		return 0, corruptf("xz block: wrong check sum")
	}
	return n, nil
}

// xzBlock returns what follows the header of the first block, and the type of
// the check sum behind the block (xz file format 1.1.0, 2.1.1 and 3.1).
func xzBlock(src []byte) (data []byte, check byte, err error) {
	const streamHeader = 12
	if len(src) < streamHeader+8 || !bytes.HasPrefix(src, []byte("\xfd7zXZ\x00")) {
		return nil, 0, corruptf("xz block without a stream header")
	}
	if !bytes.HasSuffix(src, []byte("YZ")) {
		return nil, 0, corruptf("xz block is cut short")
	}
	if binary.LittleEndian.Uint32(src[8:]) != crc32.ChecksumIEEE(src[6:8]) || src[6] != 0 || src[7] > 0xf {
		return nil, 0, corruptf("xz block with a damaged stream header")
	}
	check = src[7]
	b := src[streamHeader:]
	size := (int(b[0]) + 1) * 4
	if b[0] == 0 || size > len(b) {
		return nil, 0, corruptf("xz block with a damaged block header")
	}
	header, data := b[:size-4], b[size:]
	if binary.LittleEndian.Uint32(b[size-4:]) != crc32.ChecksumIEEE(header) {
		return nil, 0, corruptf("xz block with a damaged block header")
	}
	flags, rest := header[1], header[2:]
	for _, present := range []byte{0x40, 0x80} { // compressed, uncompressed size
		if flags&present == 0 {
			continue
		}
		_, n := binary.Uvarint(rest)
		if n <= 0 {
			return nil, 0, corruptf("xz block with a damaged block header")
		}
		rest = rest[n:]
	}
	const lzma2ID, lzma2PropsLen = 0x21, 1
	if flags&0x03 != 0 || len(rest) < 3 || rest[0] != lzma2ID || rest[1] != lzma2PropsLen {
		return nil, 0, errors.New("xz block uses a filter beside LZMA2 (mksquashfs -Xbcj): only plain LZMA2 is built in")
	}
	return data, check, nil
}
