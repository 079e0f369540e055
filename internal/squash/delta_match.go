// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
)

// content names what a file holds.
type content struct {
	size int64
	sum  digest
}

// match finds the files of the tree that do not claim to be the base's, but have
// the content of a file there: a package was installed again, a file renamed in
// a copied directory. Only files with the size of another are read.
func (r *reuse) match(ctx context.Context, w *writer) error {
	changed := w.tree.changed
	w.tree.changed = nil
	if len(changed) == 0 {
		return nil
	}
	sizes := map[int64]bool{} // true: the base has files of this size
	for _, c := range changed {
		sizes[c.size] = false
	}
	// Each has two blocks of memory: there are to be no more than are at work.
	summers := &sync.Pool{New: func() any { return newFileSummer(plainSummer(), w.opt.BlockSize) }}
	known, err := r.digests(ctx, w.opt.Workers, sizes, summers)
	if err != nil {
		return fmt.Errorf("base image: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(w.opt.Workers)
	for _, c := range changed {
		if !sizes[c.size] {
			continue
		}
		if gctx.Err() != nil {
			break
		}
		// Contents can only be opened one after the other.
		f, err := c.content.Open()
		if err != nil {
			g.Go(func() error { return err })
			break
		}
		g.Go(func() error {
			return guard(gctx, func(ctx context.Context) error {
				s := summers.Get().(*fileSummer)
				defer summers.Put(s)
				sum, err := s.readAll(ctx, &openFile{r: f, path: c.path, size: c.size})
				if cerr := f.Close(); err == nil {
					err = cerr
				}
				if err != nil {
					return err
				}
				if ref, ok := known[content{c.size, sum}]; ok {
					w.tree.kept[c.at] = ref
				}
				return nil
			})
		})
	}
	return g.Wait()
}

// digests returns the base's files of the given sizes by their content, and
// marks the sizes there are.
func (r *reuse) digests(ctx context.Context, workers int, sizes map[int64]bool, summers *sync.Pool) (map[content]inodeRef, error) {
	d := &digester{blockSize: int64(r.base.sb.BlockSize), summers: summers, files: map[*fileTask][]digest{}, found: map[content]inodeRef{}}
	root := &treeDir{}
	err := r.base.extract(ctx, workers, d, nil, func(ctx context.Context, x *extractor) error {
		return r.base.eachFile(ctx, func(ino *Inode) error {
			if _, wanted := sizes[ino.Size]; !wanted {
				return nil
			}
			sizes[ino.Size] = true
			return x.add(ctx, &fileTask{dir: root, name: fmt.Sprintf("inode %d", ino.Number), ino: ino})
		})
	})
	return d.found, err
}

// plainSummer is a summer whose key need not be secret: its digests are compared
// in full.
func plainSummer() *summer { return &summer{h: sha256.New(), key: new([sha256.BlockSize]byte)} }

// digester is a sink that names the content of files.
type digester struct {
	blockSize int64
	summers   *sync.Pool // of *fileSummer

	mu    sync.Mutex
	files map[*fileTask][]digest // of blocks; zero stands for a hole
	found map[content]inodeRef
}

func (d *digester) begin(f *fileTask) error {
	sums := make([]digest, (f.ino.Size+d.blockSize-1)/d.blockSize)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files[f] = sums
	return nil
}

func (d *digester) write(f *fileTask, off int64, b []byte) error {
	s := d.summers.Get().(*fileSummer)
	zero, sum := s.blockDigest(b)
	d.summers.Put(s)
	if zero {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files[f][off/d.blockSize] = sum
	return nil
}

func (d *digester) finish(f *fileTask) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var s contentSum
	for _, b := range d.files[f] {
		if b == (digest{}) {
			s.holes(1)
		} else {
			s.block(b)
		}
	}
	delete(d.files, f)
	// Of several the first in the table is taken, whatever the workers do.
	c := content{f.ino.Size, s.sum()}
	if old, ok := d.found[c]; !ok || f.ino.ref < old {
		d.found[c] = f.ino.ref
	}
	return nil
}
