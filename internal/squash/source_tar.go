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
	"os"
	"path"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// TarOptions says how to read an archive.
type TarOptions struct {
	// SpoolDir is where the names of a large archive lie, and file content waits
	// that cannot be read from the archive again; empty means os.TempDir. It needs
	// room for the files, and some 150 bytes for each name.
	SpoolDir string
	// Exclude is that of DirOptions.
	Exclude func(path string) bool

	held int // of a spool, for tests
}

// TarSource reads a tar archive: plain or compressed with gzip, xz or zstd, in
// the formats of GNU tar, POSIX pax (extended attributes too) and ustar, from
// where r stands to its end. The tree is the one that tar would extract as
// root with --numeric-owner and --xattrs, and packs to the same bytes: of
// several entries with one name the last counts, a leading slash is taken off
// names, missing directories are made with mode 0755.
//
// An image holds files in the order of their names, and says of each where the
// others are, so the archive is read to its end first. A plain archive in a
// regular file is then read again, file by file. Of any other, the content of
// its files is kept meanwhile in a file without a name in SpoolDir, with the
// zeroes left out; nothing else of the tree is ever made on disk.
//
// It is an error when a name contains "..", when a hard link leads to nothing
// the archive has shown before, when something lies below what is no
// directory, and when an entry has a type or a global attribute that has no
// meaning in an image.
func TarSource(ctx context.Context, r io.Reader, opt TarOptions) (Source, error) {
	s := &tarSource{opt: opt, tree: tarTree{spool: spool{dir: opt.SpoolDir, held: opt.held}}}
	err := s.tree.init()
	if err == nil {
		err = s.read(ctx, r)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read archive: %w", err), s.Close())
	}
	return s, nil
}

type tarSource struct {
	opt  TarOptions
	tree tarTree

	archive *os.File // plain and seekable: read again
	was     identity
	spool   *os.File // nil until something is in it
	end     int64    // of the spool
	chunk   []byte   // on its way there
	links   uint32   // inodes with several names
}

// read reads the archive from its compressed start to its end.
func (s *tarSource) read(ctx context.Context, r io.Reader) error {
	in, done, err := s.open(r)
	if err != nil {
		return err
	}
	defer done()
	tr := tar.NewReader(in)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := s.add(ctx, h, tr, in); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	if s.archive != nil {
		return nil
	}
	// Behind the end are the check sums of the compressed stream.
	_, err = io.Copy(io.Discard, in)
	return err
}

// tarInput counts, and seeks if it can, which is how archive/tar skips files.
type tarInput struct {
	r   io.Reader
	pos int64
}

func (in *tarInput) Read(p []byte) (int, error) {
	n, err := in.r.Read(p)
	in.pos += int64(n)
	return n, err
}

type seekingTarInput struct{ tarInput }

func (in *seekingTarInput) Seek(off int64, whence int) (int64, error) {
	pos, err := in.r.(io.Seeker).Seek(off, whence)
	in.pos = pos
	return pos, err
}

// open finds out how the archive is compressed.
func (s *tarSource) open(r io.Reader) (in io.Reader, done func(), err error) {
	magic := make([]byte, 6)
	n, err := io.ReadFull(r, magic)
	if err != nil && err != io.ErrUnexpectedEOF {
		if err == io.EOF {
			err = errors.New("it is empty")
		}
		return nil, nil, err
	}
	magic = magic[:n]
	whole := io.MultiReader(bytes.NewReader(magic), r)
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(whole)
		if err != nil {
			return nil, nil, err
		}
		return z, func() { z.Close() }, nil
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ\x00")):
		x, err := newXZReader(whole)
		if err != nil {
			return nil, nil, err
		}
		return x, func() { x.Close() }, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(whole, zstd.WithDecoderMaxWindow(zstdMaxWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return nil, nil, errors.New("it is compressed with bzip2: recompress it with gzip, xz or zstd")
	}
	f, ok := r.(*os.File)
	if ok {
		if pos, err := f.Seek(-int64(n), io.SeekCurrent); err == nil {
			if s.was, err = archiveIdentity(f); err != nil {
				return nil, nil, err
			}
			s.archive = f
			return &seekingTarInput{tarInput{r: f, pos: pos}}, func() {}, nil
		}
	}
	return whole, func() {}, nil
}

// archiveIdentity tells later whether the archive is still the same.
func archiveIdentity(f *os.File) (identity, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		return identity{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fileIdentity(&st), nil
}

// add takes one entry of the archive.
func (s *tarSource) add(ctx context.Context, h *tar.Header, tr io.Reader, in io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		for key := range h.PAXRecords {
			if key != "comment" {
				return fmt.Errorf("global attribute %s: only attributes of single entries are supported", key)
			}
		}
		return nil
	}
	dir, name, err := s.lookUp(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return s.addLink(dir, name, h.Linkname)
	}
	var e Entry
	if err := fillTarEntry(&e, h); err != nil {
		return err
	}
	if e.Mode&unix.S_IFMT == unix.S_IFDIR {
		old, ok := 0, true // the root
		if name != "" {
			old, ok = s.tree.find(dir, name)
		}
		if ok && s.tree.inode(old).isDir() {
			return s.tree.set(old, &e)
		}
	}
	if name == "" {
		return errors.New("the root is not a directory")
	}
	if e.Mode&unix.S_IFMT == unix.S_IFREG {
		if e.Content, err = s.keep(ctx, h, tr, in); err != nil {
			return err
		}
	}
	number, err := s.tree.add(&e)
	if err != nil {
		return err
	}
	return s.tree.put(dir, name, number)
}

func (s *tarSource) addLink(dir int, name, target string) error {
	from, base, err := s.lookUp(target)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", target, err)
	}
	number, found := 0, true // the root
	if base != "" {
		number, found = s.tree.find(from, base)
	}
	if !found {
		return fmt.Errorf("hard link to %s, which is not in front of it in the archive", target)
	}
	ino := s.tree.inode(number)
	if name == "" || ino.isDir() {
		return fmt.Errorf("hard link to %s, which is a directory", target)
	}
	if same, ok := s.tree.find(dir, name); ok && same == number {
		return nil
	}
	if ino.link() == 0 {
		s.links++
		ino.setLink(s.links)
	}
	return s.tree.put(dir, name, number)
}

// Walk implements Source.
func (s *tarSource) Walk(ctx context.Context, fn func(*Entry) error) error {
	root, err := s.tree.entry(0, s)
	if err != nil {
		return err
	}
	root.Path = "."
	if err := fn(&root); err != nil {
		return err
	}
	names := nameReader{runs: stream{spool: &s.tree.spool}}
	defer names.runs.release()
	return s.walkDir(ctx, &names, 0, ".", fn)
}

func (s *tarSource) walkDir(ctx context.Context, r *nameReader, number int, dir string, fn func(*Entry) error) error {
	names, err := s.tree.namesIn(r, number)
	if err != nil {
		return err
	}
	defer names.done()
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name, ok, err := names.next()
		if !ok || err != nil {
			return err
		}
		below, _ := s.tree.find(number, name)
		e, err := s.tree.entry(below, s)
		if err != nil {
			return err
		}
		e.Path = path.Join(dir, name)
		if s.opt.Exclude != nil && s.opt.Exclude(e.Path) {
			continue
		}
		if err := fn(&e); err != nil {
			return err
		}
		if s.tree.inode(below).isDir() {
			if err := s.walkDir(ctx, r, below, e.Path, fn); err != nil {
				return err
			}
		}
	}
}

// KeepContent implements ContentKeeper.
func (s *tarSource) KeepContent(dst []byte, c Content) []byte {
	return binary.AppendUvarint(dst, uint64(c.(*tarContent).inode))
}

// KeptContent implements ContentKeeper.
func (s *tarSource) KeptContent(_ string, _ int64, b []byte) (Content, []byte) {
	r := recordReader{b}
	return keptTarContent{s, int(r.uint())}, r.rest
}

// keptTarContent is the content of an inode.
type keptTarContent struct {
	s     *tarSource
	inode int
}

// Open implements Content.
func (c keptTarContent) Open() (ContentReader, error) {
	e, err := c.s.tree.entry(c.inode, c.s)
	if err != nil {
		return nil, err
	}
	return e.Content.Open()
}

// Close implements Source. The archive stays the caller's.
func (s *tarSource) Close() error {
	s.tree.spool.close()
	if s.spool == nil {
		return nil
	}
	spool := s.spool
	s.spool = nil
	return spool.Close()
}
