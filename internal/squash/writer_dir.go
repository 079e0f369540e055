// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
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
	binary.LittleEndian.PutUint64(w.refs.at(int(ino.number-1)), uint64(ref))
	var err error
	if w.scratch, err = r.append(w.scratch[:0]); err != nil {
		return err
	}
	if err := w.inodes.write(w.scratch); err != nil {
		return err
	}
	return w.list(ino)
}

// list adds a name to its directory. Those of all directories that are not
// complete are in one stream, at its end those of the innermost one: when that is
// written they make way for its own name.
func (w *writer) list(ino *inode) error {
	if ino.name == "" {
		return nil // the root
	}
	b := binary.LittleEndian.AppendUint64(w.scratch[:0], uint64(w.ref(ino.number)))
	b = binary.LittleEndian.AppendUint32(b, ino.number)
	b = append(b, byte(ino.typ), byte(len(ino.name)-1))
	w.scratch = append(b, ino.name...)
	return w.entries.write(w.scratch)
}

// listedFixed is what an entry takes without the name.
const listedFixed = 8 + 4 + 1 + 1

// listedSize is what list writes for a name.
func listedSize(name string) int64 { return int64(listedFixed + len(name)) }

// listed is one name of a directory that is being written.
type listed struct {
	ref inodeRef
	dirEntryRecord
}

// nextListed reads an entry, if there is one.
func nextListed(r *streamReader) (e listed, ok bool, err error) {
	if r.left() == 0 {
		return e, false, nil
	}
	b, err := r.take(listedFixed)
	if err != nil {
		return e, false, err
	}
	e.ref = inodeRef(binary.LittleEndian.Uint64(b))
	e.Offset, e.Number, e.Type = uint16(e.ref.offset()), binary.LittleEndian.Uint32(b[8:]), inodeType(b[12])
	name, err := r.take(int(b[13]) + 1)
	e.Name = string(name)
	return e, err == nil, err
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
	from := w.entries.size() - d.listed
	left := w.entries.from(from)
	var length, indexed uint64
	e, ok, err := nextListed(left)
	for err == nil && ok {
		// An index entry for each metadata block of listing or so keeps the
		// kernel from reading the listing from its start for each look-up.
		if length-indexed > metaBlockSize && len(r.Index) < math.MaxUint16 {
			r.Index = append(r.Index, dirIndex{Offset: uint32(length), Start: uint32(w.dirs.ref().block()), Name: e.Name})
			indexed = length
		}
		if e, ok, err = w.writeRun(e, left); err != nil {
			return err
		}
		if err := w.dirs.write(w.scratch); err != nil {
			return err
		}
		length += uint64(len(w.scratch))
		if length > math.MaxUint32-dirSizeBias || w.dirs.ref().block() > math.MaxUint32 {
			return fmt.Errorf("a directory's listing, or all of them, are larger than %d bytes: it has too many names", uint32(math.MaxUint32))
		}
	}
	w.entries.truncate(from)
	r.Size = length + dirSizeBias
	return err
}

// writeRun puts one header and as many entries as can stand below it into
// w.scratch, and returns the one behind them: their inodes must begin in the same
// metadata block, their numbers be near, and an index entry can only point to a
// header.
func (w *writer) writeRun(e listed, left *streamReader) (next listed, ok bool, err error) {
	h := dirHeader{Start: uint32(e.ref.block()), Number: e.Number}
	w.scratch = h.append(w.scratch[:0])
	for ok = true; ok && h.Count < maxDirEntries; h.Count++ {
		if h.Count > 0 && (e.ref.block() != uint64(h.Start) || !e.fits(h) || len(w.scratch)-dirHeaderSize+dirEntrySize+len(e.Name) > metaBlockSize) {
			break
		}
		if w.scratch, err = e.append(w.scratch, h); err != nil {
			return e, false, err
		}
		if e, ok, err = nextListed(left); err != nil {
			return e, false, err
		}
	}
	h.append(w.scratch[:0]) // in place, now that the count is known
	return e, ok, nil
}
