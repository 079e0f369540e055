// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"math"
)

// writeInode writes an inode record, and with it where the directories above
// find it.
func (w *writer) writeInode(ino *inode, r *inodeRecord) error {
	r.Type, r.Mode, r.UIDIndex, r.GIDIndex = ino.typ, ino.mode, ino.uid, ino.gid
	r.MTime, r.Number, r.NLink, r.Xattr = ino.mtime, ino.number, ino.nlink, ino.xattr
	if r.needsExtended() {
		r.Type += extendedDelta
	}
	ref := w.inodes.ref()
	if ref.block() > math.MaxUint32 {
		return fmt.Errorf("the inode table is larger than %d bytes: the tree has too many inodes", uint32(math.MaxUint32))
	}
	w.refs[ino.number-1] = ref
	var err error
	if w.scratch, err = r.append(w.scratch[:0]); err != nil {
		return err
	}
	return w.inodes.write(w.scratch)
}

// writeOther writes the inode of anything but a regular file. A directory must
// come after everything in it.
func (w *writer) writeOther(ino *inode) error {
	r := inodeRecord{Target: ino.target, Rdev: ino.rdev}
	if ino.dir != nil {
		if err := w.writeListing(ino.dir, &r); err != nil {
			return err
		}
		r.Parent = uint32(w.tree.inodes + 1) // the root's, which has none
		if ino.dir.parent != 0 {
			r.Parent = ino.dir.parent
		}
	}
	return w.writeInode(ino, &r)
}

// writeListing writes a directory's entries and sets what its inode says of
// them.
func (w *writer) writeListing(d *directory, r *inodeRecord) error {
	start := w.dirs.ref()
	r.Start, r.DirOffset = start.block(), uint16(start.offset())
	var length, indexed uint64
	for left := d.entries; len(left) > 0; {
		// An index entry for each metadata block of listing or so keeps the
		// kernel from reading the listing from its start for each look-up.
		if length-indexed > metaBlockSize && len(r.Index) < math.MaxUint16 {
			r.Index = append(r.Index, dirIndex{Offset: uint32(length), Start: uint32(w.dirs.ref().block()), Name: left[0].name})
			indexed = length
		}
		n, err := w.writeRun(left)
		if err != nil {
			return err
		}
		if err := w.dirs.write(w.scratch); err != nil {
			return err
		}
		length += uint64(len(w.scratch))
		if length > math.MaxUint32-dirSizeBias || w.dirs.ref().block() > math.MaxUint32 {
			return fmt.Errorf("a directory's listing, or all of them, are larger than %d bytes: it has too many names", uint32(math.MaxUint32))
		}
		left = left[n:]
	}
	r.Size = length + dirSizeBias
	return nil
}

// writeRun puts one header and as many entries as can stand below it into
// w.scratch: their inodes must begin in the same metadata block, their numbers
// be near, and an index entry can only point to a header.
func (w *writer) writeRun(left []dirent) (n int, err error) {
	h := dirHeader{Start: uint32(w.refs[left[0].number-1].block()), Number: left[0].number}
	size := 0
	for n < len(left) && n < maxDirEntries {
		e := w.entry(left[n])
		size += dirEntrySize + len(e.Name)
		if w.refs[e.Number-1].block() != uint64(h.Start) || !e.fits(h) || n > 0 && size > metaBlockSize {
			break
		}
		n++
	}
	h.Count = n
	w.scratch = h.append(w.scratch[:0])
	for _, d := range left[:n] {
		e := w.entry(d)
		if w.scratch, err = e.append(w.scratch, h); err != nil {
			return 0, err
		}
	}
	return n, nil
}

func (w *writer) entry(d dirent) dirEntryRecord {
	return dirEntryRecord{
		Offset: uint16(w.refs[d.number-1].offset()),
		Number: d.number,
		Type:   d.typ,
		Name:   d.name,
	}
}
