// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"io"
	"slices"
	"sync"
)

// Walk calls fn for every name in the image: the root, ".", first, each directory
// before what is in it, the names of a directory in byte order. The names of one
// inode come with the same Inode.Number. It ends with the first error; fn's are
// passed on as they are.
func (img *Image) Walk(ctx context.Context, fn func(path string, ino *Inode) error) error {
	w, err := newWalker(img, "")
	if err != nil {
		return err
	}
	defer w.close()
	if err := fn(".", w.root.ino); err != nil {
		return err
	}
	return w.walk(ctx, func(n *treeName) error { return fn(n.path(), n.ino) })
}

// Content returns the bytes of a regular file, ino.Size of them, by an inode of
// this image. It is safe for concurrent use.
func (img *Image) Content(ino *Inode) io.ReaderAt {
	return &imageFile{img: img, path: ".", info: fileInfo{ino: ino}}
}

// Comparer compares contents of files in two images. It is safe for concurrent
// use.
type Comparer struct {
	a, b     *Image
	sameForm bool // equal compressed bytes mean equal content

	mu        sync.Mutex
	fragments map[[2]uint32]bool // pairs whose compressed bytes are equal or not
	buffers   sync.Pool          // of *[2][compareBuffer]byte
}

const compareBuffer = 256 << 10

// NewComparer returns a comparer of files in a with files in b.
func NewComparer(a, b *Image) *Comparer {
	return &Comparer{a: a, b: b,
		sameForm:  a.sb.Compressor == b.sb.Compressor && a.sb.BlockSize == b.sb.BlockSize,
		fragments: map[[2]uint32]bool{},
		buffers:   sync.Pool{New: func() any { return new([2][compareBuffer]byte) }},
	}
}

// Same tells whether a regular file of the first image and one of the second
// have the same content. Where both are compressed alike, as in an image packed
// on the other as its base, the compressed bytes are compared; that two files
// lie in the same place proves nothing, because the images may be of different
// origin. Otherwise contents are unpacked up to the first difference.
func (c *Comparer) Same(ctx context.Context, x, y *Inode) (bool, error) {
	if x.Size != y.Size {
		return false, nil
	}
	var from, to int64 // what remains to be unpacked
	to = x.Size
	if c.sameForm && slices.Equal(x.Blocks, y.Blocks) && (x.Fragment == noFragment) == (y.Fragment == noFragment) {
		same, err := c.sameBytes(ctx, x.Start, y.Start, packedLen(x.Blocks))
		if err != nil {
			return false, err
		}
		if same {
			from = x.Size - x.tailLen(int64(c.a.sb.BlockSize))
		}
		if x.Fragment != noFragment && x.FragOffset == y.FragOffset {
			if same, err = c.sameFragments(ctx, x.Fragment, y.Fragment); err != nil {
				return false, err
			}
			if same {
				to -= x.tailLen(int64(c.a.sb.BlockSize))
			}
		}
	}
	return c.equal(ctx, c.a.Content(x), c.b.Content(y), from, from, to-from)
}

// sameBytes compares n bytes of the two images.
func (c *Comparer) sameBytes(ctx context.Context, a, b, n int64) (bool, error) {
	return c.equal(ctx, imageBytes{c.a}, imageBytes{c.b}, a, b, n)
}

func (c *Comparer) sameFragments(ctx context.Context, a, b uint32) (bool, error) {
	c.mu.Lock()
	same, known := c.fragments[[2]uint32{a, b}]
	c.mu.Unlock()
	if known {
		return same, nil
	}
	aPos, aWord, err := c.a.FragmentBlock(a)
	if err != nil {
		return false, err
	}
	bPos, bWord, err := c.b.FragmentBlock(b)
	if err != nil {
		return false, err
	}
	if same = aWord == bWord; same {
		n, _ := dataWordSize(aWord)
		if same, err = c.sameBytes(ctx, aPos, bPos, int64(n)); err != nil {
			return false, err
		}
	}
	c.mu.Lock()
	c.fragments[[2]uint32{a, b}] = same
	c.mu.Unlock()
	return same, nil
}

// equal compares n bytes at two offsets.
func (c *Comparer) equal(ctx context.Context, a, b io.ReaderAt, aOff, bOff, n int64) (bool, error) {
	buf := c.buffers.Get().(*[2][compareBuffer]byte)
	defer c.buffers.Put(buf)
	for n > 0 {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		m := min(n, compareBuffer)
		p, q := buf[0][:m], buf[1][:m]
		if k, err := a.ReadAt(p, aOff); int64(k) < m {
			return false, err
		}
		if k, err := b.ReadAt(q, bOff); int64(k) < m {
			return false, err
		}
		if !bytes.Equal(p, q) {
			return false, nil
		}
		n, aOff, bOff = n-m, aOff+m, bOff+m
	}
	return true, nil
}

// imageBytes are the bytes of an image as they stand.
type imageBytes struct{ img *Image }

func (r imageBytes) ReadAt(p []byte, off int64) (int, error) {
	if err := r.img.readAt(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}
