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
	seen   *table          // firstBlocks, each with 1 + the number of the last file that begins so
	placed region          // placedFiles
	blocks stream          // their size words
	n      int             // files in placed
	flying []*layoutRecord // the last of them, which the layout stage has yet to place
	*fileSummer
}

const firstBlockSize = 8 + sha256.Size

func newDuplicates(s *spool, sums *fileSummer) duplicates {
	return duplicates{
		seen:   newTable(s, firstBlockSize, firstBlockSize+4),
		placed: region{spool: s, size: placedFileSize}, blocks: stream{spool: s}, fileSummer: sums,
	}
}

// placedFile is where a large file is: 1 + the number of an earlier one with the
// same first block, its digest, where its blocks begin, its holes, and its size
// words' place in duplicates.blocks and their number.
type placedFile []byte

const placedFileSize = 4 + sha256.Size + 8 + 8 + 8 + 4

func (p placedFile) earlier() int { return int(binary.LittleEndian.Uint32(p)) }
func (p placedFile) sum() []byte  { return p[4:][:sha256.Size] }

// land notes where the first of the flying files went.
func (d *duplicates) land() error {
	r, p := d.flying[0], placedFile(d.placed.at(d.n-len(d.flying)))
	d.flying[0], d.flying = nil, d.flying[1:]
	copy(p.sum(), r.sum[:])
	rest := binary.LittleEndian.AppendUint64(p[:4+sha256.Size], r.inode.Start)
	rest = binary.LittleEndian.AppendUint64(rest, r.inode.Sparse)
	rest = binary.LittleEndian.AppendUint64(rest, uint64(d.blocks.size()))
	binary.LittleEndian.AppendUint32(rest, uint32(len(r.inode.Blocks)))
	words := make([]byte, 0, 4*len(r.inode.Blocks))
	for _, word := range r.inode.Blocks {
		words = binary.LittleEndian.AppendUint32(words, word)
	}
	return d.blocks.write(words)
}

// record is where a file went that has landed.
func (d *duplicates) record(p placedFile, size int64) (*layoutRecord, error) {
	rest := p[4+sha256.Size:]
	words := make([]byte, 4*int(binary.LittleEndian.Uint32(rest[24:])))
	if err := d.blocks.readAt(words, int64(binary.LittleEndian.Uint64(rest[16:]))); err != nil {
		return nil, err
	}
	r := &layoutRecord{inode: inodeRecord{Start: binary.LittleEndian.Uint64(rest), Sparse: binary.LittleEndian.Uint64(rest[8:]),
		Size: uint64(size), Fragment: noFragment, Blocks: make([]uint32, len(words)/4)}}
	for i := range r.inode.Blocks {
		r.inode.Blocks[i] = binary.LittleEndian.Uint32(words[4*i:])
	}
	return r, nil
}

// find returns the record of an earlier file with the content of f and true,
// or a new record to be filled in.
func (d *duplicates) find(ctx context.Context, f *openFile) (*layoutRecord, bool, error) {
	first, err := d.firstBlock(f)
	if err != nil {
		return nil, false, err
	}
	at, known := d.seen.find(first)
	if known {
		r, err := d.same(ctx, f, d.last(at))
		if r != nil || err != nil {
			return r, r != nil, err
		}
	} else if at, err = d.seen.add(first); err != nil {
		return nil, false, err
	}
	if err := d.placed.grow(d.n + 1); err != nil {
		return nil, false, err
	}
	last := d.seen.at(at)[firstBlockSize:]
	copy(d.placed.at(d.n), last)
	d.n++
	binary.LittleEndian.PutUint32(last, uint32(d.n))
	r := &layoutRecord{known: make(chan struct{})}
	d.flying = append(d.flying, r)
	return r, false, d.landKnown()
}

// last is 1 + the number of the last file with a first block.
func (d *duplicates) last(at int) int {
	return int(binary.LittleEndian.Uint32(d.seen.at(at)[firstBlockSize:]))
}

// landKnown takes in what the layout stage has placed meanwhile.
func (d *duplicates) landKnown() error {
	for len(d.flying) > 0 {
		select {
		case <-d.flying[0].known:
			if err := d.land(); err != nil {
				return err
			}
		default:
			return nil
		}
	}
	return nil
}

// firstBlock is what two large files must have in common before it is worth
// reading one of them in full to find out whether they are the same: their size,
// and the digest of their first block, or zeroes for a hole.
func (d *duplicates) firstBlock(f *openFile) ([]byte, error) {
	var sum digest
	next, err := f.nextData(0, int64(len(d.zeros)))
	if err == nil && next == 0 {
		_, sum, err = d.readBlock(f, 0)
	}
	return append(binary.LittleEndian.AppendUint64(nil, uint64(f.size)), sum[:]...), err
}

// same returns where a file with the content of f went, if there is one among
// those that begin like it; number is 1 + that of the last of them.
func (d *duplicates) same(ctx context.Context, f *openFile, number int) (*layoutRecord, error) {
	sum, err := d.readAll(ctx, f)
	if err != nil {
		return nil, err
	}
	for ; number > 0; number = placedFile(d.placed.at(number - 1)).earlier() {
		for d.n-len(d.flying) < number {
			if _, _, err := receive(ctx, d.flying[0].known); err != nil {
				return nil, err
			}
			if err := d.land(); err != nil {
				return nil, err
			}
		}
		if p := placedFile(d.placed.at(number - 1)); bytes.Equal(p.sum(), sum[:]) {
			return d.record(p, f.size)
		}
	}
	return nil, nil
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
