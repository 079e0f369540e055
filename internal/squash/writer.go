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
//	inode table, directory table      built in memory meanwhile, writer_dir.go
//	fragment, export, id, xattr tables
//
// The order of the tables, and that nothing lies between some of them, are
// rules of the kernel (fs/squashfs/super.c and the table readers).
type writer struct {
	opt  Options
	tree inventory
	out  imageOut
	comp compressor // for metadata

	reuse     *reuse // nil without a base whose data can be taken over
	inodes    metaWriter
	dirs      metaWriter
	refs      []inodeRef // by inode number - 1
	fragments []fragmentEntry
	scratch   []byte
	stats     Stats
}

func newWriter(out io.WriterAt, opt Options) (*writer, error) {
	comp, err := newCompressor(opt)
	if err != nil {
		return nil, err
	}
	w := &writer{opt: opt, comp: comp}
	w.out = imageOut{w: out, off: superblockSize}
	w.inodes.comp, w.dirs.comp = comp, comp
	w.tree = inventory{opt: &w.opt, xattrs: newXattrTable(comp)}
	return w, nil
}

func (w *writer) run(ctx context.Context, src Source) error {
	if err := w.tree.scan(ctx, src); err != nil {
		return err
	}
	if err := w.checkRoom(); err != nil {
		return err
	}
	w.out.total = w.tree.bytes
	w.refs = make([]inodeRef, w.tree.inodes)
	if err := w.plan(ctx); err != nil {
		return err
	}
	hasOptions, err := w.begin()
	if err != nil {
		return err
	}
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
		RootInode:  w.refs[0],
		XattrTable: noTable,
	}
	if hasOptions {
		sb.Flags |= flagCompressorOptions
	}
	if w.opt.Compressor == None {
		sb.Compressor = Gzip
		sb.Flags |= flagUncompressedInodes | flagUncompressedData | flagUncompressedFragments | flagUncompressedXattrs | flagUncompressedIDs
	}
	if len(w.fragments) > math.MaxInt32 {
		return fmt.Errorf("%d fragment blocks: the limit is %d", len(w.fragments), math.MaxInt32)
	}
	sb.Fragments = uint32(len(w.fragments))

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
	if len(w.tree.xattrs.ids) > 0 {
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
	st.BytesOut, st.Fragments = w.out.off, len(w.fragments)
	st.Compressor, st.BlockSize = w.opt.Compressor, w.opt.BlockSize
	st.Warnings = w.tree.warnings.all()
}

// writeStream writes a table of metadata blocks and returns where it begins.
func (w *writer) writeStream(m *metaWriter) (uint64, error) {
	start := uint64(w.out.off)
	if err := m.flush(); err != nil {
		return 0, err
	}
	for _, b := range m.blocks {
		if err := w.out.write(b); err != nil {
			return 0, err
		}
	}
	m.blocks = nil
	return start, nil
}

// writeTable writes entries as metadata blocks, and behind them a header and
// the pointers to the blocks. It returns where the header begins, which is
// what the superblock holds.
func (w *writer) writeTable(entries, header []byte) (uint64, error) {
	index := header
	for len(entries) > 0 {
		n := min(len(entries), metaBlockSize)
		index = binary.LittleEndian.AppendUint64(index, uint64(w.out.off))
		var err error
		if w.scratch, err = appendMetaBlock(w.scratch[:0], w.comp, entries[:n]); err != nil {
			return 0, err
		}
		if err := w.out.write(w.scratch); err != nil {
			return 0, err
		}
		entries = entries[n:]
	}
	start := uint64(w.out.off)
	return start, w.out.write(index)
}

func (w *writer) writeFragmentTable() (uint64, error) {
	entries := make([]byte, 0, len(w.fragments)*fragmentEntrySize)
	for _, f := range w.fragments {
		entries = f.append(entries)
	}
	return w.writeTable(entries, nil)
}

func (w *writer) writeExportTable() (uint64, error) {
	entries := make([]byte, 0, len(w.refs)*exportEntrySize)
	for _, ref := range w.refs {
		entries = binary.LittleEndian.AppendUint64(entries, uint64(ref))
	}
	return w.writeTable(entries, nil)
}

func (w *writer) writeIDTable() (uint64, error) {
	entries := make([]byte, 0, len(w.tree.ids.ids)*idEntrySize)
	for _, id := range w.tree.ids.ids {
		entries = binary.LittleEndian.AppendUint32(entries, id)
	}
	return w.writeTable(entries, nil)
}

func (w *writer) writeXattrTable() (uint64, error) {
	t := w.tree.xattrs
	start, err := w.writeStream(&t.keyValues)
	if err != nil {
		return 0, err
	}
	var entries []byte
	for _, id := range t.ids {
		entries = id.append(entries)
	}
	return w.writeTable(entries, xattrTableHeader{KeyValues: start, IDs: uint32(len(t.ids))}.append(nil))
}

// imageOut writes an image from front to back.
type imageOut struct {
	w   io.WriterAt
	off int64

	done, total int64 // of the files' content, to guess what an image needs
}

func (o *imageOut) write(p []byte) error {
	if err := o.writeAt(p, o.off); err != nil {
		return err
	}
	o.off += int64(len(p))
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
	need := float64(o.off)
	if o.done > 0 {
		need *= float64(o.total) / float64(o.done)
	} else {
		need += float64(o.total)
	}
	return fmt.Errorf("%w: %d bytes were written for %d of %d bytes of files, the image needs about %.0f: free or add that much and pack again",
		err, o.off, o.done, o.total, math.Ceil(need))
}
