// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"io/fs"
	"sync"
)

// maxDepth bounds how deep directories nest. Linux cannot name more than 2048
// levels in one path (PATH_MAX).
const maxDepth = 4096

// dirEntry is one entry of a directory and where its inode is.
type dirEntry struct {
	dirEntryRecord
	ref inodeRef
}

// listing reads a directory's listing in order, which is the order of names
// as bytes.
type listing struct {
	c      *metaCursor
	header dirHeader
	count  int   // entries left under header
	left   int64 // bytes left of the listing
	last   string
}

// openDir returns a reader at the first entry.
func (img *Image) openListing(dir *Inode) (*listing, error) {
	d := &listing{left: dir.listingLen}
	if d.left == 0 {
		return d, nil
	}
	var err error
	d.c, err = img.cursor(img.dirs, dir.listing)
	return d, err
}

// next returns the next entry, or false at the end. Names are checked: they
// are safe to be used in a directory, and none comes twice.
func (d *listing) next() (dirEntry, bool, error) {
	if d.count == 0 {
		if d.left == 0 {
			return dirEntry{}, false, nil
		}
		b, err := d.take(dirHeaderSize)
		if err != nil {
			return dirEntry{}, false, err
		}
		if d.header, err = decodeDirHeader(b); err != nil {
			return dirEntry{}, false, err
		}
		d.count = d.header.Count
	}
	b, err := d.take(dirEntrySize)
	if err != nil {
		return dirEntry{}, false, err
	}
	rec, nameLen, err := decodeDirEntry(b, d.header)
	if err != nil {
		return dirEntry{}, false, err
	}
	if b, err = d.take(nameLen); err != nil {
		return dirEntry{}, false, err
	}
	rec.Name = string(b)
	if err := checkName(rec.Name); err != nil {
		return dirEntry{}, false, err
	}
	if rec.Name <= d.last {
		return dirEntry{}, false, corruptf("name %q comes behind %q", rec.Name, d.last)
	}
	if rec.Offset >= metaBlockSize {
		return dirEntry{}, false, corruptf("entry %q refers to offset %d of a metadata block", rec.Name, rec.Offset)
	}
	d.last = rec.Name
	d.count--
	return dirEntry{rec, makeRef(uint64(d.header.Start), int(rec.Offset))}, true, nil
}

func (d *listing) take(n int) ([]byte, error) {
	if d.left < int64(n) {
		return nil, corruptf("listing ends in the middle of an entry")
	}
	d.left -= int64(n)
	return d.c.take(n)
}

// lookup returns the entry of a name in a directory.
func (img *Image) lookup(dir *Inode, name string) (dirEntry, error) {
	d, err := img.openListing(dir)
	if err != nil {
		return dirEntry{}, err
	}
	if err := img.skipTo(d, dir, name); err != nil {
		return dirEntry{}, fmt.Errorf("directory index: %w", err)
	}
	for {
		e, ok, err := d.next()
		if err != nil {
			return dirEntry{}, err
		}
		if !ok || e.Name > name {
			return dirEntry{}, fs.ErrNotExist
		}
		if e.Name == name {
			return e, nil
		}
	}
}

// skipTo moves d to the last place the directory's index knows before name.
func (img *Image) skipTo(d *listing, dir *Inode, name string) error {
	var best dirIndex
	err := img.eachIndex(dir, func(x dirIndex) (bool, error) {
		if x.Name > name {
			return false, nil
		}
		best = x
		return true, nil
	})
	if err != nil || best.Name == "" {
		return err
	}
	d.left -= int64(best.Offset)
	return d.c.seek(img.dirs, indexTarget(dir, best))
}

// indexTarget returns where an index entry points in the directory table. A
// listing's blocks are full but for the last, so its place in the block
// follows from its place in the listing.
func indexTarget(dir *Inode, x dirIndex) metaRef {
	off := (int64(dir.listing.offset()) + int64(x.Offset)) % metaBlockSize
	return makeRef(uint64(x.Start), int(off))
}

// eachIndex calls visit with each entry of a directory's index until it
// returns false.
func (img *Image) eachIndex(dir *Inode, visit func(dirIndex) (bool, error)) error {
	if dir.indexCount == 0 {
		return nil
	}
	c, err := img.cursor(img.inodes, dir.ref)
	if err != nil {
		return err
	}
	// The index follows the inode; decoding that once more finds it.
	if _, err := decodeInode(c, img.sb.BlockSize); err != nil {
		return err
	}
	var last dirIndex
	for range dir.indexCount {
		x, err := decodeDirIndex(c)
		if err != nil {
			return err
		}
		if int64(x.Offset) >= dir.listingLen || x.Offset < last.Offset || x.Name <= last.Name {
			return corruptf("its entry %q at %d is out of order", x.Name, x.Offset)
		}
		last = x
		more, err := visit(x)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// entryInode reads the inode of an entry and checks that it is what the entry says.
func (img *Image) entryInode(e dirEntry) (*Inode, error) {
	ino, err := img.inode(e.ref)
	if err != nil {
		return nil, err
	}
	if ino.Number != e.Number || ino.typ.basic() != e.Type {
		return nil, corruptf("the entry refers to %v %d, but there is %v %d", e.Type, e.Number, ino.typ, ino.Number)
	}
	return ino, nil
}

// child is entryInode for look-ups in any order: a directory is also checked to be
// in this place only.
func (img *Image) child(dir *Inode, e dirEntry) (*Inode, error) {
	ino, err := img.entryInode(e)
	if err != nil || !ino.IsDir() {
		return ino, err
	}
	return ino, img.seen.add(img, dir, e, ino)
}

// errTooDeep is about directories that only a hostile image has.
var errTooDeep = fmt.Errorf("directories nest more than %d deep", maxDepth)

// dirRegistry remembers where each directory was met. That a directory has one
// place only is what makes the image a tree: without it, a walk of a hostile
// image, by whoever looks names up, need not end. Walks of our own have visits.
type dirRegistry struct {
	mu     sync.Mutex
	places map[inodeRef]dirPlace
	raw    int64 // sum of the listings' lengths
}

type dirPlace struct {
	parent inodeRef
	name   string
	depth  int
}

// add notes that directory ino was met as entry e of directory parent.
func (r *dirRegistry) add(img *Image, parent *Inode, e dirEntry, ino *Inode) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.ref == img.sb.RootInode {
		return corruptf("directory loop: the entry leads back to the root")
	}
	if old, ok := r.places[e.ref]; ok {
		if old.parent != parent.ref || old.name != e.Name {
			return corruptf("directory loop: inode %d is in two directories", ino.Number)
		}
		return nil
	}
	if uint64(len(r.places)) >= uint64(img.sb.Inodes) {
		return corruptf("more directories than the %d inodes the superblock counts", img.sb.Inodes)
	}
	// Listings do not overlap, so together they are no longer than the table.
	if r.raw += ino.listingLen; r.raw > img.dirsRaw {
		return corruptf("the directories' listings overlap")
	}
	depth := r.places[parent.ref].depth + 1
	if depth > maxDepth {
		return errTooDeep
	}
	if r.places == nil {
		r.places = make(map[inodeRef]dirPlace)
	}
	r.places[e.ref] = dirPlace{parent.ref, e.Name, depth}
	return nil
}
