// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// forgery makes images no honest program would: everything is stored, and
// every field can be wrong.
type forgery struct {
	nodes []*forgedNode // the first is the root
	data  []byte        // behind the superblock
	frags []fragmentEntry
	ids   []uint32
	xattr *forgedXattrs
	sb    func(*superblock)
}

type forgedNode struct {
	rec     inodeRecord
	names   []string // of a directory's entries, in the order they are to have
	nodes   []*forgedNode
	listing []byte             // instead of names and nodes
	shared  *forgedNode        // has the listing of this one
	fix     func(*inodeRecord) // last change before encoding
	off     int                // in the decoded inode table
}

type forgedXattrs struct {
	keyValues []byte
	ids       []xattrID
}

func newForgery() *forgery {
	f := &forgery{ids: []uint32{0}}
	f.dir()
	return f
}

func (f *forgery) root() *forgedNode { return f.nodes[0] }

func (f *forgery) add(rec inodeRecord) *forgedNode {
	rec.Number = uint32(len(f.nodes) + 1)
	rec.Xattr = noXattr
	n := &forgedNode{rec: rec}
	f.nodes = append(f.nodes, n)
	return n
}

func (f *forgery) dir() *forgedNode { return f.add(inodeRecord{Type: typeDir, Mode: 0o755, NLink: 2}) }

func (f *forgery) file(content string) *forgedNode {
	n := f.add(inodeRecord{Type: typeFile, Mode: 0o644, Fragment: noFragment, Size: uint64(len(content))})
	n.rec.Start = uint64(superblockSize + len(f.data))
	f.data = append(f.data, content...)
	n.rec.Blocks = []uint32{dataWord(len(content), true)}
	return n
}

func (n *forgedNode) put(name string, child *forgedNode) *forgedNode {
	n.names, n.nodes = append(n.names, name), append(n.nodes, child)
	if child.rec.Type.basic() == typeDir && child.rec.Parent == 0 {
		child.rec.Parent = n.rec.Number
	}
	return child
}

// stored returns content as stored metadata blocks; storedRef where byte off
// of it is then.
func stored(content []byte) []byte {
	var out []byte
	for len(content) > 0 {
		n := min(len(content), metaBlockSize)
		out = binary.LittleEndian.AppendUint16(out, metaHeader(n, true))
		out = append(out, content[:n]...)
		content = content[n:]
	}
	return out
}

func storedRef(off int) metaRef {
	return makeRef(uint64(off/metaBlockSize*(metaBlockSize+metaHeaderSize)), off%metaBlockSize)
}

// entries returns a listing with one header per entry, unchecked.
func (n *forgedNode) entries() []byte {
	if n.listing != nil {
		return n.listing
	}
	var out []byte
	le := binary.LittleEndian
	for i, name := range n.names {
		c := n.nodes[i]
		ref := storedRef(c.off)
		out = dirHeader{Count: 1, Start: uint32(ref.block()), Number: c.rec.Number}.append(out)
		out = le.AppendUint16(out, uint16(ref.offset()))
		out = le.AppendUint16(out, 0)
		out = le.AppendUint16(out, uint16(c.rec.Type.basic()))
		out = le.AppendUint16(out, uint16(len(name)-1))
		out = append(out, name...)
	}
	return out
}

// image returns the image.
func (f *forgery) image(t testing.TB) []byte {
	t.Helper()
	var inodes, dirs []byte
	encode := func() {
		inodes = nil
		for _, n := range f.nodes {
			n.off = len(inodes)
			rec := n.rec
			if n.fix != nil {
				n.fix(&rec)
			}
			var err error
			if inodes, err = rec.append(inodes); err != nil {
				t.Fatal(err)
			}
		}
	}
	encode()
	for _, n := range f.nodes {
		if n.rec.Type.basic() != typeDir || n.shared != nil {
			continue
		}
		list := n.entries()
		ref := storedRef(len(dirs))
		n.rec.Start, n.rec.DirOffset, n.rec.Size = ref.block(), uint16(ref.offset()), uint64(len(list)+dirSizeBias)
		dirs = append(dirs, list...)
	}
	for _, n := range f.nodes {
		if n.shared != nil {
			from := n.shared.rec
			n.rec.Start, n.rec.DirOffset, n.rec.Size = from.Start, from.DirOffset, from.Size
		}
	}
	encode()
	if len(dirs) == 0 {
		dirs = []byte{0}
	}

	sb := superblock{Inodes: uint32(len(f.nodes)), BlockSize: MinBlockSize, Fragments: uint32(len(f.frags)), Compressor: Gzip,
		IDs: uint16(len(f.ids)), XattrTable: noTable, FragmentTable: noTable, ExportTable: noTable}
	out := append(make([]byte, superblockSize), f.data...)
	le := binary.LittleEndian
	table := func(content []byte) uint64 {
		at := len(out)
		out = append(out, stored(content)...)
		index := uint64(len(out))
		for off := 0; off < len(content); off += metaBlockSize {
			out = le.AppendUint64(out, uint64(at)+storedRef(off).block())
		}
		return index
	}
	sb.InodeTable = uint64(len(out))
	out = append(out, stored(inodes)...)
	sb.DirTable = uint64(len(out))
	out = append(out, stored(dirs)...)
	if len(f.frags) > 0 {
		var b []byte
		for _, e := range f.frags {
			b = e.append(b)
		}
		sb.FragmentTable = table(b)
	}
	var ids []byte
	for _, id := range f.ids {
		ids = le.AppendUint32(ids, id)
	}
	sb.IDTable = table(ids)
	if f.xattr != nil {
		kv := uint64(len(out))
		out = append(out, stored(f.xattr.keyValues)...)
		at := uint64(len(out))
		var b []byte
		for _, x := range f.xattr.ids {
			b = x.append(b)
		}
		out = append(out, stored(b)...)
		sb.XattrTable = uint64(len(out))
		out = xattrTableHeader{kv, uint32(len(f.xattr.ids))}.append(out)
		for off := 0; off < len(b); off += metaBlockSize {
			out = le.AppendUint64(out, at+storedRef(off).block())
		}
	}
	sb.BytesUsed = uint64(len(out))
	if f.sb != nil {
		f.sb(&sb)
	}
	sb.append(out[:0])
	return out
}

func open(b []byte) (*Image, error) { return Open(bytes.NewReader(b), int64(len(b))) }

// What is forged honestly must be read: otherwise the cases below would prove
// nothing.
func TestForgeryIsValid(t *testing.T) {
	f := newForgery()
	d := f.root().put("dir", f.dir())
	d.put("file", f.file("content"))
	d.put("sub", f.dir()).put("link", f.add(inodeRecord{Type: typeSymlink, NLink: 1, Target: "/etc/passwd"}))
	f.xattr = &forgedXattrs{appendXattrValue(appendXattrKey(nil, xattrUser, "a"), []byte("value")), []xattrID{{0, 1, 12}}}
	img, err := open(f.image(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(t.Context(), img, false); err != nil {
		t.Fatal(err)
	}
	if b, err := fs.ReadFile(img, "dir/file"); string(b) != "content" {
		t.Fatalf("%q, %v", b, err)
	}
}

// zeroBomb is a gzip block of n zeroes.
func zeroBomb(t testing.TB, n int) []byte {
	c, err := newCompressor(Options{Compressor: Gzip, Level: 9, BlockSize: MaxBlockSize})
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, n)
	m, ok, err := c.Compress(out, make([]byte, n))
	if err != nil || !ok {
		t.Fatal(err)
	}
	return out[:m]
}

func TestHostileImages(t *testing.T) {
	named := func(names ...string) func(*forgery) {
		return func(f *forgery) {
			for _, n := range names {
				f.root().put(n, f.file("x"))
			}
		}
	}
	super := func(change func(*superblock)) func(*forgery) {
		return func(f *forgery) {
			f.root().put("file", f.file("content"))
			f.sb = change
		}
	}
	fileFix := func(fix func(*inodeRecord)) func(*forgery) {
		return func(f *forgery) { f.root().put("file", f.file("content")).fix = fix }
	}
	xattrs := func(kv []byte, ids ...xattrID) func(*forgery) {
		return func(f *forgery) {
			n := f.root().put("file", f.add(inodeRecord{Type: typeExtFile, NLink: 1, Fragment: noFragment}))
			n.fix = func(r *inodeRecord) { r.Xattr = 0 }
			f.xattr = &forgedXattrs{kv, ids}
		}
	}
	key := func(typ uint16) []byte { return appendXattrKey(nil, typ, "name") }

	for name, forge := range map[string]func(*forgery){
		"name with a slash":     named("a/b"),
		"name that is absolute": named("/etc"),
		"name with NUL":         named("a\x00b"),
		"name dot":              named("."),
		"name dot dot":          named(".."),
		"same name twice":       named("a", "a"),
		"names out of order":    named("b", "a"),
		"name of 257 bytes":     named(strings.Repeat("n", 257)),
		"listing cut short":     func(f *forgery) { f.root().listing = make([]byte, dirHeaderSize+3) },
		"header of 257 entries": func(f *forgery) { f.root().listing = append([]byte{0, 1, 0, 0}, make([]byte, 40)...) },
		"listing larger than the table": func(f *forgery) {
			f.root().put("file", f.file("x"))
			f.root().fix = func(r *inodeRecord) { r.Size = 60000 }
		},
		"directory contains itself": func(f *forgery) { d := f.root().put("d", f.dir()); d.put("d", d) },
		"directory contains root":   func(f *forgery) { f.root().put("d", f.dir()).put("d", f.root()) },
		"loop of two":               func(f *forgery) { a := f.root().put("a", f.dir()); a.put("b", f.dir()).put("a", a) },
		"directory in two places":   func(f *forgery) { a := f.root().put("a", f.dir()); f.root().put("b", a) },
		"two directories share a listing": func(f *forgery) {
			a := f.root().put("a", f.dir())
			for i := range 250 {
				a.put(fmt.Sprintf("%03d %s", i, strings.Repeat("n", 200)), f.add(inodeRecord{Type: typeFifo, NLink: 1000}))
			}
			for i := range 20 {
				f.root().put(fmt.Sprintf("b%02d", i), f.dir()).shared = a
			}
		},
		"inode of one link used twice": func(f *forgery) { x := f.root().put("a", f.file("x")); f.root().put("b", x) },
		"two inodes with one number": func(f *forgery) {
			f.root().put("a", f.file("x"))
			f.root().put("b", f.file("y")).rec.Number = 2
		},
		"inode number zero":    fileFix(func(r *inodeRecord) { r.Number = 0 }),
		"inode number too big": fileFix(func(r *inodeRecord) { r.Number = 99 }),
		"entry of another type": func(f *forgery) {
			f.root().put("a", f.file("x")).fix = func(r *inodeRecord) { *r = inodeRecord{Type: typeFifo, Number: 2, Xattr: noXattr} }
		},
		"owner outside the table":    fileFix(func(r *inodeRecord) { r.UIDIndex = 1 }),
		"file without enough blocks": fileFix(func(r *inodeRecord) { r.Size = 1 << 31 }),
		"sparse file of 8 EiB": func(f *forgery) {
			f.root().put("a", f.add(inodeRecord{Type: typeExtFile, NLink: 1, Fragment: noFragment})).rec.Size = 1<<63 - 1
		},
		"file larger than 63 bits": func(f *forgery) {
			f.root().put("a", f.add(inodeRecord{Type: typeExtFile, NLink: 1, Fragment: noFragment})).rec.Size = 1 << 63
		},
		"data outside the image": fileFix(func(r *inodeRecord) { r.Start = 1 << 20 }),
		"data in the superblock": fileFix(func(r *inodeRecord) { r.Start = 0 }),
		"data in the options": func(f *forgery) {
			f.data = stored(make([]byte, 8)) // of gzip
			f.root().put("file", f.file("content")).fix = func(r *inodeRecord) { r.Start = superblockSize + 1 }
			f.sb = func(s *superblock) { s.Flags |= flagCompressorOptions }
		},
		"data word too large":        fileFix(func(r *inodeRecord) { r.Blocks = []uint32{MinBlockSize + 1} }),
		"data word with more bits":   fileFix(func(r *inodeRecord) { r.Blocks = []uint32{1<<25 | 7} }),
		"data word of no bytes":      fileFix(func(r *inodeRecord) { r.Blocks = []uint32{dataWord(0, true)} }),
		"stored block of wrong size": fileFix(func(r *inodeRecord) { r.Size = 6 }),
		"fragment that is not there": fileFix(func(r *inodeRecord) { r.Fragment, r.Blocks = 0, nil }),
		"data block is a bomb": func(f *forgery) {
			bomb := zeroBomb(t, MaxBlockSize)
			f.root().put("a", f.file(string(bomb))).fix = func(r *inodeRecord) {
				r.Size, r.Blocks = MinBlockSize, []uint32{dataWord(len(bomb), false)}
			}
		},
		"data block is short": func(f *forgery) {
			z := zeroBomb(t, 100)
			f.root().put("a", f.file(string(z))).fix = func(r *inodeRecord) {
				r.Size, r.Blocks = MinBlockSize, []uint32{dataWord(len(z), false)}
			}
		},
		"tail behind its fragment": func(f *forgery) {
			f.root().put("a", f.file("tail")).fix = func(r *inodeRecord) { r.Fragment, r.FragOffset, r.Blocks = 0, 2, nil }
			f.frags = []fragmentEntry{{superblockSize, dataWord(4, true)}}
		},
		"fragment outside the image": func(f *forgery) {
			f.root().put("a", f.file("tail")).fix = func(r *inodeRecord) { r.Fragment, r.Blocks = 0, nil }
			f.frags = []fragmentEntry{{1 << 40, dataWord(4, true)}}
		},
		"symlink with NUL":           func(f *forgery) { f.root().put("a", f.add(inodeRecord{Type: typeSymlink, NLink: 1, Target: "a\x00b"})) },
		"root is a file":             func(f *forgery) { f.nodes = nil; f.file("x") },
		"root elsewhere":             super(func(s *superblock) { s.RootInode = makeRef(1<<40, 0) }),
		"root behind the end":        super(func(s *superblock) { s.RootInode = makeRef(0, 8000) }),
		"too many inodes":            super(func(s *superblock) { s.Inodes = 1<<32 - 1 }),
		"too few inodes":             super(func(s *superblock) { s.Inodes = 1 }),
		"an inode nobody names":      super(func(s *superblock) { s.Inodes = 3 }),
		"no inodes":                  super(func(s *superblock) { s.Inodes = 0 }),
		"no ids":                     super(func(s *superblock) { s.IDs = 0 }),
		"too many ids":               super(func(s *superblock) { s.IDs = 65535 }),
		"many fragments":             super(func(s *superblock) { s.Fragments, s.FragmentTable = 1<<32-1, s.DirTable }),
		"image cut short":            super(func(s *superblock) { s.BytesUsed++ }),
		"negative length":            super(func(s *superblock) { s.BytesUsed = 1 << 63 }),
		"block size three":           super(func(s *superblock) { s.BlockSize = 12288 }),
		"block size zero":            super(func(s *superblock) { s.BlockSize = 0 }),
		"tables in disorder":         super(func(s *superblock) { s.InodeTable, s.DirTable = s.DirTable, s.InodeTable }),
		"id table in the superblock": super(func(s *superblock) { s.IDTable = 8 }),
		"options in the data":        super(func(s *superblock) { s.Flags |= flagCompressorOptions }),
		"export table of garbage":    super(func(s *superblock) { s.ExportTable = s.DirTable + 2 }),
		"xattr table of garbage":     super(func(s *superblock) { s.XattrTable = s.BytesUsed - 4 }),
		"xattr count of 4 Gi":        xattrs(appendXattrValue(key(xattrUser), nil), xattrID{0, 1<<32 - 1, 0}),
		"xattr value of 4 GiB":       xattrs(append(key(xattrUser), 0xff, 0xff, 0xff, 0xff), xattrID{0, 1, 0}),
		"xattr prefix unknown":       xattrs(appendXattrValue(key(3), nil), xattrID{0, 1, 0}),
		"xattr twice":                xattrs(append(appendXattrValue(key(0), nil), appendXattrValue(key(0), nil)...), xattrID{0, 2, 0}),
		"xattr elsewhere":            xattrs(appendXattrValue(key(0), nil), xattrID{makeRef(1<<30, 0), 1, 0}),
		"xattr reference elsewhere":  xattrs(appendXattrRef(key(xattrOutOfLine), makeRef(0, 8000)), xattrID{0, 1, 0}),
		"xattr index outside":        func(f *forgery) { xattrs(key(0))(f); f.xattr.ids = nil },
	} {
		t.Run(name, func(t *testing.T) {
			f := newForgery()
			forge(f)
			b := f.image(t)
			img, err := open(b)
			if err == nil {
				err = Verify(t.Context(), img, false)
			}
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("open and verify: %v", err)
			}
			if img == nil {
				return
			}
			if img, err = open(b); err != nil {
				t.Fatal(err)
			}
			// A walk ends, whatever it finds.
			steps := 0
			fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
				if steps++; steps > 100000 {
					t.Fatal("the walk does not end")
				}
				return nil
			})
			parent := t.TempDir()
			_, err = Unpack(t.Context(), img, filepath.Join(parent, "root"), UnpackOptions{MaxBytes: 1 << 20})
			if err == nil && name != "an inode nobody names" && name != "too few inodes" {
				t.Error("unpack: no error")
			}
			if list, _ := os.ReadDir(parent); len(list) > 1 || len(list) == 1 && list[0].Name() != "root" {
				t.Errorf("unpack wrote outside its directory: %v", list)
			}
		})
	}
}

func TestDepthLimit(t *testing.T) {
	for depth, ok := range map[int]bool{maxDepth: true, maxDepth + 1: false} {
		f := newForgery()
		at := f.root()
		for range depth {
			at = at.put("d", f.dir())
		}
		img, err := open(f.image(t))
		if err != nil {
			t.Fatal(err)
		}
		if err = Verify(t.Context(), img, true); (err == nil) != ok {
			t.Errorf("depth %d: %v", depth, err)
		}
	}
}
