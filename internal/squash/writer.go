// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// imagePadding is what an image's length is a multiple of. A loop device
// rounds a file down to 512 bytes and the kernel refuses an image that is
// longer than its device; mksquashfs pads to 4096.
const imagePadding = 4096

// writer lays out one image:
//
//	superblock, compressor options    written last
//	data and fragment blocks          pipeline.go, in the order of the walk
//	inode table, directory table      built meanwhile, writer_dir.go
//	fragment, export, id, xattr tables
//
// The order of the tables, and that nothing lies between some of them, are
// rules of the kernel (fs/squashfs/super.c and the table readers).
//
// What grows with the tree beside them is in the spool.
type writer struct {
	opt   Options
	spool *spool
	tree  inventory
	out   imageOut
	comp  compressor // for metadata

	reuse     *reuse // nil without a base whose data can be taken over
	inodes    metaWriter
	dirs      metaWriter
	refs      region // inodeRefs by inode number - 1
	fragments fragmentList
	entries   stream // names in the directories that are not complete, writer_dir.go
	scratch   []byte
	stats     Stats
}

func newWriter(out io.WriterAt, opt Options) (*writer, error) {
	comp, err := newCompressor(opt)
	if err != nil {
		return nil, err
	}
	s := spoolBeside(out, opt.held)
	w := &writer{opt: opt, comp: comp, spool: s}
	w.out = imageOut{w: out, off: superblockSize}
	w.inodes = metaWriter{comp: comp, packed: stream{spool: s}}
	w.dirs = metaWriter{comp: comp, packed: stream{spool: s}}
	w.refs = region{spool: s, size: exportEntrySize}
	w.fragments.packed.spool, w.entries.spool = s, s
	w.tree = inventory{opt: &w.opt, xattrs: newXattrTable(comp, s), linked: newTable(s, linkIDSize, linkedInodeSize)}
	w.tree.records.packed.spool = s
	return w, nil
}

func (w *writer) run(ctx context.Context, src Source) error {
	if err := w.tree.scan(ctx, src); err != nil {
		return err
	}
	if err := w.checkRoom(); err != nil {
		return err
	}
	if err := w.refs.grow(int(w.tree.inodes)); err != nil {
		return err
	}
	if err := w.plan(ctx); err != nil {
		return err
	}
	w.out.total = w.tree.bytes
	if w.reuse != nil {
		w.out.total -= w.reuse.stats.Bytes
	}
	hasOptions, err := w.begin()
	if err != nil {
		return err
	}
	w.out.taken, w.out.grown = w.out.off, w.opt.Grown
	if err := newPipeline(w).run(ctx); err != nil {
		return err
	}
	return w.finish(hasOptions)
}

// begin writes what comes before the data.
func (w *writer) begin() (hasOptions bool, err error) {
	if w.reuse != nil {
		return len(w.reuse.options) > 0, w.reuse.begin(w)
	}
	options, err := w.options()
	if err != nil {
		return false, err
	}
	return len(options) > 0, w.out.write(options)
}

// checkRoom fails when the image cannot fit its volume, however well the files
// compress and however many of them are the same.
func (w *writer) checkRoom() error {
	f, ok := w.out.w.(*os.File)
	if !ok {
		return nil
	}
	if err := checkRoom(f, w.tree.data/leastShare, 0); err != nil {
		return fmt.Errorf("%w for an image of %d bytes of files: free space, or write the image to another volume", err, w.tree.data)
	}
	return nil
}

// options returns the compressor options' metadata block, or nothing.
func (w *writer) options() ([]byte, error) {
	o, err := writerOptions(&w.opt)
	if o == nil || err != nil {
		return nil, err
	}
	content, err := o.append(nil, w.opt.Compressor)
	if err != nil {
		return nil, err
	}
	return append(binary.LittleEndian.AppendUint16(nil, metaHeader(len(content), true)), content...), nil
}

// finish writes everything behind the data, and the superblock.
func (w *writer) finish(hasOptions bool) error {
	now := time.Now()
	if w.opt.Epoch != nil {
		now = *w.opt.Epoch
	}
	sb := superblock{
		Inodes:     uint32(w.tree.inodes),
		ModTime:    clampTime(now.Unix()),
		BlockSize:  uint32(w.opt.BlockSize),
		Compressor: w.opt.Compressor,
		Flags:      flagDuplicates | flagExportable,
		IDs:        uint16(len(w.tree.ids.ids)),
		RootInode:  w.ref(1),
		XattrTable: noTable,
	}
	if hasOptions {
		sb.Flags |= flagCompressorOptions
	}
	if w.opt.Compressor == None {
		sb.Compressor = Gzip
		sb.Flags |= flagUncompressedInodes | flagUncompressedData | flagUncompressedFragments | flagUncompressedXattrs | flagUncompressedIDs
	}
	if w.fragments.n > math.MaxInt32 {
		return fmt.Errorf("%d fragment blocks: the limit is %d", w.fragments.n, math.MaxInt32)
	}
	sb.Fragments = uint32(w.fragments.n)

	var err error
	step := func(pos *uint64, write func() (uint64, error)) {
		if err == nil {
			*pos, err = write()
		}
	}
	step(&sb.InodeTable, func() (uint64, error) { return w.writeStream(&w.inodes) })
	step(&sb.DirTable, func() (uint64, error) { return w.writeStream(&w.dirs) })
	step(&sb.FragmentTable, w.writeFragmentTable)
	step(&sb.ExportTable, w.writeExportTable)
	step(&sb.IDTable, w.writeIDTable)
	if w.tree.xattrs.sets.n > 0 {
		step(&sb.XattrTable, w.writeXattrTable)
	} else {
		sb.Flags |= flagNoXattrs
	}
	if err != nil {
		return err
	}
	sb.BytesUsed = uint64(w.out.off)
	if pad := -w.out.off & (imagePadding - 1); pad > 0 {
		if err := w.out.write(make([]byte, pad)); err != nil {
			return err
		}
	}
	w.account()
	return w.out.writeAt(sb.append(nil), 0)
}

// account completes the statistics.
func (w *writer) account() {
	st := &w.stats
	st.Inodes, st.Files, st.BytesIn = w.tree.inodes, w.tree.files, w.tree.bytes
	st.BytesOut, st.Fragments = w.out.off, w.fragments.n
	st.Compressor, st.BlockSize = w.opt.Compressor, w.opt.BlockSize
	st.Warnings = w.tree.warnings.all()
}

// writeStream writes a table of metadata blocks and returns where it begins.
func (w *writer) writeStream(m *metaWriter) (uint64, error) {
	start := uint64(w.out.off)
	if err := m.flush(); err != nil {
		return 0, err
	}
	for r := m.packed.from(0); r.left() > 0; {
		b, err := r.take(int(min(r.left(), 64<<10)))
		if err != nil {
			return 0, err
		}
		if err := w.out.write(b); err != nil {
			return 0, err
		}
	}
	m.packed.release()
	return start, nil
}

// writeTable writes entries as metadata blocks, and behind them a header and
// the pointers to the blocks. It returns where the header begins, which is
// what the superblock holds. take returns the next n bytes of the entries.
func (w *writer) writeTable(size int64, take func(n int) ([]byte, error), header []byte) (uint64, error) {
	index := header
	for size > 0 {
		entries, err := take(int(min(size, metaBlockSize)))
		if err != nil {
			return 0, err
		}
		index = binary.LittleEndian.AppendUint64(index, uint64(w.out.off))
		if w.scratch, err = appendMetaBlock(w.scratch[:0], w.comp, entries); err != nil {
			return 0, err
		}
		if err := w.out.write(w.scratch); err != nil {
			return 0, err
		}
		size -= int64(len(entries))
	}
	start := uint64(w.out.off)
	return start, w.out.write(index)
}

func (w *writer) writeFragmentTable() (uint64, error) {
	r := w.fragments.packed.from(0)
	return w.writeTable(r.left(), r.take, nil)
}

func (w *writer) writeExportTable() (uint64, error) {
	next := 0
	take := func(n int) ([]byte, error) {
		var entries []byte
		for ; len(entries) < n; next++ {
			entries = append(entries, w.refs.at(next)...)
		}
		return entries, nil
	}
	return w.writeTable(w.tree.inodes*exportEntrySize, take, nil)
}

func (w *writer) writeIDTable() (uint64, error) {
	entries := make([]byte, 0, len(w.tree.ids.ids)*idEntrySize)
	for _, id := range w.tree.ids.ids {
		entries = binary.LittleEndian.AppendUint32(entries, id)
	}
	take := func(n int) (b []byte, err error) {
		b, entries = entries[:n], entries[n:]
		return b, nil
	}
	return w.writeTable(int64(len(entries)), take, nil)
}

func (w *writer) writeXattrTable() (uint64, error) {
	t := w.tree.xattrs
	start, err := w.writeStream(&t.keyValues)
	if err != nil {
		return 0, err
	}
	r := t.ids.from(0)
	return w.writeTable(r.left(), r.take, xattrTableHeader{KeyValues: start, IDs: uint32(t.sets.n)}.append(nil))
}

// ref is where an inode is in the inode table.
func (w *writer) ref(number uint32) inodeRef {
	return inodeRef(binary.LittleEndian.Uint64(w.refs.at(int(number - 1))))
}

// fragmentList is the fragment table in the making.
type fragmentList struct {
	packed stream
	n      int
}

func (l *fragmentList) add(f fragmentEntry) error {
	l.n++
	return l.packed.write(f.append(nil))
}

// imageOut writes an image from front to back.
type imageOut struct {
	w   io.WriterAt
	off int64

	// To guess what an image needs: where that ends which is taken over, and the
	// content of the files that are packed behind it.
	taken, done, total int64

	grown func(from, to int64) // from what is taken over; nil: nobody asks
}

func (o *imageOut) write(p []byte) error {
	if err := o.writeAt(p, o.off); err != nil {
		return err
	}
	o.off += int64(len(p))
	if o.grown != nil {
		o.grown(o.taken, o.off)
	}
	return nil
}

func (o *imageOut) writeAt(p []byte, off int64) error {
	_, err := o.w.WriteAt(p, off)
	if err == nil {
		return nil
	}
	return o.explain(fmt.Errorf("write image at %d: %w", off, err))
}

// explain adds to an error for want of space what would help.
func (o *imageOut) explain(err error) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	written, need := o.off-o.taken, float64(o.total)
	if written > 0 && o.done > 0 {
		need *= float64(written) / float64(o.done)
	}
	return fmt.Errorf("%w: %d bytes were written for %d of %d bytes of files to be packed, the image needs about %.0f: free or add that much and pack again",
		err, written, o.done, o.total, float64(o.taken)+math.Ceil(need))
}
