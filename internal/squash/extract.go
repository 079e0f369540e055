// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// contentSink takes the content of files. begin comes first for each file and
// finish last; between them write is called from several goroutines at a time,
// for all of the file but its holes, in no order.
type contentSink interface {
	begin(*fileTask) error
	write(f *fileTask, off int64, b []byte) error
	finish(*fileTask) error
}

// wholeSink is a sink with a shorter way for files that are one piece of data, as
// most are: whole is called for these, and nothing else.
type wholeSink interface {
	contentSink
	whole(f *fileTask, b []byte) error
}

// fileTask is a regular file on its way to a sink.
type fileTask struct {
	dir  *treeDir
	name string
	ino  *Inode

	mu    sync.Mutex
	begun bool
	left  atomic.Int32 // units still to be done
	fd    int          // the sink's
}

func (f *fileTask) path() string { return f.dir.join(f.name) }

// unit is a piece of work for one worker: a run of blocks of one file, its
// tail, or the tails of many files in one fragment block.
type unit struct {
	files    []*fileTask
	from, to int   // blocks of files[0]
	pos      int64 // of block from in the image
	tails    bool  // all files' tails, which are in one fragment block
}

const (
	// unitBytes is what a unit should unpack to: enough to make reads of the
	// image large, little enough to spread one file over all workers.
	unitBytes = 1 << 20
	// unitFiles bounds how many tails one unit has.
	unitFiles = 256

	// A worker takes units by the run, of so many bytes or files, for the
	// workers to be in different files and directories: two of them in one
	// wait for each other. So many runs lie ready, enough to keep the workers
	// busy while the next batch is gathered.
	runBytes   = 4 << 20
	runFiles   = 1024
	runsQueued = 16

	// Files are gathered in batches that are sorted by their place in the
	// image. The first one is small, so that the workers begin early.
	firstBatch    = 256
	largestBatch  = 16 << 10
	batchMaxWords = 1 << 20 // of block lists, which is 4 MiB
)

// extractor reads files in the order of the image and hands their content to
// a sink. It holds a few blocks per worker in memory, and one batch of inodes.
type extractor struct {
	img   *Image
	sink  contentSink
	whole wholeSink         // the sink, if it is one
	done  func(bytes int64) // may be nil
	queue chan []unit
	frags *fragmentCache

	batch []*fileTask
	words int
	limit int

	// Files whose fragment lies before those of earlier batches, as duplicates
	// do, wait for each other: each fragment is unpacked once more for all of
	// them, not for each.
	strays []placed
	passed int64 // where the fragment lies that is the last by now

	run      []unit // not yet in the queue
	runBytes int64
	runFiles int
}

// extract runs feed, which calls add for each file, and the workers.
func (img *Image) extract(ctx context.Context, workers int, sink contentSink, done func(int64), feed func(ctx context.Context, x *extractor) error) error {
	x := &extractor{img: img, sink: sink, done: done, queue: make(chan []unit, runsQueued),
		frags: newFragmentCache(img, 2*workers+2), limit: firstBatch}
	x.whole, _ = sink.(wholeSink)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(x.queue)
		if err := feed(ctx, x); err != nil {
			return err
		}
		if err := x.flush(ctx); err != nil {
			return err
		}
		return x.sendStrays(ctx)
	})
	for range workers {
		g.Go(func() error { return x.work(ctx) })
	}
	return g.Wait()
}

// add takes a file.
func (x *extractor) add(ctx context.Context, f *fileTask) error {
	x.batch = append(x.batch, f)
	x.words += len(f.ino.Blocks)
	if len(x.batch) < x.limit && x.words < batchMaxWords {
		return nil
	}
	x.limit = min(2*x.limit, largestBatch)
	return x.flush(ctx)
}

// placed is a file and where in the image its data begins.
type placed struct {
	pos int64
	f   *fileTask
}

// flush hands the batch to the workers, but for its strays if these are few.
func (x *extractor) flush(ctx context.Context) error {
	files := make([]placed, 0, len(x.batch))
	var strays []placed
	passed := x.passed
	for _, f := range x.batch {
		pos, err := x.place(f.ino)
		if err != nil {
			return errorAt(f.path(), err)
		}
		if len(f.ino.Blocks) == 0 && f.ino.Fragment != noFragment {
			if pos < x.passed {
				strays = append(strays, placed{pos, f})
				continue
			}
			passed = max(passed, pos)
		}
		files = append(files, placed{pos, f})
	}
	if len(strays) > len(x.batch)/4 {
		files = append(files, strays...)
	} else {
		x.strays = append(x.strays, strays...)
	}
	x.batch, x.words, x.passed = nil, 0, passed
	if len(x.strays) >= largestBatch {
		if err := x.sendStrays(ctx); err != nil {
			return err
		}
	}
	return x.sendSorted(ctx, files)
}

func (x *extractor) sendStrays(ctx context.Context) error {
	files := x.strays
	x.strays = nil
	return x.sendSorted(ctx, files)
}

// sendSorted sorts files and hands them to the workers.
func (x *extractor) sendSorted(ctx context.Context, files []placed) error {
	slices.SortStableFunc(files, func(a, b placed) int { return cmp.Compare(a.pos, b.pos) })

	var group unit // of tails in one fragment
	endGroup := func() error {
		if len(group.files) == 0 {
			return nil
		}
		u := group
		group = unit{tails: true}
		return x.send(ctx, u)
	}
	group.tails = true
	for _, p := range files {
		ino := p.f.ino
		if len(ino.Blocks) > 0 || ino.Fragment == noFragment {
			if err := endGroup(); err != nil {
				return err
			}
			if err := x.split(ctx, p.f); err != nil {
				return err
			}
			continue
		}
		if len(group.files) >= unitFiles || len(group.files) > 0 && group.files[0].ino.Fragment != ino.Fragment {
			if err := endGroup(); err != nil {
				return err
			}
		}
		p.f.left.Store(1)
		group.files = append(group.files, p.f)
	}
	if err := endGroup(); err != nil {
		return err
	}
	return x.sendRun(ctx)
}

// place returns where in the image a file's data begins.
func (x *extractor) place(ino *Inode) (int64, error) {
	if len(ino.Blocks) > 0 || ino.Fragment == noFragment {
		return ino.Start, nil
	}
	pos, _, err := x.img.FragmentBlock(ino.Fragment)
	return pos, err
}

// split cuts a file with blocks into units. A file without any data is one
// unit, too.
func (x *extractor) split(ctx context.Context, f *fileTask) error {
	ino := f.ino
	step := max(unitBytes/int(x.img.sb.BlockSize), 1)
	var units []unit
	pos := ino.Start
	for from := 0; from < len(ino.Blocks); from += step {
		u := unit{files: []*fileTask{f}, from: from, to: min(from+step, len(ino.Blocks)), pos: pos}
		holes := true // a block of no bytes is none, but an error
		for _, w := range ino.Blocks[u.from:u.to] {
			n, _ := dataWordSize(w)
			pos += int64(n)
			holes = holes && w == 0
		}
		if !holes {
			units = append(units, u)
		}
	}
	if ino.Fragment != noFragment {
		units = append(units, unit{files: []*fileTask{f}, tails: true})
	}
	if len(units) == 0 {
		units = append(units, unit{files: []*fileTask{f}})
	}
	f.left.Store(int32(len(units)))
	for _, u := range units {
		if err := x.send(ctx, u); err != nil {
			return err
		}
	}
	return nil
}

// send adds a unit to the run, and hands the run over when it is long enough.
func (x *extractor) send(ctx context.Context, u unit) error {
	x.run = append(x.run, u)
	x.runFiles += len(u.files)
	bs := int64(x.img.sb.BlockSize)
	x.runBytes += int64(u.to-u.from) * bs
	if u.tails {
		x.runBytes += bs
	}
	if x.runBytes < runBytes && x.runFiles < runFiles {
		return nil
	}
	return x.sendRun(ctx)
}

func (x *extractor) sendRun(ctx context.Context) error {
	if len(x.run) == 0 {
		return nil
	}
	run := x.run
	x.run, x.runBytes, x.runFiles = nil, 0, 0
	select {
	case x.queue <- run:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// work does units until there are no more.
func (x *extractor) work(ctx context.Context) error {
	dec, err := x.img.getDecompressor()
	if err != nil {
		return err
	}
	defer x.img.putDecompressor(dec)
	w := &blockWorker{x: x, dec: dec, out: make([]byte, x.img.sb.BlockSize)}
	for run := range x.queue {
		for _, u := range run {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			if err := w.do(u); err != nil {
				return err
			}
		}
	}
	return nil
}

// blockWorker is one worker's memory.
type blockWorker struct {
	x   *extractor
	dec decompressor
	in  []byte
	out []byte
}

func (w *blockWorker) do(u unit) error {
	var fragment *fragmentBlock
	if u.tails {
		var err error
		if fragment, err = w.x.frags.get(u.files[0].ino.Fragment, w); err != nil {
			return errorAt(u.files[0].path(), err)
		}
		defer w.x.frags.release(fragment)
	}
	for _, f := range u.files {
		whole := w.x.wholly(f)
		if !whole {
			if err := w.begin(f); err != nil {
				return err
			}
		}
		var err error
		if u.tails {
			err = w.tail(f, fragment.data)
		} else {
			err = w.blocks(f, u)
		}
		if err != nil {
			return err
		}
		if !whole && f.left.Add(-1) == 0 {
			if err := w.x.sink.finish(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// wholly tells whether the sink gets a file as a whole: its only block or its tail.
func (x *extractor) wholly(f *fileTask) bool {
	if x.whole == nil {
		return false
	}
	if f.ino.Fragment != noFragment {
		return len(f.ino.Blocks) == 0
	}
	return len(f.ino.Blocks) == 1 && f.ino.Blocks[0] != 0
}

// begin announces the file to the sink unless another worker has.
func (w *blockWorker) begin(f *fileTask) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.begun {
		return nil
	}
	f.begun = true
	return w.x.sink.begin(f)
}

// tail hands a file's tail over.
func (w *blockWorker) tail(f *fileTask, fragment []byte) error {
	bs := int64(w.x.img.sb.BlockSize)
	b, err := cutTail(fragment, f.ino, bs)
	if err != nil {
		return errorAt(f.path(), err)
	}
	return w.write(f, f.ino.Size-int64(len(b)), b)
}

// blocks reads a unit's blocks with one call and hands each over.
func (w *blockWorker) blocks(f *fileTask, u unit) error {
	bs := int64(w.x.img.sb.BlockSize)
	total := 0
	for _, word := range f.ino.Blocks[u.from:u.to] {
		n, _ := dataWordSize(word)
		total += n
	}
	src, err := w.read(u.pos, total)
	if err != nil {
		return errorAt(f.path(), err)
	}
	for i := u.from; i < u.to; i++ {
		word := f.ino.Blocks[i]
		if word == 0 {
			continue
		}
		n, _ := dataWordSize(word)
		b, err := unpackBlock(w.dec, w.out, src[:n], word)
		src = src[n:]
		if want := f.ino.blockLen(i, bs); err == nil && int64(len(b)) != want {
			err = corruptf("it has %d bytes, want %d", len(b), want)
		}
		if err != nil {
			return fmt.Errorf("%s: block %d: %w", f.path(), i, err)
		}
		if err := w.write(f, int64(i)*bs, b); err != nil {
			return err
		}
	}
	return nil
}

// read returns n bytes of the image, valid until the next read.
func (w *blockWorker) read(pos int64, n int) ([]byte, error) {
	if cap(w.in) < n {
		w.in = make([]byte, max(n, unitBytes))
	}
	b := w.in[:n]
	return b, w.x.img.readAt(b, pos)
}

func (w *blockWorker) write(f *fileTask, off int64, b []byte) error {
	var err error
	if w.x.wholly(f) {
		err = w.x.whole.whole(f, b)
	} else {
		err = w.x.sink.write(f, off, b)
	}
	if err != nil {
		return err
	}
	if w.x.done != nil {
		w.x.done(int64(len(b)))
	}
	return nil
}

// fragmentCache keeps unpacked fragment blocks while workers use them, and
// some after that, because the files of one need not follow each other.
type fragmentCache struct {
	img  *Image
	keep int

	mu     sync.Mutex
	blocks map[uint32]*fragmentBlock
	idle   []*fragmentBlock // used by nobody, the oldest first
	spare  [][]byte
}

// fragmentBlock is one unpacked fragment block; data and err are set when
// ready is closed.
type fragmentBlock struct {
	index uint32
	users int
	ready chan struct{}
	buf   []byte // what data is cut from
	data  []byte
	err   error
}

func newFragmentCache(img *Image, keep int) *fragmentCache {
	return &fragmentCache{img: img, keep: keep, blocks: map[uint32]*fragmentBlock{}}
}

// get returns a fragment block, which the caller must release.
func (c *fragmentCache) get(index uint32, w *blockWorker) (*fragmentBlock, error) {
	c.mu.Lock()
	if b := c.blocks[index]; b != nil {
		if b.users++; b.users == 1 {
			c.idle = slices.DeleteFunc(c.idle, func(i *fragmentBlock) bool { return i == b })
		}
		c.mu.Unlock()
		<-b.ready
		return b, b.err
	}
	b := &fragmentBlock{index: index, users: 1, ready: make(chan struct{})}
	c.blocks[index] = b
	if n := len(c.spare); n > 0 {
		b.buf, c.spare = c.spare[n-1], c.spare[:n-1]
	} else {
		b.buf = make([]byte, c.img.sb.BlockSize)
	}
	c.mu.Unlock()

	defer close(b.ready)
	b.data, b.err = w.fragment(index, b.buf)
	return b, b.err
}

// fragment reads and unpacks a fragment block into buf.
func (w *blockWorker) fragment(index uint32, buf []byte) ([]byte, error) {
	pos, word, err := w.x.img.FragmentBlock(index)
	if err != nil {
		return nil, err
	}
	n, stored := dataWordSize(word)
	if stored {
		return buf[:n], w.x.img.readAt(buf[:n], pos)
	}
	src, err := w.read(pos, n)
	if err != nil {
		return nil, err
	}
	b, err := unpackBlock(w.dec, buf, src, word)
	if err != nil {
		return nil, fmt.Errorf("fragment %d: %w", index, err)
	}
	return b, nil
}

func (c *fragmentCache) release(b *fragmentBlock) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.users--; b.users > 0 {
		return
	}
	c.idle = append(c.idle, b)
	if len(c.idle) > c.keep {
		old := c.idle[0]
		c.idle = slices.Delete(c.idle, 0, 1)
		delete(c.blocks, old.index)
		c.spare = append(c.spare, old.buf)
	}
}
