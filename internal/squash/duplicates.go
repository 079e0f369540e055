// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
)

// digest names content. The tree is a stranger's, so a hash for which two
// inputs can be made to collide would let them put one file's bytes into
// another.
type digest [sha256.Size]byte

// summer makes digests of blocks with a key that nobody knows beforehand: two
// that begin alike then come by chance only, and millions can be kept short. It is not safe for
// concurrent use.
type summer struct {
	h   hash.Hash
	key *[sha256.BlockSize]byte
}

func (s *summer) sum(b []byte) (d digest) {
	s.h.Reset()
	s.h.Write(s.key[:])
	s.h.Write(b)
	s.h.Sum(d[:0])
	return d
}

func (p *pipeline) summer() *summer { return &summer{h: sha256.New(), key: &p.key} }

// contentSum is the digest of a large file: of its blocks' digests, with runs
// of zeroes counted, so that holes need not be read.
type contentSum struct {
	h       hash.Hash
	pending uint64 // blocks of zeroes
}

func (s *contentSum) holes(n uint64) { s.pending += n }

func (s *contentSum) block(d digest) {
	s.flush()
	s.h.Write([]byte{1})
	s.h.Write(d[:])
}

func (s *contentSum) flush() {
	if s.h == nil {
		s.h = sha256.New()
	}
	if s.pending > 0 {
		s.h.Write(binary.LittleEndian.AppendUint64([]byte{0}, s.pending))
		s.pending = 0
	}
}

func (s *contentSum) sum() (d digest) {
	s.flush()
	s.h.Sum(d[:0])
	return d
}

// firstBlock is what two large files must have in common before it is worth
// reading one of them in full to find out whether they are the same.
type firstBlock struct {
	size   int64
	digest digest
}

// layoutRecord is where a large file that may have duplicates went.
type layoutRecord struct {
	known chan struct{} // closed when the rest is set
	sum   digest
	inode inodeRecord
}

func (r *layoutRecord) finish(ino *inodeRecord, sum digest) {
	r.sum, r.inode = sum, *ino
	r.inode.Blocks = append([]uint32(nil), ino.Blocks...)
	close(r.known)
}

// duplicates finds large files that are in the image already, before any of
// their blocks is compressed.
type duplicates struct {
	seen map[firstBlock][]*layoutRecord
	*fileSummer
}

// find returns the record of an earlier file with the content of f and true,
// or a new record to be filled in.
func (d *duplicates) find(ctx context.Context, f *openFile) (*layoutRecord, bool, error) {
	key := firstBlock{size: f.size} // a digest of zeroes stands for a hole
	next, err := f.nextData(0, int64(len(d.zeros)))
	if err == nil && next == 0 {
		_, key.digest, err = d.readBlock(f, 0)
	}
	if err != nil {
		return nil, false, err
	}
	if earlier := d.seen[key]; len(earlier) > 0 {
		sum, err := d.readAll(ctx, f)
		if err != nil {
			return nil, false, err
		}
		for _, r := range earlier {
			if _, _, err := receive(ctx, r.known); err != nil {
				return nil, false, err
			}
			if r.sum == sum {
				return r, true, nil
			}
		}
	}
	r := &layoutRecord{known: make(chan struct{})}
	d.seen[key] = append(d.seen[key], r)
	return r, false, nil
}

// fileSummer reads files to find out their digests.
type fileSummer struct {
	*summer
	buf, zeros []byte
}

func newFileSummer(s *summer, blockSize int) *fileSummer {
	return &fileSummer{summer: s, buf: make([]byte, blockSize), zeros: make([]byte, blockSize)}
}

// blockDigest returns the digest of one block, or zero that it has none.
func (s *fileSummer) blockDigest(raw []byte) (zero bool, sum digest) {
	if bytes.Equal(raw, s.zeros[:len(raw)]) {
		return true, sum
	}
	return false, s.sum(raw)
}

func (s *fileSummer) readBlock(f *openFile, off int64) (zero bool, sum digest, err error) {
	raw := s.buf[:min(int64(len(s.buf)), f.size-off)]
	if err := f.readAt(raw, off); err != nil {
		return false, sum, err
	}
	zero, sum = s.blockDigest(raw)
	return zero, sum, nil
}

func (s *fileSummer) readAll(ctx context.Context, f *openFile) (digest, error) {
	var all contentSum
	size := int64(len(s.buf))
	for off := int64(0); off < f.size; {
		if ctx.Err() != nil {
			return digest{}, context.Cause(ctx)
		}
		next, err := f.nextData(off, size)
		if err != nil {
			return digest{}, err
		}
		if next > off {
			all.holes(uint64((next - off + size - 1) / size))
			off = next
			continue
		}
		zero, sum, err := s.readBlock(f, off)
		if err != nil {
			return digest{}, err
		}
		if zero {
			all.holes(1)
		} else {
			all.block(sum)
		}
		off += size
	}
	return all.sum(), nil
}
