// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// region is an array of records of one size. Beyond what the spool holds in
// memory it is a file's pages, mapped: reading and writing them takes no calls.
// Room in the file is made first, so that a full volume is an error and no signal.
type region struct {
	spool    *spool
	size     int // bytes of a record
	segments [][]byte
	file     *os.File
}

// segmentBytes is how much room is made at a time, but at first: most trees are
// small, and have many regions.
const (
	segmentBytes = 1 << 20
	leastSegment = 16 << 10
)

func (r *region) perSegment() int { return segmentBytes / r.size }

// at returns a record, to be read and written until there is room for more.
func (r *region) at(i int) []byte {
	per := segmentBytes / r.size
	return r.segments[i/per][i%per*r.size:][:r.size:r.size]
}

// grow makes room for n records in all. New ones are zero.
func (r *region) grow(n int) error {
	per := r.perSegment()
	if len(r.segments) > 0 {
		if first, need := r.segments[0], min(n, per)*r.size; len(first) < need {
			r.segments[0] = make([]byte, min(segmentBytes, max(need, 2*len(first))))
			copy(r.segments[0], first)
		}
	}
	for have := len(r.segments) * per; have < n; have += per {
		if (len(r.segments)+1)*segmentBytes > max(r.spool.holds(), r.size) {
			if err := r.addMapped(); err != nil {
				return err
			}
			continue
		}
		length := segmentBytes
		if len(r.segments) == 0 {
			length = min(length, max(n*r.size, leastSegment))
		}
		r.segments = append(r.segments, make([]byte, length))
	}
	return nil
}

// addMapped adds a segment of the file.
func (r *region) addMapped() error {
	if r.file == nil {
		var err error
		if r.file, err = r.spool.file(); err != nil {
			return err
		}
	}
	off := int64(len(r.segments)) * segmentBytes
	fd := int(r.file.Fd())
	err := ignoringEINTR(func() error { return unix.Fallocate(fd, 0, off, segmentBytes) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		_, err = r.file.WriteAt(make([]byte, segmentBytes), off)
	}
	if err != nil {
		return r.spool.explain(err)
	}
	b, err := r.spool.mapFile(r.file, off, segmentBytes)
	if err != nil {
		return err
	}
	r.segments = append(r.segments, b)
	return nil
}

// release gives the region's memory and file back.
func (r *region) release() {
	if r.file != nil {
		r.spool.release(r.file)
	}
	r.segments, r.file = nil, nil
}

// table finds records by the key they begin with. A tree may have millions, so a
// record takes no more than its bytes and some ten for finding it.
type table struct {
	key     int    // bytes of it
	slots   region // open addressing: 4 bytes of the key's hash, and 1 + the record's number, or zero
	count   int    // of slots
	records region
	n       int // records
	seed    maphash.Seed
}

const slotSize = 8

func newTable(s *spool, key, size int) *table {
	return &table{key: key, slots: region{spool: s, size: slotSize}, records: region{spool: s, size: size}, seed: maphash.MakeSeed()}
}

func (t *table) at(i int) []byte { return t.records.at(i) }

// slot returns the slot of a key, or the free one where it belongs, and what of
// the key's hash stands in it. Half of the hash is where to look, the other half
// keeps from looking at the records of other keys.
func (t *table) slot(key []byte) (slot []byte, mark uint32) {
	h := maphash.Bytes(t.seed, key)
	mark = uint32(h)
	for i := int(h >> 32 * uint64(t.count) >> 32); ; i++ {
		if i == t.count {
			i = 0
		}
		s := t.slots.at(i)
		n := binary.LittleEndian.Uint32(s[4:])
		if n == 0 || binary.LittleEndian.Uint32(s) == mark && string(t.at(int(n - 1))[:t.key]) == string(key) {
			return s, mark
		}
	}
}

// find returns the number of a key's record.
func (t *table) find(key []byte) (number int, ok bool) {
	if t.n == 0 {
		return 0, false
	}
	s, _ := t.slot(key)
	n := binary.LittleEndian.Uint32(s[4:])
	return int(n) - 1, n > 0
}

// add makes a record for a key that find does not know, and returns its number.
func (t *table) add(key []byte) (number int, err error) {
	if t.n >= math.MaxUint32-1 {
		return 0, fmt.Errorf("more than %d records in a table", t.n)
	}
	if t.n >= t.count/8*7 {
		if err := t.reserve(2 * t.n); err != nil {
			return 0, err
		}
	}
	if err := t.records.grow(t.n + 1); err != nil {
		return 0, err
	}
	copy(t.at(t.n), key)
	s, mark := t.slot(key)
	t.n++
	binary.LittleEndian.PutUint32(s, mark)
	binary.LittleEndian.PutUint32(s[4:], uint32(t.n))
	return t.n - 1, nil
}

// reserve makes slots for n records, so that they need not be moved on the way
// there.
func (t *table) reserve(n int) error {
	count := max(n/4*5, 1024)
	if count <= t.count {
		return nil
	}
	t.slots.release()
	if err := t.slots.grow(count); err != nil {
		return err
	}
	t.count = count
	for i := range t.n {
		s, mark := t.slot(t.at(i)[:t.key])
		binary.LittleEndian.PutUint32(s, mark)
		binary.LittleEndian.PutUint32(s[4:], uint32(i+1))
	}
	return nil
}

// freeze gives the slots back; records are then found by their numbers only.
func (t *table) freeze() { t.slots.release() }
