// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"runtime/debug"
	"sync"

	"golang.org/x/sync/errgroup"
)

// pipeline brings the content of all files, and all inode and directory
// records, into the image:
//
//	dispatcher ──blocks──▶ workers: read, look for zeroes, hash, compress
//	    │                     ▲
//	    └──items, in order──▶ sequencer ──items──▶ layout: write, make records
//
// The dispatcher walks the tree and hands every block to the workers and,
// through an ordered queue, to the sequencer. The sequencer waits for each
// block in turn, finds small files that are there already and gathers the
// others in fragment blocks, which go to the workers again. The layout stage
// waits in turn for what is compressed, and writes. So all decisions are made
// in the order of the walk and the image does not depend on the workers.
//
// Memory is bounded by the number of blocks: the dispatcher waits for a free
// one, and the layout stage frees them. It cannot lock up: workers never wait
// for anybody, the layout stage only for workers, the sequencer only for these
// two, the dispatcher only for these three.
type pipeline struct {
	w     *writer
	zeros []byte
	key   [sha256.BlockSize]byte // of digests

	work   chan *block // capacity for all blocks there are
	toSeq  chan item
	toOut  chan item
	free   chan *block // blocks for files; nil ones are not allocated yet
	gather chan *block // blocks for fragments

	dup duplicates // of large files: dispatcher
	seq sequencer
	lay layout

	mu   sync.Mutex
	open map[*openFile]struct{}
}

// queueLength is how far the stages may be apart in items without a block.
const queueLength = 256

// ampleBlocks is how many bytes of blocks are enough for any number of workers
// that have two each.
const ampleBlocks = 32 << 20

func newPipeline(w *writer) *pipeline {
	perBlock := int64(2 * w.opt.BlockSize)
	n := min(4*w.opt.Workers, max(2*w.opt.Workers, int(ampleBlocks/perBlock)))
	if limit := w.opt.MemoryLimit; limit > 0 {
		n = int(min(int64(n), max(limit/perBlock-int64(w.opt.Workers+1), 2)))
	}
	fragments := w.opt.Workers + 1
	p := &pipeline{
		w:      w,
		zeros:  make([]byte, w.opt.BlockSize),
		work:   make(chan *block, n+fragments),
		toSeq:  make(chan item, queueLength),
		toOut:  make(chan item, queueLength),
		free:   make(chan *block, n),
		gather: make(chan *block, fragments),
		open:   map[*openFile]struct{}{},
	}
	for range n {
		p.free <- nil
	}
	for range fragments {
		p.gather <- nil
	}
	rand.Read(p.key[:]) // never fails
	p.dup = newDuplicates(w.spool, newFileSummer(p.summer(), w.opt.BlockSize))
	p.seq = sequencer{p: p, fragments: uint32(w.fragments.n), seen: newTable(w.spool, placeKey, placeKey+8)}
	p.lay = layout{p: p, w: w}
	return p
}

func (p *pipeline) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	stage := func(f func(context.Context) error) {
		g.Go(func() error { return guard(ctx, f) })
	}
	stage(p.dispatch)
	for range p.w.opt.Workers {
		stage(p.worker)
	}
	stage(p.seq.run)
	stage(p.lay.run)
	var copying error
	if r := p.w.reuse; r != nil {
		stage(func(ctx context.Context) error {
			err := r.copyRuns(ctx, p.w.out.w, p.w.opt.Written == nil)
			if ctx.Err() == nil {
				copying = err
			}
			return err
		})
	}
	err := g.Wait()
	if err != nil && err == copying {
		err = p.w.out.explain(err) // which reads what the layout stage writes
	}
	// After an error files whose blocks nobody will read are still open.
	for f := range p.open {
		f.r.Close()
	}
	return err
}

// guard turns a panic into an error, so that one bad file ends the packing and
// not the program.
func guard(ctx context.Context, f func(context.Context) error) (err error) {
	// The kernel tells of a disk that fails under a mapped table with a signal.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if fault, ok := r.(interface{ Addr() uintptr }); ok {
			err = fmt.Errorf("the tree's records, in a file beside the image, cannot be read or written: the disk fails, or the volume is full (fault at %#x)", fault.Addr())
		} else if r != nil {
			err = fmt.Errorf("internal error: %v\n%s", r, debug.Stack())
		}
	}()
	return f(ctx)
}

// send and receive give up when another stage failed; the group keeps that
// stage's error, which came first.
func send[T any](ctx context.Context, c chan<- T, v T) error {
	select {
	case c <- v:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func receive[T any](ctx context.Context, c <-chan T) (v T, ok bool, err error) {
	select {
	case v, ok = <-c:
		return v, ok, nil
	case <-ctx.Done():
		return v, false, context.Cause(ctx)
	}
}

// item is one step towards the image.
type item struct {
	kind  itemKind
	ino   *inode
	block *block
	holes uint64        // itemHoles: blocks
	rec   *layoutRecord // itemLarge: to be filled in; itemCopy: to be taken over
	place fragmentPlace // itemSmall, behind the sequencer
	dup   bool          // itemSmall: the place holds another file's bytes
}

type itemKind uint8

const (
	itemBlock    itemKind = iota // a data block of a large file
	itemHoles                    // blocks of zeroes of a large file
	itemLarge                    // the end of a large file
	itemCopy                     // a large file that is a duplicate
	itemBase                     // a file that keeps the data it has in the base
	itemSmall                    // a file shorter than a block, with its content
	itemFragment                 // a fragment block, only behind the sequencer
	itemOther                    // an empty file, a directory behind what is in it, or anything else
	itemName                     // a further name of an inode
)

// block is one piece of work, and the memory for it.
type block struct {
	job    blockJob
	n      int    // bytes of content in raw
	raw    []byte // always a full block long
	packed []byte

	// Where to read the content from; nil when it is there.
	file *openFile
	off  int64
	hash bool // the content's digest is wanted

	done   chan struct{} // capacity 1: told when a worker has finished
	zero   bool          // nothing but zeroes; not packed
	digest digest
	stored []byte // what belongs in the image: part of raw or packed
	word   uint32 // its size word
}

type blockJob uint8

const (
	jobData     blockJob = iota // read and pack
	jobSmall                    // read only
	jobFragment                 // pack only
)

// take waits for a free block from one of the two supplies.
func (p *pipeline) take(ctx context.Context, supply chan *block) (*block, error) {
	b, _, err := receive(ctx, supply)
	if err != nil || b != nil {
		return b, err
	}
	size := p.w.opt.BlockSize
	memory := make([]byte, 2*size)
	return &block{raw: memory[:size:size], packed: memory[size:], done: make(chan struct{}, 1)}, nil
}

// wait waits until a worker is done with the block.
func (b *block) wait(ctx context.Context) error {
	_, _, err := receive(ctx, b.done)
	return err
}
