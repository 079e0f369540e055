// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"fmt"
	"math"
)

const (
	dirHeaderSize = 12
	dirEntrySize  = 8 // without the name
	dirIndexSize  = 12
)

// dirHeader stands before each run of at most 256 directory entries whose
// inodes lie in one metadata block and whose inode numbers are within 32 KiB
// of Number.
type dirHeader struct {
	Count  int    // 1..256; stored less one
	Start  uint32 // metadata block of the inodes, relative to the inode table
	Number uint32 // inode number the entries' numbers are relative to
}

// append appends the header to dst; the caller keeps Count in 1..256.
func (h dirHeader) append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(h.Count-1))
	dst = binary.LittleEndian.AppendUint32(dst, h.Start)
	return binary.LittleEndian.AppendUint32(dst, h.Number)
}

func decodeDirHeader(b []byte) (dirHeader, error) {
	count := binary.LittleEndian.Uint32(b)
	if count >= maxDirEntries {
		return dirHeader{}, corruptf("directory header counts %d entries: the limit is %d", uint64(count)+1, maxDirEntries)
	}
	return dirHeader{
		Count:  int(count) + 1,
		Start:  binary.LittleEndian.Uint32(b[4:]),
		Number: binary.LittleEndian.Uint32(b[8:]),
	}, nil
}

// dirEntryRecord is one entry of a directory listing, its inode number already
// made absolute.
type dirEntryRecord struct {
	Offset uint16    // of the inode in the metadata block dirHeader.Start
	Number uint32    // absolute inode number
	Type   inodeType // basic kind
	Name   string
}

// fits tells whether the entry can stand under header h as far as its inode
// number is concerned: the difference is a signed 16-bit number.
func (e *dirEntryRecord) fits(h dirHeader) bool {
	d := int64(e.Number) - int64(h.Number)
	return d >= math.MinInt16 && d <= math.MaxInt16
}

// append appends the entry to dst.
func (e *dirEntryRecord) append(dst []byte, h dirHeader) ([]byte, error) {
	if err := checkName(e.Name); err != nil {
		return dst, err
	}
	if !e.fits(h) {
		return dst, fmt.Errorf("inode number %d is more than 32767 from its header's %d", e.Number, h.Number)
	}
	le := binary.LittleEndian
	dst = le.AppendUint16(dst, e.Offset)
	dst = le.AppendUint16(dst, uint16(int16(int64(e.Number)-int64(h.Number))))
	dst = le.AppendUint16(dst, uint16(e.Type.basic()))
	dst = le.AppendUint16(dst, uint16(len(e.Name)-1))
	return append(dst, e.Name...), nil
}

// decodeDirEntry reads the fixed part of an entry and returns the length of
// the name that follows it.
func decodeDirEntry(b []byte, h dirHeader) (e dirEntryRecord, nameLen int, err error) {
	le := binary.LittleEndian
	e.Offset = le.Uint16(b)
	number := int64(h.Number) + int64(int16(le.Uint16(b[2:])))
	e.Type = inodeType(le.Uint16(b[4:]))
	nameLen = int(le.Uint16(b[6:])) + 1
	switch {
	case number < 1 || number > math.MaxUint32:
		return e, 0, corruptf("directory entry with inode number %d", number)
	case !e.Type.valid() || e.Type.extended():
		return e, 0, corruptf("directory entry with inode type %d", e.Type)
	case nameLen > maxNameLen:
		return e, 0, corruptf("directory entry with a name of %d bytes: the limit is %d", nameLen, maxNameLen)
	}
	e.Number = uint32(number)
	return e, nameLen, nil
}

// dirIndex tells at which metadata block of a listing a name is to be looked
// for: the first name at or behind Offset is Name.
type dirIndex struct {
	Offset uint32 // bytes of the listing before the header that begins with Name
	Start  uint32 // metadata block of that header, relative to the directory table
	Name   string
}

func (x dirIndex) append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, x.Offset)
	dst = le.AppendUint32(dst, x.Start)
	dst = le.AppendUint32(dst, uint32(len(x.Name)-1))
	return append(dst, x.Name...)
}

func decodeDirIndex(src *metaCursor) (dirIndex, error) {
	b, err := src.take(dirIndexSize)
	if err != nil {
		return dirIndex{}, err
	}
	le := binary.LittleEndian
	x := dirIndex{Offset: le.Uint32(b), Start: le.Uint32(b[4:])}
	n := le.Uint32(b[8:])
	if n >= maxNameLen {
		return x, corruptf("directory index with a name of %d bytes", uint64(n)+1)
	}
	if b, err = src.take(int(n) + 1); err != nil {
		return x, err
	}
	x.Name = string(b)
	return x, nil
}

// checkName refuses names that cannot stand in a directory, or that would mean
// another directory when used as a path.
func checkName(name string) error {
	switch {
	case name == "":
		return corruptf("empty name")
	case len(name) > maxNameLen:
		return corruptf("name of %d bytes: the limit is %d", len(name), maxNameLen)
	case name == "." || name == "..":
		return corruptf("directory entry named %q", name)
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return corruptf("name %q contains a slash or a NUL byte", name)
		}
	}
	return nil
}
