// SPDX-License-Identifier: Apache-2.0

// Package xz decodes .xz streams that are in memory as a whole into a buffer
// that is known to hold the result, which is what the blocks of a SquashFS image
// are: one block, compressed with LZMA2 alone. Because the result is the
// dictionary and nothing is ever resumed, that takes less time than a library
// for streams needs; the middle of each chunk is assembly on amd64.
//
// A stream is input from strangers: every size, check sum and distance is
// checked, and memory does not depend on what it says.
//
// Filters beside LZMA2, several blocks or none in a stream, and check sums
// other than CRC32, CRC64 and SHA-256 answer [ErrUnsupported]. What follows the
// stream is not looked at.
//
// The formats are those of the .xz file format 1.1.0 and of Igor Pavlov's LZMA
// specification; LZMA2 has none but its implementations.
package xz

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/crc64"
)

// ErrUnsupported is for streams that may be valid but are not for this package.
var ErrUnsupported = errors.New("not one block of plain LZMA2")

// What is wrong with a stream.
var (
	errShort   = errors.New("cut short")
	errLong    = errors.New("holds more than its buffer")
	errDamaged = errors.New("damaged")
	errSum     = errors.New("wrong check sum")
)

// The sizes and marks of the file format, version 1.1.0.
const (
	headerMagic, footerMagic = "\xfd7zXZ\x00", "YZ"

	headerLen = 12

	checkNone, checkCRC32, checkCRC64, checkSHA256 = 0x0, 0x1, 0x4, 0xa

	lzma2ID, lzma2PropsLen, maxDictBits = 0x21, 1, 40
)

var (
	checkLens  = map[byte]int{checkNone: 0, checkCRC32: 4, checkCRC64: 8, checkSHA256: sha256.Size}
	crc64Table = crc64.MakeTable(crc64.ECMA)
)

// Decoder decodes one stream after the other. It is not safe for concurrent
// use. The zero value is ready.
type Decoder struct{ lzma lzma }

// Decode writes what the stream at the beginning of src holds into dst and
// returns its length. It may also write behind that, within dst.
func (d *Decoder) Decode(dst, src []byte) (int, error) {
	if len(src) < headerLen {
		return 0, errShort
	}
	flags := src[6:8]
	if !bytes.HasPrefix(src, []byte(headerMagic)) || binary.LittleEndian.Uint32(src[8:]) != crc32.ChecksumIEEE(flags) {
		return 0, errDamaged
	}
	check := flags[1]
	checkLen, ok := checkLens[check]
	if !ok || flags[0] != 0 {
		return 0, ErrUnsupported
	}
	b := src[headerLen:]
	h, err := parseBlockHeader(b)
	if err != nil {
		return 0, err
	}
	d.lzma.dict = h.dict
	n, packed, err := d.lzma.lzma2(dst, b[h.len:], (*lzma).decode)
	if err != nil {
		return 0, err
	}
	end := h.len + packed
	padded := (end + 3) &^ 3
	if len(b)-padded < checkLen {
		return 0, errShort
	}
	if !allZero(b[end:padded]) || h.packed >= 0 && h.packed != int64(packed) || h.unpacked >= 0 && h.unpacked != int64(n) {
		return 0, errDamaged
	}
	if !sumIs(b[padded:padded+checkLen], check, dst[:n]) {
		return 0, errSum
	}
	if err := checkEnd(b[padded+checkLen:], end+checkLen, n, flags); err != nil {
		return 0, err
	}
	return n, nil
}

// blockHeader is what precedes the data of a block. Sizes it does not give are
// negative.
type blockHeader struct {
	len              int
	packed, unpacked int64
	dict             uint32
}

func parseBlockHeader(b []byte) (h blockHeader, err error) {
	if len(b) == 0 {
		return h, errShort
	}
	if b[0] == 0 { // the index: no block at all
		return h, ErrUnsupported
	}
	h.len = (int(b[0]) + 1) * 4
	if h.len > len(b) {
		return h, errShort
	}
	rest, sum := b[:h.len-4], b[h.len-4:]
	if binary.LittleEndian.Uint32(sum) != crc32.ChecksumIEEE(rest) {
		return h, errSum
	}
	flags := rest[1]
	rest = rest[2:]
	h.packed, h.unpacked = -1, -1
	if flags&0x40 != 0 {
		if h.packed, rest = vli(rest); h.packed <= 0 {
			return h, errDamaged
		}
	}
	if flags&0x80 != 0 {
		if h.unpacked, rest = vli(rest); h.unpacked < 0 {
			return h, errDamaged
		}
	}
	if flags&0x3f != 0 || len(rest) < 3 || rest[0] != lzma2ID || rest[1] != lzma2PropsLen || rest[2] > maxDictBits || !allZero(rest[3:]) {
		return h, ErrUnsupported
	}
	h.dict = 1<<32 - 1
	if bits := rest[2]; bits < maxDictBits {
		h.dict = (2 | uint32(bits&1)) << (bits/2 + 11)
	}
	return h, nil
}

// sumIs tells whether sum is the check of data.
func sumIs(sum []byte, check byte, data []byte) bool {
	switch check {
	case checkCRC32:
		return binary.LittleEndian.Uint32(sum) == crc32.ChecksumIEEE(data)
	case checkCRC64:
		return binary.LittleEndian.Uint64(sum) == crc64.Checksum(data, crc64Table)
	case checkSHA256:
		s := sha256.Sum256(data)
		return bytes.Equal(sum, s[:])
	}
	return true
}

// checkEnd checks that b begins with the index of a stream of one block and with
// the footer. There is but one way to write either.
func checkEnd(b []byte, unpadded, unpacked int, flags []byte) error {
	if len(b) > 1 && b[0] != 0 {
		return ErrUnsupported // another block
	}
	want := binary.AppendUvarint([]byte{0, 1}, uint64(unpadded))
	want = binary.AppendUvarint(want, uint64(unpacked))
	for len(want)%4 != 0 {
		want = append(want, 0)
	}
	size := len(want) // without the check sum, as many words as the footer is to say
	want = binary.LittleEndian.AppendUint32(want, crc32.ChecksumIEEE(want))
	footer := append(binary.LittleEndian.AppendUint32(nil, uint32(size/4)), flags...)
	want = binary.LittleEndian.AppendUint32(want, crc32.ChecksumIEEE(footer))
	want = append(append(want, footer...), footerMagic...)
	if !bytes.HasPrefix(b, want) {
		return errDamaged
	}
	return nil
}

// vli decodes a number of the format. It is negative if there is none.
func vli(b []byte) (int64, []byte) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n > 9 || n > 1 && b[n-1] == 0 {
		return -1, nil
	}
	return int64(v), b[n:]
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
