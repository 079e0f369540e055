// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// xattrInlineMax is the longest value that stands beside its name. Longer ones
// stand on their own, once however many inodes have them, and do not have to be
// unpacked to find the names behind them (mksquashfs' XATTR_INLINE_MAX).
const xattrInlineMax = 128

// xattrTable builds the extended attribute tables. Inodes with the same
// attributes share an entry.
type xattrTable struct {
	keyValues metaWriter
	ids       []xattrID
	sets      map[[sha256.Size]byte]uint32
	values    map[[sha256.Size]byte]metaRef
}

func newXattrTable(c compressor) *xattrTable {
	return &xattrTable{
		keyValues: metaWriter{comp: c},
		sets:      map[[sha256.Size]byte]uint32{},
		values:    map[[sha256.Size]byte]metaRef{},
	}
}

// add returns the index of a set of attributes, and the names that the format
// has no prefix for, which it leaves out.
func (t *xattrTable) add(xattrs []Xattr) (index uint32, lost []string, err error) {
	if len(xattrs) == 0 {
		return noXattr, nil, nil
	}
	sorted := slices.SortedFunc(slices.Values(xattrs), func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	sorted = slices.DeleteFunc(sorted, func(x Xattr) bool {
		_, _, ok := splitXattrName(x.Name)
		if !ok {
			lost = append(lost, x.Name)
		}
		return !ok
	})
	if len(sorted) == 0 {
		return noXattr, lost, nil
	}
	sum := sha256.New()
	var n [8]byte
	for i, x := range sorted {
		if i > 0 && sorted[i-1].Name == x.Name {
			return 0, nil, fmt.Errorf("extended attribute %s is given twice", x.Name)
		}
		if len(x.Name) > maxXattrNameLen || len(x.Value) > maxXattrValueLen {
			return 0, nil, fmt.Errorf("extended attribute %.64s has a name of %d and a value of %d bytes: the limits are %d and %d",
				x.Name, len(x.Name), len(x.Value), maxXattrNameLen, maxXattrValueLen)
		}
		binary.LittleEndian.PutUint32(n[:], uint32(len(x.Name)))
		binary.LittleEndian.PutUint32(n[4:], uint32(len(x.Value)))
		sum.Write(n[:])
		sum.Write([]byte(x.Name))
		sum.Write(x.Value)
	}
	key := [sha256.Size]byte(sum.Sum(nil))
	index, ok := t.sets[key]
	if !ok {
		index, err = t.store(sorted)
		t.sets[key] = index
	}
	return index, lost, err
}

// store writes a new set.
func (t *xattrTable) store(xattrs []Xattr) (uint32, error) {
	if len(t.ids) >= math.MaxInt32 {
		return 0, fmt.Errorf("more than %d different sets of extended attributes", math.MaxInt32)
	}
	var list []byte
	for _, x := range xattrs {
		prefix, rest, _ := splitXattrName(x.Name)
		if len(x.Value) <= xattrInlineMax {
			list = appendXattrKey(list, prefix, rest)
			list = appendXattrValue(list, x.Value)
			continue
		}
		ref, err := t.storeValue(x.Value)
		if err != nil {
			return 0, err
		}
		list = appendXattrKey(list, prefix|xattrOutOfLine, rest)
		list = appendXattrRef(list, ref)
	}
	id := xattrID{Ref: t.keyValues.ref(), Count: uint32(len(xattrs)), Size: uint32(len(list))}
	if err := t.keyValues.write(list); err != nil {
		return 0, err
	}
	t.ids = append(t.ids, id)
	return uint32(len(t.ids) - 1), nil
}

// storeValue writes an out-of-line value, unless it is there already.
func (t *xattrTable) storeValue(value []byte) (metaRef, error) {
	key := sha256.Sum256(value)
	if ref, ok := t.values[key]; ok {
		return ref, nil
	}
	ref := t.keyValues.ref()
	t.values[key] = ref
	return ref, t.keyValues.write(appendXattrValue(nil, value))
}
