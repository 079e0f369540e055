// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"

	"golang.org/x/sys/unix"
)

// tarContent is a regular file in an archive: pieces of data with zeroes
// between them.
type tarContent struct {
	s      *tarSource
	inode  int
	spool  bool // the pieces are in the spool, not in the archive
	pieces []tarPiece
	size   int64
}

// tarPiece is a run of a file's bytes in the archive or the spool.
type tarPiece struct {
	off, n int64 // in the file
	pos    int64
}

// append appends what newTarContent makes another of.
func (c *tarContent) append(b []byte) []byte {
	where := uint64(0)
	if c.spool {
		where = 1
	}
	b = binary.AppendUvarint(binary.AppendUvarint(b, where), uint64(c.size))
	b = binary.AppendUvarint(b, uint64(len(c.pieces)))
	end := int64(0)
	for _, p := range c.pieces {
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(p.off-end)), uint64(p.n))
		b = binary.AppendUvarint(b, uint64(p.pos))
		end = p.off + p.n
	}
	return b
}

func newTarContent(s *tarSource, r *recordReader) *tarContent {
	c := &tarContent{s: s, spool: r.uint() == 1, size: int64(r.uint())}
	c.pieces = make([]tarPiece, r.uint())
	end := int64(0)
	for i := range c.pieces {
		c.pieces[i] = tarPiece{off: end + int64(r.uint()), n: int64(r.uint()), pos: int64(r.uint())}
		end = c.pieces[i].off + c.pieces[i].n
	}
	return c
}

// holes is how many bytes are in no piece.
func (c *tarContent) holes() int64 {
	n := c.size
	for _, p := range c.pieces {
		n -= p.n
	}
	return n
}

// keep notes where a file's content is, or brings it to where it can be read
// again.
func (s *tarSource) keep(ctx context.Context, h *tar.Header, tr, in io.Reader) (*tarContent, error) {
	c := &tarContent{s: s, size: h.Size}
	if h.Size == 0 {
		return c, nil
	}
	if seeking, ok := in.(*seekingTarInput); ok && !isTarSparse(h) {
		if end := seeking.pos + h.Size; end < 0 || uint64(end) > s.was.size {
			return nil, fmt.Errorf("the archive is cut short: %w", io.ErrUnexpectedEOF)
		}
		c.pieces = []tarPiece{{off: 0, n: h.Size, pos: seeking.pos}}
		return c, nil
	}
	c.spool = true
	return c, s.fill(ctx, c, tr)
}

// isTarSparse tells whether a file's bytes in the archive are not its content.
func isTarSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for _, key := range []string{"GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.numblocks", "GNU.sparse.size", "GNU.sparse.realsize"} {
		if _, ok := h.PAXRecords[key]; ok {
			return true
		}
	}
	return false
}

// spoolChunk is the unit in which zeroes are left out of the spool.
const spoolChunk = 64 << 10

var zeroChunk [spoolChunk]byte

// fill copies a file to the spool.
func (s *tarSource) fill(ctx context.Context, c *tarContent, r io.Reader) error {
	if s.spool == nil {
		var err error
		if s.spool, err = newUnnamed(s.opt.SpoolDir); err != nil {
			return err
		}
	}
	if s.chunk == nil {
		s.chunk = make([]byte, spoolChunk)
	}
	for off := int64(0); off < c.size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := s.chunk[:min(spoolChunk, c.size-off)]
		n, err := io.ReadFull(r, b)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if !bytes.Equal(b, zeroChunk[:n]) {
			if _, err := s.spool.WriteAt(b, s.end); err != nil {
				return explainSpool(err, s.end)
			}
			if last := len(c.pieces) - 1; last >= 0 && c.pieces[last].off+c.pieces[last].n == off {
				c.pieces[last].n += int64(n)
			} else {
				c.pieces = append(c.pieces, tarPiece{off: off, n: int64(n), pos: s.end})
			}
			s.end += int64(n)
		}
		off += int64(n)
	}
	return nil
}

func explainSpool(err error, end int64) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("keep file content for packing, %d bytes so far: %w: free space, or unpack the tar file elsewhere and give it uncompressed", end, err)
	}
	return err
}

// Open implements Content.
func (c *tarContent) Open() (ContentReader, error) { return c, nil }

// ReadAt implements ContentReader.
func (c *tarContent) ReadAt(p []byte, off int64) (int, error) {
	file := c.s.archive
	if c.spool {
		file = c.s.spool
	}
	want, end := len(p), min(off+int64(len(p)), c.size)
	got := int(end - off)
	if got <= 0 {
		return 0, io.EOF
	}
	for i := c.piece(off); off < end; {
		if i == len(c.pieces) || c.pieces[i].off >= end {
			clear(p[:end-off])
			break
		}
		if gap := c.pieces[i].off - off; gap > 0 {
			clear(p[:gap])
			p, off = p[gap:], off+gap
		}
		at := off - c.pieces[i].off
		n := min(c.pieces[i].n-at, end-off)
		if _, err := file.ReadAt(p[:n], c.pieces[i].pos+at); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		p, off, i = p[n:], off+n, i+1
	}
	if got < want {
		return got, io.EOF
	}
	return got, nil
}

// piece returns the index of the first piece that ends behind off.
func (c *tarContent) piece(off int64) int {
	return sort.Search(len(c.pieces), func(i int) bool { return c.pieces[i].off+c.pieces[i].n > off })
}

// NextData implements ContentReader.
func (c *tarContent) NextData(off int64) (int64, error) {
	i := c.piece(off)
	if i == len(c.pieces) {
		return c.size, nil
	}
	return max(c.pieces[i].off, off), nil
}

// Close implements ContentReader. The archive must be what it was when its
// names were read.
func (c *tarContent) Close() error {
	if c.spool || len(c.pieces) == 0 {
		return nil
	}
	now, err := archiveIdentity(c.s.archive)
	if err != nil {
		return err
	}
	if how := c.s.was.differs(&now); how != "" {
		return changedError(c.s.archive.Name(), how)
	}
	return nil
}
