// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// TarOptions says how to read an archive.
type TarOptions struct {
	// SpoolDir is where file content waits that cannot be read from the
	// archive again; empty means os.TempDir. It needs room for the files.
	SpoolDir string
	// Exclude is that of DirOptions.
	Exclude func(path string) bool
}

// maxTarNames bounds what the names of one archive take in memory, some 400
// bytes each.
const maxTarNames = 1 << 24

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
	s := &tarSource{opt: opt, root: newTarDir()}
	if err := s.read(ctx, r); err != nil {
		return nil, errors.Join(fmt.Errorf("read archive: %w", err), s.Close())
	}
	return s, nil
}

type tarSource struct {
	opt   TarOptions
	root  *tarInode
	names int

	archive *os.File // plain and seekable: read again
	was     identity
	spool   *os.File // nil until something is in it
	end     int64    // of the spool
	links   uint64   // inodes with several names
}

// tarInode is an entry's inode; several names may have it.
type tarInode struct {
	entry    Entry // without Path
	children map[string]*tarInode
	content  *tarContent
}

// newTarDir is a directory the archive has no entry for.
func newTarDir() *tarInode {
	var now unix.Timeval
	_ = unix.Gettimeofday(&now) // cannot fail with an address of ours
	return &tarInode{entry: Entry{Mode: unix.S_IFDIR | 0o755, Mtime: now.Sec}, children: map[string]*tarInode{}}
}

func (i *tarInode) isDir() bool { return i.children != nil }

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
		if s.names++; s.names > maxTarNames {
			return fmt.Errorf("more than %d entries", maxTarNames)
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
	ino := &tarInode{}
	if err := fillTarEntry(&ino.entry, h); err != nil {
		return err
	}
	if ino.entry.Mode&unix.S_IFMT == unix.S_IFDIR {
		old := s.root
		if dir != nil {
			old = dir.children[name]
		}
		if old != nil && old.isDir() {
			old.entry = ino.entry
			return nil
		}
		ino.children = map[string]*tarInode{}
	}
	if dir == nil {
		return errors.New("the root is not a directory")
	}
	if ino.entry.Mode&unix.S_IFMT == unix.S_IFREG {
		if ino.content, err = s.keep(ctx, h, tr, in); err != nil {
			return err
		}
		ino.entry.Size, ino.entry.Holes, ino.entry.Content = h.Size, ino.content.holes(), ino.content
	}
	return dir.put(name, ino)
}

// put gives an inode a name, in place of what had it.
func (i *tarInode) put(name string, ino *tarInode) error {
	if old := i.children[name]; old != nil && len(old.children) > 0 {
		return errors.New("it would replace a directory that is not empty")
	}
	i.children[name] = ino
	return nil
}

func (s *tarSource) addLink(dir *tarInode, name, target string) error {
	from, base, err := s.lookUp(target)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", target, err)
	}
	var ino *tarInode
	if from != nil {
		ino = from.children[base]
	}
	switch {
	case ino == nil:
		return fmt.Errorf("hard link to %s, which is not in front of it in the archive", target)
	case dir == nil || ino.isDir():
		return fmt.Errorf("hard link to %s, which is a directory", target)
	case dir.children[name] == ino:
		return nil
	}
	if ino.entry.Link == (LinkID{}) {
		s.links++
		ino.entry.Link = LinkID{Dev: 1, Ino: s.links}
	}
	return dir.put(name, ino)
}

// Walk implements Source.
func (s *tarSource) Walk(ctx context.Context, fn func(*Entry) error) error {
	root := s.root.entry
	root.Path = "."
	if err := fn(&root); err != nil {
		return err
	}
	return s.walkDir(ctx, s.root, ".", fn)
}

func (s *tarSource) walkDir(ctx context.Context, d *tarInode, dir string, fn func(*Entry) error) error {
	for _, name := range slices.Sorted(maps.Keys(d.children)) {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		ino := d.children[name]
		e := ino.entry
		e.Path = path.Join(dir, name)
		if s.opt.Exclude != nil && s.opt.Exclude(e.Path) {
			continue
		}
		if err := fn(&e); err != nil {
			return err
		}
		if ino.isDir() {
			if err := s.walkDir(ctx, ino, e.Path, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close implements Source. The archive stays the caller's.
func (s *tarSource) Close() error {
	if s.spool == nil {
		return nil
	}
	spool := s.spool
	s.spool = nil
	return spool.Close()
}
