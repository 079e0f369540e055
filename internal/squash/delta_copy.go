// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// begin writes what comes before the data and makes room for what is taken over.
func (r *reuse) begin(w *writer) error {
	if err := w.out.write(r.options); err != nil {
		return err
	}
	for _, index := range r.order {
		pos, word, err := r.base.FragmentBlock(index)
		if err != nil {
			return err
		}
		if err := w.fragments.add(fragmentEntry{Start: r.moved(pos), Size: word}); err != nil {
			return err
		}
	}
	if n := len(r.runs); n > 0 {
		w.out.off = r.runs[n-1].to + r.runs[n-1].n
	}
	return nil
}

// moved returns where a byte of the base's data area is in the new image.
func (r *reuse) moved(pos int64) uint64 {
	i := sort.Search(len(r.runs), func(i int) bool { return r.runs[i].from > pos }) - 1
	return uint64(pos - r.runs[i].from + r.runs[i].to)
}

// record is the inode record of a file that keeps its data, as far as that is
// concerned.
func (r *reuse) record(ref inodeRef) (*inodeRecord, error) {
	ino, err := r.base.fileInode(ref)
	if err != nil {
		return nil, err
	}
	blockSize := int64(r.base.sb.BlockSize)
	rec := &inodeRecord{Size: uint64(ino.Size), Fragment: noFragment, Blocks: ino.Blocks}
	if packedLen(ino.Blocks) > 0 {
		rec.Start = r.moved(ino.Start)
	}
	rec.Sparse = uint64(ino.Size - ino.dataLen(blockSize))
	if ino.tailLen(blockSize) > 0 {
		rec.Fragment, rec.FragOffset = r.fragments[ino.Fragment], ino.FragOffset
	}
	return rec, nil
}

// Copying goes on in steps, between which ctx is looked at. File systems that can
// note that two files share blocks do so for whole blocks at the same places in
// them, so that the first step ends where even the largest blocks do.
const (
	copyStep   = 32 << 20
	largestFSB = 64 << 10
)

// copyRuns copies what is taken over. It runs beside the compressing, which
// writes behind it and alone knows how far the image has come. With settle what
// was copied does not stay in memory.
func (r *reuse) copyRuns(ctx context.Context, out io.WriterAt, settle bool) error {
	from, _ := r.base.r.(*os.File)
	to, _ := out.(*os.File)
	var behind writeBehind
	if settle && to != nil && len(r.runs) > 0 {
		behind = writeBehind{f: to, gone: r.runs[0].to, going: r.runs[0].to}
	}
	for _, x := range r.runs {
		for x.n > 0 {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			step := x.first(copyStep)
			if head := -x.from & (largestFSB - 1); head > 0 {
				step = x.first(head)
			}
			if err := r.copyStep(from, to, out, step); err != nil {
				return err
			}
			x = x.behind(step.n)
			behind.reach(x.to)
		}
	}
	return nil
}

// first returns the first n bytes of a relocation, behind the rest.
func (x relocation) first(n int64) relocation { return relocation{x.from, x.to, min(n, x.n)} }

func (x relocation) behind(n int64) relocation { return relocation{x.from + n, x.to + n, x.n - n} }

func (r *reuse) copyStep(from, to *os.File, out io.WriterAt, x relocation) error {
	if from != nil && to != nil {
		done, err := copyRange(to, from, x)
		if err != nil {
			return fmt.Errorf("copy %d bytes of the base image to %d: %w", x.n, x.to, err)
		}
		x = x.behind(done)
	}
	buf := make([]byte, min(x.n, 1<<20))
	for x.n > 0 {
		b := buf[:min(x.n, int64(len(buf)))]
		if err := r.base.readAt(b, x.from); err != nil {
			return fmt.Errorf("base image: %w", err)
		}
		if _, err := out.WriteAt(b, x.to); err != nil {
			return fmt.Errorf("copy %d bytes of the base image to %d: %w", len(b), x.to, err)
		}
		x = x.behind(int64(len(b)))
	}
	return nil
}

// copyRange has the kernel copy, which on some file systems only notes that both
// files share the blocks. It returns how much that did before it could not.
func copyRange(to, from *os.File, x relocation) (done int64, err error) {
	for done < x.n {
		roff, woff := x.from+done, x.to+done
		n, err := unix.CopyFileRange(int(from.Fd()), &roff, int(to.Fd()), &woff, int(x.n-done), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			return done, nil
		case err != nil:
			return done, err
		case n == 0:
			return done, nil // beyond the base's end: reading will say so
		}
		done += int64(max(n, 0))
	}
	return done, nil
}

// writeBehind brings a file that is written from front to back to disk meanwhile,
// and takes what is there out of memory: gigabytes that nobody is about to read
// would push out what others use, and new pages for them can take more time than
// the copying itself. Errors come back from the file's fsync.
type writeBehind struct {
	f           *os.File // nil: nothing is done
	gone, going int64    // how far it is out of memory, and how far on its way
}

// reach notes how far the file is written.
func (b *writeBehind) reach(end int64) {
	if b.f == nil || end-b.going < copyStep {
		return
	}
	fd := int(b.f.Fd())
	_ = unix.SyncFileRange(fd, b.going, end-b.going, unix.SYNC_FILE_RANGE_WRITE)
	if n := b.going - b.gone; n > 0 { // 0 would mean everything
		_ = unix.SyncFileRange(fd, b.gone, n, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		_ = unix.Fadvise(fd, b.gone, n, unix.FADV_DONTNEED)
	}
	b.gone, b.going = b.going, end
}
