// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// heldBytes is what each stream and table of a tree takes of the heap. What is
// beyond that lies in files without a name, whose pages the kernel can take back
// when memory is short: a tree of tens of millions of inodes needs no more
// memory than one of a hundred thousand.
const heldBytes = 2 << 20

// spool makes the files for what grows with a tree. They are gone when it is
// closed, and when the program ends.
type spool struct {
	dir  string // empty: os.TempDir
	held int    // bytes; zero: heldBytes

	mu   sync.Mutex
	open map[*os.File][][]byte // with what of them is mapped
}

// spoolBeside returns a spool on the volume of the image.
func spoolBeside(out io.WriterAt, held int) *spool {
	s := &spool{held: held}
	if f, ok := out.(*os.File); ok {
		s.dir = filepath.Dir(f.Name())
	}
	return s
}

func (s *spool) holds() int {
	if s.held > 0 {
		return s.held
	}
	return heldBytes
}

// file makes a file, which is the spool's to close.
func (s *spool) file() (*os.File, error) {
	f, err := newUnnamed(s.dir)
	if err != nil {
		return nil, fmt.Errorf("make a file for the tree's records: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = map[*os.File][][]byte{}
	}
	s.open[f] = nil
	return f, nil
}

// mapFile maps a part of a file into memory.
func (s *spool) mapFile(f *os.File, off int64, n int) ([]byte, error) {
	b, err := unix.Mmap(int(f.Fd()), off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, s.explain(fmt.Errorf("map %d bytes at %d: %w", n, off, err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[f] = append(s.open[f], b)
	return b, nil
}

// release closes a file before the spool is closed.
func (s *spool) release(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.open[f] {
		_ = unix.Munmap(b) // which only fails for what is not mapped
	}
	delete(s.open, f)
	f.Close() // nothing of it is wanted any more
}

// close releases all files.
func (s *spool) close() {
	for f := range s.open {
		s.release(f)
	}
}

// explain says what would help when the volume is full.
func (s *spool) explain(err error) error {
	dir := s.dir
	if dir == "" {
		dir = os.TempDir()
	}
	err = fmt.Errorf("keep the tree's records in a file in %s: %w", dir, err)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		err = fmt.Errorf("%w: the tree needs up to 200 bytes for each inode there while it is packed, free space", err)
	}
	return err
}

// newUnnamed makes a file that is gone when it is closed, whatever happens.
func newUnnamed(dir string) (*os.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(spool)"), nil
	}
	f, err := os.CreateTemp(dir, ".squash-spool-*") // a file system without O_TMPFILE
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// stream is a row of bytes that is added to and cut off at its end.
type stream struct {
	spool *spool
	file  *os.File // nil as long as all is in tail
	filed int64    // bytes in file
	tail  []byte   // behind them
}

func (s *stream) size() int64 { return s.filed + int64(len(s.tail)) }

func (s *stream) write(p []byte) error {
	if len(s.tail)+len(p) > s.spool.holds() {
		if err := s.flush(); err != nil {
			return err
		}
	}
	s.tail = append(s.tail, p...)
	return nil
}

func (s *stream) flush() error {
	if len(s.tail) == 0 {
		return nil
	}
	if s.file == nil {
		var err error
		if s.file, err = s.spool.file(); err != nil {
			return err
		}
	}
	if _, err := s.file.WriteAt(s.tail, s.filed); err != nil {
		return s.spool.explain(err)
	}
	s.filed += int64(len(s.tail))
	s.tail = s.tail[:0]
	return nil
}

// truncate cuts the stream off at n, which is not beyond its end.
func (s *stream) truncate(n int64) {
	if n >= s.filed {
		s.tail = s.tail[:n-s.filed]
		return
	}
	s.filed, s.tail = n, s.tail[:0]
}

// readAt fills p.
func (s *stream) readAt(p []byte, off int64) error {
	if off < s.filed {
		n := min(int64(len(p)), s.filed-off)
		if _, err := s.file.ReadAt(p[:n], off); err != nil {
			return s.spool.explain(err)
		}
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		copy(p, s.tail[off-s.filed:])
	}
	return nil
}

// release gives the stream's memory and file back.
func (s *stream) release() {
	if s.file != nil {
		s.spool.release(s.file)
	}
	*s = stream{spool: s.spool}
}

// from returns a reader from an offset on. The stream may not be written to
// while it is used.
func (s *stream) from(off int64) *streamReader { return &streamReader{s: s, off: off} }

// streamReader reads a stream to its end.
type streamReader struct {
	s    *stream
	off  int64  // of what follows rest
	rest []byte // read, not taken
	buf  []byte
}

// left is how many bytes follow.
func (r *streamReader) left() int64 { return r.s.size() - r.off + int64(len(r.rest)) }

// take returns the next n bytes, of which there must be as many. They are valid
// until the next call.
func (r *streamReader) take(n int) ([]byte, error) {
	if len(r.rest) < n {
		if err := r.fill(n); err != nil {
			return nil, err
		}
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b, nil
}

// fill reads ahead until rest has n bytes.
func (r *streamReader) fill(n int) error {
	if len(r.rest) == 0 && r.off >= r.s.filed {
		r.rest, r.off = r.s.tail[r.off-r.s.filed:], r.s.size()
	}
	if len(r.rest) >= n {
		return nil
	}
	const ahead = 64 << 10
	if r.left() < int64(n) {
		return io.ErrUnexpectedEOF
	}
	if cap(r.buf) < n {
		r.buf = make([]byte, max(n, ahead))
	}
	have := copy(r.buf[:cap(r.buf)], r.rest)
	more := int(min(int64(cap(r.buf)-have), r.s.size()-r.off))
	r.rest = r.buf[:have+more]
	r.off += int64(more)
	return r.s.readAt(r.rest[have:], r.off-int64(more))
}
