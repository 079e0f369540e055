// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// Options says how to write an image. The zero value is good for the boot
// images of this world: gzip, which every kernel reads, blocks of 128 KiB.
type Options struct {
	Compressor Compressor // zero: Gzip
	Level      int        // zero: the compressor's default
	BlockSize  int        // bytes; zero: DefaultBlockSize
	DictSize   int        // of xz, bytes; zero: the block size
	Workers    int        // zero: runtime.GOMAXPROCS, which knows the cgroup's quota

	// Epoch, if set, makes the image reproducible as SOURCE_DATE_EPOCH asks
	// for: it is the image's time, and inodes newer than it get it too. With
	// it, the same tree makes the same bytes, however many workers there are.
	Epoch *time.Time

	// Base, if set, is an image the tree was made from. What is not set above
	// is then taken from it, and its compressed data from there as far as the
	// content is the same.
	Base *Base

	// Progress, if set, is called now and then with the bytes of file content
	// that are in the image, from one goroutine at a time.
	Progress func(done, total int64)

	// Grown, if set, is called as the image grows, from one goroutine: its bytes
	// from `from` up to `to` are written and stay as they are. What is taken over
	// from the base lies before them.
	Grown func(from, to int64)

	// Written, if set, is called once the image is written, before PackFile
	// checks it and brings it to disk: somebody can read it meanwhile. Without
	// it, what is copied from a base does not stay in memory.
	Written func(Stats)

	// MemoryLimit, in bytes, bounds the blocks in flight; zero means four per
	// worker, or two of the larger sizes. The compressors' own memory and some
	// 30 MiB for metadata come on top of it; what a large tree needs beyond that
	// lies in files without a name beside the image, up to 200 bytes for each inode.
	MemoryLimit int64

	held int // of a spool, for tests
}

// Stats says what an image holds.
type Stats struct {
	Inodes         int64      `json:"inodes"`
	Files          int64      `json:"files"`          // regular ones, names of one inode counted once
	BytesIn        int64      `json:"bytesIn"`        // their content, holes included
	BytesOut       int64      `json:"bytesOut"`       // length of the image
	Duplicates     int64      `json:"duplicates"`     // files whose content another one has, stored once
	DuplicateBytes int64      `json:"duplicateBytes"` // their content
	Fragments      int        `json:"fragments"`      // blocks shared by small files
	Compressor     Compressor `json:"compressor"`
	BlockSize      int        `json:"blockSize"`
	Base           *BaseStats `json:"base,omitempty"`     // with Options.Base
	Warnings       []string   `json:"warnings,omitempty"` // what was left out or altered, by path
}

// withDefaults replaces zeroes and refuses nonsense.
func (o Options) withDefaults() (Options, error) {
	if o.Base != nil {
		o.Base.adopt(&o)
	}
	if o.Compressor == 0 {
		o.Compressor = Gzip
	}
	if o.BlockSize == 0 {
		o.BlockSize = DefaultBlockSize
	}
	if err := checkBlockSize(int64(o.BlockSize)); err != nil {
		return o, err
	}
	if o.Workers == 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.Epoch != nil && int64(clampTime(o.Epoch.Unix())) != o.Epoch.Unix() {
		return o, fmt.Errorf("epoch %d: SquashFS holds times from 0 to %d", o.Epoch.Unix(), uint32(math.MaxUint32))
	}
	if o.Workers < 0 || o.MemoryLimit < 0 {
		return o, fmt.Errorf("%d workers with %d bytes: neither can be negative", o.Workers, o.MemoryLimit)
	}
	return o, nil
}

// Pack writes the image of a source to out, from offset zero on and padded to
// 4096 bytes; out should be empty. The blocks are written in order, the
// superblock last. After an error out holds no image.
func Pack(ctx context.Context, src Source, out io.WriterAt, opt Options) (Stats, error) {
	w, err := pack(ctx, src, out, opt)
	if err != nil {
		return Stats{}, fmt.Errorf("pack: %w", err)
	}
	return w.stats, nil
}

// pack returns the writer, which knows what an image needs.
func pack(ctx context.Context, src Source, out io.WriterAt, opt Options) (*writer, error) {
	opt, err := opt.withDefaults()
	if err != nil {
		return nil, err
	}
	w, err := newWriter(out, opt)
	if err != nil {
		return nil, err
	}
	defer w.spool.close()
	return w, guard(ctx, func(ctx context.Context) error { return w.run(ctx, src) })
}

// PackFile writes the image of a source to path. It writes a new file beside
// it, reads that back to check its structure, brings it to disk, and only then
// renames it to path. Nothing is left behind after an error.
func PackFile(ctx context.Context, src Source, path string, opt Options) (Stats, error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".squash-*.tmp")
	if err != nil {
		return Stats{}, fmt.Errorf("pack %s: %w", path, err)
	}
	st, err := PackChecked(ctx, src, f, opt)
	if err == nil {
		// CreateTemp made it unreadable for others; an image is not secret.
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return Stats{}, errors.Join(fmt.Errorf("pack %s: %w", path, err), os.Remove(f.Name()))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return Stats{}, fmt.Errorf("pack %s: %w", path, err)
	}
	return st, nil
}

// PackChecked is PackFile for an empty file that its caller opened for reading
// and writing, and disposes of after an error.
func PackChecked(ctx context.Context, src Source, f *os.File, opt Options) (Stats, error) {
	w, err := pack(ctx, src, f, opt)
	if err != nil {
		return Stats{}, err
	}
	if opt.Written != nil {
		opt.Written(w.stats)
	}
	img, err := Open(f, w.stats.BytesOut)
	if err == nil {
		err = img.verifyStructure(ctx, filepath.Dir(f.Name()))
	}
	if err != nil {
		return Stats{}, fmt.Errorf("check of the image just written: %w", err)
	}
	if err := f.Sync(); err != nil {
		return Stats{}, w.out.explain(err)
	}
	return w.stats, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ParseBlockSize reads a size that SquashFS can have: a power of two from 4 KiB
// to 1 MiB, in bytes or with K or M.
func ParseBlockSize(s string) (int, error) {
	digits := strings.TrimRight(strings.ToUpper(s), "KM")
	n, err := strconv.Atoi(digits)
	if n > 1<<20 {
		n = -1
	}
	switch strings.ToUpper(s)[len(digits):] {
	case "":
	case "K":
		n <<= 10
	case "M":
		n <<= 20
	default:
		n = -1
	}
	if err != nil || n < 4<<10 || n > 1<<20 || n&(n-1) != 0 {
		return 0, fmt.Errorf("%q is not a power of two from 4K to 1M", s)
	}
	return n, nil
}
