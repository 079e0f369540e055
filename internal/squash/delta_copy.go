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

// copyRuns copies what is taken over. It runs beside the compressing, which
// writes behind it and alone knows how far the image has come.
func (r *reuse) copyRuns(ctx context.Context, out io.WriterAt) error {
	from, _ := r.base.r.(*os.File)
	to, _ := out.(*os.File)
	for _, x := range r.runs {
		if from != nil && to != nil {
			done, err := copyRange(ctx, to, from, x)
			if err != nil {
				return fmt.Errorf("copy %d bytes of the base image to %d: %w", x.n, x.to, err)
			}
			x.from, x.to, x.n = x.from+done, x.to+done, x.n-done
		}
		if err := r.copyRun(ctx, out, x); err != nil {
			return err
		}
	}
	return nil
}

func (r *reuse) copyRun(ctx context.Context, out io.WriterAt, x relocation) error {
	buf := make([]byte, min(x.n, 1<<20))
	for x.n > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(x.n, int64(len(buf)))]
		if err := r.base.readAt(b, x.from); err != nil {
			return fmt.Errorf("base image: %w", err)
		}
		if _, err := out.WriteAt(b, x.to); err != nil {
			return fmt.Errorf("copy %d bytes of the base image to %d: %w", len(b), x.to, err)
		}
		n := int64(len(b))
		x.from, x.to, x.n = x.from+n, x.to+n, x.n-n
	}
	return nil
}

// copyRange has the kernel copy, which on some file systems only notes that both
// files share the blocks. It returns how much that did before it could not.
func copyRange(ctx context.Context, to, from *os.File, x relocation) (done int64, err error) {
	const step = 64 << 20 // between looks at ctx
	for done < x.n {
		if ctx.Err() != nil {
			return done, context.Cause(ctx)
		}
		roff, woff := x.from+done, x.to+done
		n, err := unix.CopyFileRange(int(from.Fd()), &roff, int(to.Fd()), &woff, int(min(x.n-done, step)), 0)
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
