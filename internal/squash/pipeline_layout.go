// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
)

// fragmentPlace is where a small file's content lies.
type fragmentPlace struct{ index, offset uint32 }

// sequencer is the stage that decides, in the order of the walk, where small
// files go.
type sequencer struct {
	p         *pipeline
	seen      *table // digests of small files, each with its fragmentPlace
	current   *block // the fragment block being filled
	fragments uint32
}

// placeKey is how much of a digest makes finding two contents with the same one
// by chance, which is the only way, less likely than a broken disk.
const placeKey = 12

func (s *sequencer) run(ctx context.Context) error {
	if err := s.seen.reserve(int(s.p.w.tree.files)); err != nil {
		return err
	}
	for {
		it, ok, err := receive(ctx, s.p.toSeq)
		if err != nil {
			return err
		}
		if !ok {
			// The dispatcher has finished, so nobody sends to work but us.
			err := s.endFragment(ctx)
			if err == nil {
				close(s.p.work)
				close(s.p.toOut)
			}
			return err
		}
		if it.kind == itemSmall {
			if it.place, it.dup, err = s.place(ctx, it.block); err != nil {
				return err
			}
			it.block = nil
		}
		if err := send(ctx, s.p.toOut, it); err != nil {
			return err
		}
	}
}

// place finds room for a small file's content and frees its block.
func (s *sequencer) place(ctx context.Context, b *block) (at fragmentPlace, dup bool, err error) {
	if err := b.wait(ctx); err != nil {
		return at, false, err
	}
	defer func() { s.p.free <- b }()
	if b.hash {
		if i, dup := s.seen.find(b.digest[:placeKey]); dup {
			r := s.seen.at(i)[placeKey:]
			return fragmentPlace{binary.LittleEndian.Uint32(r), binary.LittleEndian.Uint32(r[4:])}, true, nil
		}
	}
	if s.current != nil && s.current.n+b.n > len(s.current.raw) {
		if err := s.endFragment(ctx); err != nil {
			return at, false, err
		}
	}
	if s.current == nil {
		if s.current, err = s.p.take(ctx, s.p.gather); err != nil {
			return at, false, err
		}
		s.current.job, s.current.n = jobFragment, 0
	}
	at = fragmentPlace{index: s.fragments, offset: uint32(s.current.n)}
	s.current.n += copy(s.current.raw[s.current.n:], b.raw[:b.n])
	if b.hash {
		i, err := s.seen.add(b.digest[:placeKey])
		if err != nil {
			return at, false, err
		}
		r := s.seen.at(i)[placeKey:]
		binary.LittleEndian.PutUint32(r, at.index)
		binary.LittleEndian.PutUint32(r[4:], at.offset)
	}
	return at, false, nil
}

// endFragment sends the current fragment block on its way.
func (s *sequencer) endFragment(ctx context.Context) error {
	b := s.current
	if b == nil {
		return nil
	}
	s.current = nil
	s.fragments++
	if err := send(ctx, s.p.work, b); err != nil {
		return err
	}
	return send(ctx, s.p.toOut, item{kind: itemFragment, block: b})
}

// layout is the last stage: it alone knows offsets in the image, writes to it,
// and makes the records that hold such offsets.
type layout struct {
	p *pipeline
	w *writer

	// The large file whose blocks are passing.
	start  uint64
	placed bool // start is known
	words  []uint32
	sparse uint64
	sum    contentSum
	passed int64 // bytes, for progress

	done int64 // of all files' content
}

func (l *layout) run(ctx context.Context) error {
	for {
		it, ok, err := receive(ctx, l.p.toOut)
		if err != nil || !ok {
			return err
		}
		if err := l.step(ctx, it); err != nil {
			return err
		}
	}
}

func (l *layout) step(ctx context.Context, it item) error {
	w := l.w
	switch it.kind {
	case itemBlock:
		return l.dataBlock(ctx, it.block)
	case itemHoles:
		l.holes(it.holes)
	case itemFragment:
		return l.fragment(ctx, it.block)
	case itemLarge:
		l.packed(it.ino.size - l.passed)
		l.passed = 0
		return l.largeFile(it.ino, it.rec)
	case itemCopy:
		w.stats.Duplicates++
		w.stats.DuplicateBytes += it.ino.size
		l.packed(it.ino.size)
		r := it.rec.inode
		return w.writeInode(it.ino, &r)
	case itemBase:
		r, err := w.reuse.record(it.ino.base)
		if err != nil {
			return err
		}
		l.progress(it.ino.size)
		return w.writeInode(it.ino, r)
	case itemSmall:
		if it.dup {
			w.stats.Duplicates++
			w.stats.DuplicateBytes += it.ino.size
		}
		l.packed(it.ino.size)
		return w.writeInode(it.ino, &inodeRecord{Size: uint64(it.ino.size), Fragment: it.place.index, FragOffset: it.place.offset})
	case itemOther:
		if it.ino.typ == typeFile {
			return w.writeInode(it.ino, &inodeRecord{Fragment: noFragment})
		}
		return w.writeOther(it.ino)
	case itemName:
		return w.list(it.ino)
	}
	return nil
}

// largeFile ends the file whose blocks have passed.
func (l *layout) largeFile(ino *inode, rec *layoutRecord) error {
	size, blockSize := uint64(ino.size), uint64(l.w.opt.BlockSize)
	if tail := size % blockSize; tail > 0 && l.words[len(l.words)-1] == 0 {
		l.sparse -= blockSize - tail // the last hole ends with the file
	}
	r := inodeRecord{Start: l.start, Size: size, Sparse: l.sparse, Fragment: noFragment, Blocks: l.words}
	if rec != nil {
		rec.finish(&r, l.sum.sum())
	}
	err := l.w.writeInode(ino, &r)
	l.start, l.placed, l.words, l.sparse, l.sum = 0, false, l.words[:0], 0, contentSum{}
	return err
}

// packed notes that so much content of files was packed, progress that it is in
// the image, be it as the base has it.
func (l *layout) packed(n int64) {
	l.w.out.done += n
	l.progress(n)
}

func (l *layout) progress(n int64) {
	l.done += n
	if l.w.opt.Progress != nil {
		l.w.opt.Progress(l.done, l.w.tree.bytes)
	}
}

func (l *layout) dataBlock(ctx context.Context, b *block) error {
	if err := b.wait(ctx); err != nil {
		return err
	}
	defer func() { l.p.free <- b }()
	l.passed += int64(b.n)
	if b.zero {
		l.holes(1)
		l.packed(int64(b.n))
		return nil
	}
	if !l.placed {
		l.start, l.placed = uint64(l.w.out.off), true
	}
	l.words = append(l.words, b.word)
	if b.hash {
		l.sum.block(b.digest)
	}
	if err := l.w.out.write(b.stored); err != nil {
		return err
	}
	l.packed(int64(b.n))
	return nil
}

func (l *layout) holes(n uint64) {
	l.words = append(l.words, make([]uint32, n)...)
	l.sparse += n * uint64(l.w.opt.BlockSize)
	l.sum.holes(n)
}

func (l *layout) fragment(ctx context.Context, b *block) error {
	if err := b.wait(ctx); err != nil {
		return err
	}
	defer func() { l.p.gather <- b }()
	if err := l.w.fragments.add(fragmentEntry{Start: uint64(l.w.out.off), Size: b.word}); err != nil {
		return err
	}
	return l.w.out.write(b.stored)
}
