// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
)

// reuse is what a new image takes over from its base.
type reuse struct {
	base    *Image
	maxDead float64
	stats   BaseStats

	options   []byte            // the base's compressor options, as they stand
	runs      []relocation      // in ascending order, apart from each other
	fragments map[uint32]uint32 // indexes: in the base, in the new image
	order     []uint32          // of these fragment blocks, by their new indexes
}

// relocation is a piece of the base's data area and where it goes.
type relocation struct{ from, to, n int64 }

// span is a piece of the data area.
type span struct{ from, n int64 }

// tailSpan is a file's tail in an unpacked fragment block.
type tailSpan struct{ fragment, from, n uint32 }

// unfit says why nothing of a base can stand in an image with these options, or
// nothing.
func (b *Base) unfit(opt *Options) string {
	sb := &b.Image.sb
	switch {
	case sb.Compressor != opt.Compressor:
		return fmt.Sprintf("the base is compressed with %v, the new image with %v", sb.Compressor, opt.Compressor)
	case int(sb.BlockSize) != opt.BlockSize:
		return fmt.Sprintf("the base has blocks of %d bytes, the new image of %d", sb.BlockSize, opt.BlockSize)
	case sb.Compressor == XZ && opt.DictSize > b.dictSize():
		return fmt.Sprintf("the base has xz dictionaries of %d bytes, the new image of %d", b.dictSize(), opt.DictSize)
	}
	return ""
}

// dictSize is what readers of the base take for the size of xz dictionaries.
func (b *Base) dictSize() int {
	if o := b.Image.options; o != nil && o.DictSize != 0 {
		return int(o.DictSize)
	}
	return int(max(b.Image.sb.BlockSize, metaBlockSize))
}

// adopt gives options that are not set the base's values.
func (b *Base) adopt(opt *Options) {
	sb := &b.Image.sb
	if opt.Compressor == 0 && sb.Compressor != LZMA && sb.Compressor != LZO {
		opt.Compressor = sb.Compressor
	}
	if opt.BlockSize == 0 {
		opt.BlockSize = int(sb.BlockSize)
	}
	if opt.Compressor == XZ && opt.DictSize == 0 {
		opt.DictSize = b.dictSize()
	}
}

// plan decides which files keep their data, finds files with other names or
// times whose content the base has, and lays out what is taken over.
func (w *writer) plan(ctx context.Context) error {
	b := w.opt.Base
	if b == nil {
		return nil
	}
	if why := b.unfit(&w.opt); why != "" {
		w.stats.Base = &BaseStats{Refused: why}
		w.tree.kept, w.tree.changed = nil, nil
		return nil
	}
	r := &reuse{base: b.Image, maxDead: b.MaxDead, fragments: map[uint32]uint32{}}
	if r.maxDead == 0 {
		r.maxDead = maxDead
	}
	if err := r.loadOptions(); err != nil {
		return err
	}
	if err := r.match(ctx, w); err != nil {
		return err
	}
	if err := r.choose(ctx, w, b.Layout); err != nil {
		return err
	}
	w.reuse, w.stats.Base = r, &r.stats
	return nil
}

// loadOptions keeps the bytes between the base's superblock and its data.
func (r *reuse) loadOptions() error {
	r.options = make([]byte, r.base.dataAt-superblockSize)
	return r.base.readAt(r.options, superblockSize)
}

// dataArea is the part of the base that data blocks lie in.
func (r *reuse) dataArea() span {
	return span{r.base.dataAt, int64(r.base.sb.InodeTable) - r.base.dataAt}
}

// changedFile is a file that does not say whose data in the base it has.
type changedFile struct {
	content Content
	path    string
	size    int64
	at      int // its place in inventory.kept
}

// noteBase keeps what plan needs of a file.
func (t *inventory) noteBase(e *Entry) {
	if t.opt.Base == nil {
		return
	}
	ref := noRef
	if c, ok := e.Content.(*baseContent); ok && c.img == t.opt.Base.Image {
		ref = c.ref
	} else if e.Size > 0 {
		t.changed = append(t.changed, changedFile{e.Content, strings.Clone(e.Path), e.Size, len(t.kept)})
	}
	t.kept = append(t.kept, ref)
}

// eachKept calls fn with the base's inode of each file that keeps its data; fn
// returns whether it still does.
func (r *reuse) eachKept(ctx context.Context, w *writer, fn func(*Inode) bool) error {
	for i, ref := range w.tree.kept {
		if i%1024 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if ref == noRef {
			continue
		}
		ino, err := r.base.fileInode(ref)
		if err != nil {
			return err
		}
		if !fn(ino) {
			w.tree.kept[i] = noRef
		}
	}
	return nil
}

// choose picks the layout and lays out the runs.
func (r *reuse) choose(ctx context.Context, w *writer, layout Layout) error {
	area := r.dataArea()
	data, tails, err := r.live(ctx, w)
	if err != nil {
		return err
	}
	blocks, err := r.fragmentUse(ctx, tails)
	if err != nil {
		return err
	}
	dead := area.n
	for _, s := range data {
		dead -= s.n
	}
	for _, f := range blocks {
		dead -= f.live()
	}
	r.stats.Layout = layout
	if layout == LayoutAuto {
		r.stats.Layout = LayoutAppend
		if float64(dead) > r.maxDead*float64(area.n) {
			r.stats.Layout = LayoutCompact
		}
	}
	if r.stats.Layout == LayoutAppend {
		r.stats.DeadBytes = max(dead, 0)
		r.runs = []relocation{{area.from, area.from, area.n}}
		r.keep(blocks)
		return r.count(ctx, w)
	}
	if blocks, err = r.dissolve(ctx, w, blocks); err != nil {
		return err
	}
	if data, _, err = r.live(ctx, w); err != nil {
		return err
	}
	for _, f := range blocks {
		r.stats.DeadBytes += f.at.n - f.live()
		data = append(data, f.at)
	}
	to := area.from
	for _, s := range merge(data) {
		r.runs = append(r.runs, relocation{s.from, to, s.n})
		to += s.n
	}
	r.keep(blocks)
	return r.count(ctx, w)
}

// count completes the statistics.
func (r *reuse) count(ctx context.Context, w *writer) error {
	for _, x := range r.runs {
		r.stats.CopiedBytes += x.n
		if x.n >= leastShared {
			r.stats.Shared = append(r.stats.Shared, SharedRange{x.from, x.to, x.n})
		}
	}
	return r.eachKept(ctx, w, func(ino *Inode) bool {
		r.stats.Files++
		r.stats.Bytes += ino.Size
		return true
	})
}

// live returns where the files that keep their data have it: in blocks of
// their own, merged, and in fragments, each tail once.
func (r *reuse) live(ctx context.Context, w *writer) (data []span, tails []tailSpan, err error) {
	blockSize := int64(r.base.sb.BlockSize)
	err = r.eachKept(ctx, w, func(ino *Inode) bool {
		if n := packedLen(ino.Blocks); n > 0 {
			data = append(data, span{ino.Start, n})
		}
		if n := ino.tailLen(blockSize); n > 0 {
			tails = append(tails, tailSpan{ino.Fragment, ino.FragOffset, uint32(n)})
		}
		return true
	})
	slices.SortFunc(tails, func(a, b tailSpan) int {
		return cmp.Or(cmp.Compare(a.fragment, b.fragment), cmp.Compare(a.from, b.from), cmp.Compare(a.n, b.n))
	})
	return merge(data), slices.Compact(tails), err
}

// packedLen is what blocks take in an image.
func packedLen(words []uint32) (sum int64) {
	for _, w := range words {
		n, _ := dataWordSize(w)
		sum += int64(n)
	}
	return sum
}

// merge sorts spans and joins those that touch or overlap, as a hostile image's
// may.
func merge(list []span) []span {
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var out []span
	for _, s := range list {
		if n := len(out); n > 0 && s.from <= out[n-1].from+out[n-1].n {
			out[n-1].n = max(out[n-1].n, s.from+s.n-out[n-1].from)
			continue
		}
		out = append(out, s)
	}
	return out
}

// fragmentUse says how much of a fragment block of the base is live.
type fragmentUse struct {
	index     uint32
	at        span
	used, all int64 // bytes of its unpacked content
}

// live is the share of the packed block that is live.
func (f fragmentUse) live() int64 {
	return int64(float64(f.at.n) * float64(min(f.used, f.all)) / float64(f.all))
}

// fragmentUse returns the fragment blocks that hold live tails, in their order.
func (r *reuse) fragmentUse(ctx context.Context, tails []tailSpan) ([]fragmentUse, error) {
	if len(tails) == 0 {
		return nil, nil
	}
	// How long a block's content is, is only known from those who refer to it.
	ends := make([]uint32, r.base.sb.Fragments)
	err := r.base.eachFile(ctx, func(ino *Inode) error {
		if n := ino.tailLen(int64(r.base.sb.BlockSize)); n > 0 {
			ends[ino.Fragment] = max(ends[ino.Fragment], ino.FragOffset+uint32(n))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var blocks []fragmentUse
	for _, t := range tails {
		if n := len(blocks); n == 0 || blocks[n-1].index != t.fragment {
			pos, word, err := r.base.FragmentBlock(t.fragment)
			if err != nil {
				return nil, err
			}
			size, _ := dataWordSize(word)
			blocks = append(blocks, fragmentUse{index: t.fragment, at: span{pos, int64(size)}, all: int64(ends[t.fragment])})
		}
		blocks[len(blocks)-1].used += int64(t.n)
	}
	return blocks, nil
}

// dissolve has the files in fragment blocks of which too much is dead
// compressed anew, and returns the other blocks.
func (r *reuse) dissolve(ctx context.Context, w *writer, blocks []fragmentUse) ([]fragmentUse, error) {
	poor := map[uint32]bool{}
	kept := slices.DeleteFunc(blocks, func(f fragmentUse) bool {
		if float64(f.used) < (1-r.maxDead)*float64(f.all) {
			poor[f.index] = true
		}
		return poor[f.index]
	})
	return kept, r.eachKept(ctx, w, func(ino *Inode) bool {
		return ino.tailLen(int64(r.base.sb.BlockSize)) == 0 || !poor[ino.Fragment]
	})
}

// keep numbers the fragment blocks that are taken over.
func (r *reuse) keep(blocks []fragmentUse) {
	for _, f := range blocks {
		r.fragments[f.index] = uint32(len(r.order))
		r.order = append(r.order, f.index)
	}
}

// eachFile reads the inode table from front to back and calls fn for every
// regular file in it.
func (img *Image) eachFile(ctx context.Context, fn func(*Inode) error) error {
	c, err := img.cursor(img.inodes, 0)
	if err != nil {
		return err
	}
	for i := range img.sb.Inodes {
		if i%1024 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		ref := c.ref()
		rec, err := decodeInode(c, img.sb.BlockSize)
		if err != nil {
			return fmt.Errorf("inode table: %w", err)
		}
		for range rec.IndexCount { // a directory's index lies between it and the next inode
			if _, err := decodeDirIndex(c); err != nil {
				return fmt.Errorf("inode %d: %w", rec.Number, err)
			}
		}
		if rec.Type.basic() != typeFile {
			continue
		}
		ino, err := img.checkInode(&rec)
		if err != nil {
			return fmt.Errorf("inode %d: %w", rec.Number, err)
		}
		ino.ref = ref
		if err := fn(ino); err != nil {
			return err
		}
	}
	return nil
}
