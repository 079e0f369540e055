// SPDX-License-Identifier: Apache-2.0

package squash

import "encoding/binary"

// contentTable tells where content lies in the image, by its digest. A tree may
// have millions of small files, so an entry takes 28 bytes or so, half of what
// it would in a map.
type contentTable struct {
	slots  []uint32 // open addressing; 1 + the entry's number, or zero
	chunks [][]contentEntry
	n      uint32
}

// contentEntry has as much of a digest as makes finding two contents with the
// same one by chance, which is the only way, less likely than a broken disk.
type contentEntry struct {
	key [12]byte
	at  fragmentPlace
}

const contentChunk = 1024 // entries

func (t *contentTable) entry(i uint32) *contentEntry {
	return &t.chunks[i/contentChunk][i%contentChunk]
}

// slot returns the slot of a key, or the free one where it belongs.
func (t *contentTable) slot(key *[12]byte) *uint32 {
	mask := uint32(len(t.slots) - 1)
	for i := binary.LittleEndian.Uint32(key[:]) & mask; ; i = (i + 1) & mask {
		if s := &t.slots[i]; *s == 0 || t.entry(*s-1).key == *key {
			return s
		}
	}
}

func (t *contentTable) find(d *digest) (at fragmentPlace, ok bool) {
	if t.n == 0 {
		return at, false
	}
	s := *t.slot((*[12]byte)(d[:]))
	if s == 0 {
		return at, false
	}
	return t.entry(s - 1).at, true
}

// add takes a digest that find does not know.
func (t *contentTable) add(d *digest, at fragmentPlace) {
	if int(t.n) >= len(t.slots)/8*7 {
		t.slots = make([]uint32, max(2*len(t.slots), contentChunk))
		for i := range t.n {
			*t.slot(&t.entry(i).key) = i + 1
		}
	}
	if t.n%contentChunk == 0 {
		t.chunks = append(t.chunks, make([]contentEntry, contentChunk))
	}
	key := (*[12]byte)(d[:])
	*t.entry(t.n) = contentEntry{*key, at}
	t.n++
	*t.slot(key) = t.n
}
