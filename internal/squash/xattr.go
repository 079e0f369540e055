// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Limits on one inode's attributes. Linux lists at most 64 KiB of names
// (XATTR_LIST_MAX), and a shared value is stored once but counted each time.
const (
	maxXattrNames  = 64 << 10
	maxXattrValues = 64 << 20
)

// Xattrs returns the extended attributes of an inode of this image, in the
// image's order.
func (img *Image) Xattrs(ino *Inode) ([]Xattr, error) {
	// The kernel, too, ignores the index when there is no table.
	if ino.xattr == noXattr || img.xattrIDs == nil {
		return nil, nil
	}
	list, err := img.xattrsAt(uint64(ino.xattr))
	if err != nil {
		return nil, fmt.Errorf("extended attributes of inode %d: %w", ino.Number, err)
	}
	return list, nil
}

// HasXattr reports whether some inode of this image has an extended attribute whose name matches. It decodes each
// distinct set of attributes once.
func (img *Image) HasXattr(match func(name string) bool) (bool, error) {
	if img.xattrIDs == nil {
		return false, nil
	}
	for i := range img.xattrIDs.count {
		list, err := img.xattrsAt(uint64(i))
		if err != nil {
			return false, fmt.Errorf("extended attributes %d: %w", i, err)
		}
		if slices.ContainsFunc(list, func(x Xattr) bool { return match(x.Name) }) {
			return true, nil
		}
	}
	return false, nil
}

// xattrsAt returns the attributes of an entry of the xattr id table.
func (img *Image) xattrsAt(index uint64) ([]Xattr, error) {
	b, err := img.xattrIDs.entry(img, index)
	if err != nil {
		return nil, err
	}
	id := decodeXattrID(b)
	if id.Count == 0 {
		return nil, nil
	}
	keys, err := img.cursor(img.xattrKV, id.Ref)
	if err != nil {
		return nil, err
	}
	var list []Xattr
	seen := make(map[string]bool)
	names, values := 0, 0
	for range id.Count {
		typ, name, err := decodeXattrKey(keys)
		if err != nil {
			return nil, err
		}
		if seen[name] {
			return nil, corruptf("%s is there twice", name)
		}
		seen[name] = true
		value, err := img.xattrValue(keys, typ)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		names += len(name) + 1
		values += len(value)
		if names > maxXattrNames || values > maxXattrValues {
			return nil, corruptf("more than %d bytes of names or %d of values", maxXattrNames, maxXattrValues)
		}
		list = append(list, Xattr{name, value})
	}
	return list, nil
}

func decodeXattrKey(src *metaCursor) (typ uint16, name string, err error) {
	b, err := src.take(xattrKeySize)
	if err != nil {
		return 0, "", err
	}
	typ = binary.LittleEndian.Uint16(b)
	n := int(binary.LittleEndian.Uint16(b[2:]))
	if n == 0 {
		return 0, "", corruptf("extended attribute without a name")
	}
	if b, err = src.take(n); err != nil {
		return 0, "", err
	}
	rest := string(b)
	if strings.IndexByte(rest, 0) >= 0 {
		return 0, "", corruptf("attribute name %q contains a NUL byte", rest)
	}
	name, err = joinXattrName(typ, rest)
	return typ, name, err
}

// xattrValue reads the value at the cursor and follows an out-of-line one.
func (img *Image) xattrValue(c *metaCursor, typ uint16) ([]byte, error) {
	b, err := c.take(xattrValueSize)
	if err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(b)
	if typ&xattrOutOfLine != 0 {
		if n != xattrRefSize {
			return nil, corruptf("an out-of-line value's reference has %d bytes", n)
		}
		if b, err = c.take(xattrRefSize); err != nil {
			return nil, err
		}
		if c, err = img.cursor(img.xattrKV, metaRef(binary.LittleEndian.Uint64(b))); err != nil {
			return nil, err
		}
		if b, err = c.take(xattrValueSize); err != nil {
			return nil, err
		}
		n = binary.LittleEndian.Uint32(b)
	}
	if n > maxXattrValueLen {
		return nil, corruptf("a value of %d bytes: the limit is %d", n, maxXattrValueLen)
	}
	if b, err = c.take(int(n)); err != nil {
		return nil, err
	}
	return bytes.Clone(b), nil
}
