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
	ids       stream // xattrIDs
	sets      *table // digests, in the order of ids
	values    *table // digests, each with the metaRef of the value
}

func newXattrTable(c compressor, s *spool) *xattrTable {
	return &xattrTable{
		keyValues: metaWriter{comp: c, packed: stream{spool: s}},
		ids:       stream{spool: s},
		sets:      newTable(s, sha256.Size, sha256.Size),
		values:    newTable(s, sha256.Size, sha256.Size+8),
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
	key := sum.Sum(nil)
	i, ok := t.sets.find(key)
	if !ok {
		if i, err = t.sets.add(key); err == nil {
			err = t.store(sorted)
		}
	}
	return uint32(i), lost, err
}

// store writes a new set.
func (t *xattrTable) store(xattrs []Xattr) error {
	if t.sets.n > math.MaxInt32 {
		return fmt.Errorf("more than %d different sets of extended attributes", math.MaxInt32)
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
			return err
		}
		list = appendXattrKey(list, prefix|xattrOutOfLine, rest)
		list = appendXattrRef(list, ref)
	}
	id := xattrID{Ref: t.keyValues.ref(), Count: uint32(len(xattrs)), Size: uint32(len(list))}
	if err := t.keyValues.write(list); err != nil {
		return err
	}
	return t.ids.write(id.append(nil))
}

// storeValue writes an out-of-line value, unless it is there already.
func (t *xattrTable) storeValue(value []byte) (metaRef, error) {
	key := sha256.Sum256(value)
	i, known := t.values.find(key[:])
	if known {
		return metaRef(binary.LittleEndian.Uint64(t.values.at(i)[sha256.Size:])), nil
	}
	i, err := t.values.add(key[:])
	if err != nil {
		return 0, err
	}
	ref := t.keyValues.ref()
	binary.LittleEndian.PutUint64(t.values.at(i)[sha256.Size:], uint64(ref))
	return ref, t.keyValues.write(appendXattrValue(nil, value))
}
