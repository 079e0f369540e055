// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"fmt"
	"path"
	"sync/atomic"
)

// openFile is a file whose blocks are being read. It is closed, and with that
// checked for changes, when the last block is in memory.
type openFile struct {
	r    ContentReader
	path string
	size int64
	uses atomic.Int64
}

func (p *pipeline) openFile(ino *inode, name string) (*openFile, error) {
	r, err := ino.content.Open()
	if err != nil {
		return nil, err
	}
	f := &openFile{r: r, path: name, size: ino.size}
	f.uses.Store(1)
	ino.content = nil // of no more use
	p.mu.Lock()
	p.open[f] = struct{}{}
	p.mu.Unlock()
	return f, nil
}

// release gives up one use of the file.
func (p *pipeline) release(f *openFile) error {
	if f.uses.Add(-1) > 0 {
		return nil
	}
	p.mu.Lock()
	delete(p.open, f)
	p.mu.Unlock()
	return f.r.Close()
}

// readAt fills buf from the file.
func (f *openFile) readAt(buf []byte, off int64) error {
	n, err := f.r.ReadAt(buf, off)
	if n == len(buf) {
		return nil
	}
	return fmt.Errorf("%s: read at %d: %w", f.path, off, err)
}

// nextData is the offset of the first block, from the one at off on, that has
// to be read.
func (f *openFile) nextData(off, blockSize int64) (int64, error) {
	next, err := f.r.NextData(off)
	if err != nil {
		return 0, err
	}
	if next >= f.size {
		return f.size, nil
	}
	return max(next&^(blockSize-1), off), nil
}

// dispatch is the first stage: it goes through the tree in the order of the
// walk, directories behind their content.
func (p *pipeline) dispatch(ctx context.Context) error {
	var open []*inode  // the directories from the root on
	var paths []string // theirs
	up := func(n int) error {
		for ; n > 0; n-- {
			last := len(open) - 1
			if err := send(ctx, p.toSeq, item{kind: itemOther, ino: open[last]}); err != nil {
				return err
			}
			open, paths = open[:last], paths[:last]
		}
		return nil
	}
	for {
		rec, ok, err := p.w.tree.next(func(up int) string { return paths[len(paths)-1-up] })
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if err := up(rec.up); err != nil {
			return err
		}
		name := rec.ino.name
		var parent *inode
		if len(open) > 0 {
			parent = open[len(open)-1]
			parent.dir.listed += listedSize(name)
			name = path.Join(paths[len(paths)-1], name)
		}
		switch ino := rec.ino; {
		case rec.again:
			err = send(ctx, p.toSeq, item{kind: itemName, ino: ino})
		case ino.typ == typeDir:
			ino.nlink, ino.dir = 2, &directory{}
			if parent != nil {
				ino.dir.parent = parent.number
				parent.nlink++
			}
			open, paths = append(open, ino), append(paths, name)
		case ino.typ == typeFile:
			err = p.dispatchFile(ctx, ino, name)
		default:
			err = send(ctx, p.toSeq, item{kind: itemOther, ino: ino})
		}
		if err != nil {
			return err
		}
	}
	if err := up(len(open)); err != nil {
		return err
	}
	close(p.toSeq)
	return nil
}

func (p *pipeline) dispatchFile(ctx context.Context, ino *inode, name string) error {
	if ino.base != noRef {
		return send(ctx, p.toSeq, item{kind: itemBase, ino: ino})
	}
	f, err := p.openFile(ino, name)
	if err != nil {
		return err
	}
	switch {
	case ino.size == 0:
		err = send(ctx, p.toSeq, item{kind: itemOther, ino: ino})
	case ino.size < int64(p.w.opt.BlockSize):
		var b *block
		if b, err = p.take(ctx, p.free); err == nil {
			b.job, b.hash = jobSmall, p.hasCompany(ino)
			b.read(f, 0, int(ino.size))
			err = p.dispatchBlock(ctx, item{kind: itemSmall, ino: ino, block: b})
		}
	default:
		err = p.dispatchLarge(ctx, ino, f)
	}
	if err != nil {
		return err
	}
	return p.release(f)
}

// hasCompany tells whether another file may have the same size.
func (p *pipeline) hasCompany(ino *inode) bool { return p.w.tree.sizes.shared(ino.size) }

// read says what the block is to hold.
func (b *block) read(f *openFile, off int64, n int) {
	f.uses.Add(1)
	b.file, b.off, b.n = f, off, n
}

// dispatchBlock sends a block both ways.
func (p *pipeline) dispatchBlock(ctx context.Context, it item) error {
	if err := send(ctx, p.work, it.block); err != nil {
		return err
	}
	return send(ctx, p.toSeq, it)
}

func (p *pipeline) dispatchLarge(ctx context.Context, ino *inode, f *openFile) error {
	var rec *layoutRecord
	if p.hasCompany(ino) {
		var known bool
		var err error
		if rec, known, err = p.dup.find(ctx, f); err != nil {
			return err
		}
		if known {
			return send(ctx, p.toSeq, item{kind: itemCopy, ino: ino, rec: rec})
		}
	}
	blockSize := int64(p.w.opt.BlockSize)
	for off := int64(0); off < f.size; {
		next, err := f.nextData(off, blockSize)
		if err != nil {
			return err
		}
		if next > off {
			holes := (next - off + blockSize - 1) / blockSize
			if err := send(ctx, p.toSeq, item{kind: itemHoles, ino: ino, holes: uint64(holes)}); err != nil {
				return err
			}
			off = next
			continue
		}
		b, err := p.take(ctx, p.free)
		if err != nil {
			return err
		}
		b.job, b.hash = jobData, rec != nil
		b.read(f, off, int(min(blockSize, f.size-off)))
		if err := p.dispatchBlock(ctx, item{kind: itemBlock, ino: ino, block: b}); err != nil {
			return err
		}
		off += blockSize
	}
	return send(ctx, p.toSeq, item{kind: itemLarge, ino: ino, rec: rec})
}
