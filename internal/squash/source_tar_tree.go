// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// tarTree is what the names of an archive come to. There may be millions, so all
// of it lies in a spool. Inodes are told by their numbers; the root's is 0.
type tarTree struct {
	spool  spool
	names  *table // tarName, by directory and name
	texts  stream // of names
	inodes region // tarInode
	count  int    // of inodes
	metas  stream // the rest of them, as set writes it
	sums   summer
	buf    []byte
}

// tarName is a name in a directory. It begins with a digest of both, which is
// enough to find it by; what it leads to may change.
type tarName []byte

const (
	tarNameKey  = 16
	tarNameSize = tarNameKey + 4 + 4 + 8
)

func (n tarName) inode() int           { return int(binary.LittleEndian.Uint32(n[16:])) }
func (n tarName) setInode(i int)       { binary.LittleEndian.PutUint32(n[16:], uint32(i)) }
func (n tarName) next() uint32         { return binary.LittleEndian.Uint32(n[20:]) } // in its directory: 1 + number, or zero
func (n tarName) setNext(i uint32)     { binary.LittleEndian.PutUint32(n[20:], i) }
func (n tarName) text() int64          { return int64(binary.LittleEndian.Uint64(n[24:])) }
func (n tarName) setText(offset int64) { binary.LittleEndian.PutUint64(n[24:], uint64(offset)) }

// tarInode is an entry's inode; several names may have it.
type tarInode []byte

const tarInodeSize = 8 + 4 + 4 + 4 + 4

func (i tarInode) meta() (off int64, n int) {
	return int64(binary.LittleEndian.Uint64(i)), int(binary.LittleEndian.Uint32(i[8:]))
}
func (i tarInode) mode() uint32      { return binary.LittleEndian.Uint32(i[12:]) }
func (i tarInode) isDir() bool       { return i.mode()&unix.S_IFMT == unix.S_IFDIR }
func (i tarInode) first() uint32     { return binary.LittleEndian.Uint32(i[16:]) } // name in it: 1 + number, or zero
func (i tarInode) setFirst(n uint32) { binary.LittleEndian.PutUint32(i[16:], n) }
func (i tarInode) link() uint32      { return binary.LittleEndian.Uint32(i[20:]) } // zero: it has one name
func (i tarInode) setLink(n uint32)  { binary.LittleEndian.PutUint32(i[20:], n) }

// maxTarInodes bounds the disk space that an archive's names take, some 150
// bytes each.
const maxTarInodes = 1 << 26

// init makes the root.
func (t *tarTree) init() error {
	t.names = newTable(&t.spool, tarNameKey, tarNameSize)
	t.inodes = region{spool: &t.spool, size: tarInodeSize}
	t.texts.spool, t.metas.spool = &t.spool, &t.spool
	t.sums = summer{h: sha256.New(), key: new([sha256.BlockSize]byte)}
	_, _ = rand.Read(t.sums.key[:]) // which never fails
	_, err := t.add(tarDirEntry())
	return err
}

// tarDirEntry is for a directory the archive has no entry for.
func tarDirEntry() *Entry {
	var now unix.Timeval
	_ = unix.Gettimeofday(&now) // cannot fail with an address of ours
	return &Entry{Mode: unix.S_IFDIR | 0o755, Mtime: now.Sec}
}

// inode returns an inode, to be read and written until one is added.
func (t *tarTree) inode(i int) tarInode { return t.inodes.at(i) }

// add makes an inode, which has no name yet.
func (t *tarTree) add(e *Entry) (number int, err error) {
	if t.count == maxTarInodes {
		return 0, fmt.Errorf("more than %d entries", maxTarInodes)
	}
	if err := t.inodes.grow(t.count + 1); err != nil {
		return 0, err
	}
	if err := t.set(t.count, e); err != nil {
		return 0, err
	}
	t.count++
	return t.count - 1, nil
}

// set gives an inode what an entry says of it. A directory keeps its names.
func (t *tarTree) set(number int, e *Entry) error {
	b := t.buf[:0]
	b = binary.AppendUvarint(b, uint64(e.UID))
	b = binary.AppendUvarint(b, uint64(e.GID))
	b = binary.AppendVarint(b, e.Mtime)
	b = appendBytes(b, e.Note)
	b = binary.AppendUvarint(b, uint64(len(e.Xattrs)))
	for _, x := range e.Xattrs {
		b = appendBytes(appendBytes(b, x.Name), x.Value)
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		b = e.Content.(*tarContent).append(b)
	case unix.S_IFLNK:
		b = appendBytes(b, e.Target)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(e.Major)), uint64(e.Minor))
	}
	t.buf = b
	ino := t.inode(number)
	binary.LittleEndian.PutUint64(ino, uint64(t.metas.size()))
	binary.LittleEndian.PutUint32(ino[8:], uint32(len(b)))
	binary.LittleEndian.PutUint32(ino[12:], e.Mode)
	return t.metas.write(b)
}

// entry is what set was given. Its content is s's.
func (t *tarTree) entry(number int, s *tarSource) (e Entry, err error) {
	ino := t.inode(number)
	off, n := ino.meta()
	b := make([]byte, n)
	if err := t.metas.readAt(b, off); err != nil {
		return e, err
	}
	r := recordReader{b}
	e = Entry{Mode: ino.mode(), UID: uint32(r.uint()), GID: uint32(r.uint()), Mtime: r.int(), Note: string(r.bytes())}
	for range r.uint() {
		e.Xattrs = append(e.Xattrs, Xattr{Name: string(r.bytes()), Value: r.bytes()})
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		c := newTarContent(s, &r)
		c.inode, e.Content = number, c
		e.Size, e.Holes = c.size, c.holes()
	case unix.S_IFLNK:
		e.Target = string(r.bytes())
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor = uint32(r.uint()), uint32(r.uint())
	}
	if link := ino.link(); link > 0 {
		e.Link = LinkID{Dev: 1, Ino: uint64(link)}
	}
	return e, nil
}

func (t *tarTree) key(dir int, name string) []byte {
	d := t.sums.sum(append(binary.LittleEndian.AppendUint32(nil, uint32(dir)), name...))
	return d[:tarNameKey]
}

// find returns what a name in a directory leads to.
func (t *tarTree) find(dir int, name string) (number int, ok bool) {
	n, ok := t.names.find(t.key(dir, name))
	if !ok {
		return 0, false
	}
	return tarName(t.names.at(n)).inode(), true
}

// put gives an inode a name, in place of what had it.
func (t *tarTree) put(dir int, name string, number int) error {
	key := t.key(dir, name)
	n, ok := t.names.find(key)
	if ok {
		if t.inode(tarName(t.names.at(n)).inode()).first() != 0 {
			return errors.New("it would replace a directory that is not empty")
		}
		tarName(t.names.at(n)).setInode(number)
		return nil
	}
	n, err := t.names.add(key)
	if err != nil {
		return err
	}
	d, rec := t.inode(dir), tarName(t.names.at(n))
	rec.setInode(number)
	rec.setNext(d.first())
	rec.setText(t.texts.size())
	d.setFirst(uint32(n) + 1)
	return t.texts.write(appendName(nil, name))
}

// namesIn sorts the names of a directory.
func (t *tarTree) namesIn(r *nameReader, dir int) (*nameList, error) {
	at := t.inode(dir).first()
	return r.list(func(names []string) (_ []string, bytes int, err error) {
		for ; at != 0 && bytes < fewNames; at = tarName(t.names.at(int(at - 1))).next() {
			name, err := t.text(tarName(t.names.at(int(at - 1))).text())
			if err != nil {
				return names, 0, err
			}
			names, bytes = append(names, name), bytes+len(name)
		}
		return names, bytes, nil
	})
}

func (t *tarTree) text(off int64) (string, error) {
	b := make([]byte, min(2+maxNameLen, t.texts.size()-off))
	if err := t.texts.readAt(b, off); err != nil {
		return "", err
	}
	return string(b[2:][:binary.LittleEndian.Uint16(b)]), nil
}
