// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"strings"
)

// Extended attribute name prefixes, stored as a number before the rest of the
// name. xattrOutOfLine is set when the value is an 8-byte reference to where
// the value really stands, because another inode has the same one.
const (
	xattrUser      = 0
	xattrTrusted   = 1
	xattrSecurity  = 2
	xattrTypeMask  = 0xff
	xattrOutOfLine = 0x100

	xattrKeySize   = 4 // type and name length, before the name
	xattrValueSize = 4 // value length, before the value
	xattrRefSize   = 8 // an out-of-line value
)

var xattrPrefixes = [...]string{xattrUser: "user.", xattrTrusted: "trusted.", xattrSecurity: "security."}

// splitXattrName returns the stored prefix number and the rest of a full
// attribute name; ok is false when the format has no prefix for it.
func splitXattrName(name string) (prefix uint16, rest string, ok bool) {
	for i, p := range xattrPrefixes {
		if rest, ok := strings.CutPrefix(name, p); ok && rest != "" {
			return uint16(i), rest, true
		}
	}
	return 0, "", false
}

// joinXattrName is the reverse of splitXattrName.
func joinXattrName(typ uint16, rest string) (string, error) {
	prefix := int(typ & xattrTypeMask)
	if prefix >= len(xattrPrefixes) || typ&^uint16(xattrTypeMask|xattrOutOfLine) != 0 {
		return "", corruptf("extended attribute with type %#x", typ)
	}
	return xattrPrefixes[prefix] + rest, nil
}

// appendXattrKey appends an attribute's key; the caller keeps rest within
// maxXattrNameLen.
func appendXattrKey(dst []byte, typ uint16, rest string) []byte {
	dst = binary.LittleEndian.AppendUint16(dst, typ)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(rest)))
	return append(dst, rest...)
}

// appendXattrValue appends an inline value; the caller keeps it within
// maxXattrValueLen.
func appendXattrValue(dst, value []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(value)))
	return append(dst, value...)
}

// appendXattrRef appends an out-of-line value: a reference to the value's
// length field somewhere else in the key-value table.
func appendXattrRef(dst []byte, ref metaRef) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, xattrRefSize)
	return binary.LittleEndian.AppendUint64(dst, uint64(ref))
}

// xattrID is one entry of the xattr id table: the attributes of one inode, or
// of all inodes that have the same ones.
type xattrID struct {
	Ref   metaRef // of the first key, relative to the key-value table
	Count uint32  // of key-value pairs
	Size  uint32  // sum over all pairs of key and value bytes (mksquashfs: as stored)
}

func (x xattrID) append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint64(dst, uint64(x.Ref))
	dst = le.AppendUint32(dst, x.Count)
	return le.AppendUint32(dst, x.Size)
}

func decodeXattrID(b []byte) xattrID {
	le := binary.LittleEndian
	return xattrID{Ref: metaRef(le.Uint64(b)), Count: le.Uint32(b[8:]), Size: le.Uint32(b[12:])}
}

// xattrTableHeader stands at superblock.XattrTable, before the pointers to the
// metadata blocks of the xattr id table.
type xattrTableHeader struct {
	KeyValues uint64 // byte offset of the key-value table in the image
	IDs       uint32
}

const xattrTableHeaderSize = 16

func (h xattrTableHeader) append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, h.KeyValues)
	dst = binary.LittleEndian.AppendUint32(dst, h.IDs)
	return append(dst, 0, 0, 0, 0)
}

func decodeXattrTableHeader(b []byte) xattrTableHeader {
	return xattrTableHeader{KeyValues: binary.LittleEndian.Uint64(b), IDs: binary.LittleEndian.Uint32(b[8:])}
}
