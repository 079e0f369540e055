// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
)

// Verify checks a whole image: every entry of every table, every name and
// inode, that each inode the superblock counts has a name, and that listings,
// directory indexes and the export table agree with it. Unless structureOnly,
// it also reads every byte of every file. The first thing found is returned.
func Verify(ctx context.Context, img *Image, structureOnly bool) error {
	if structureOnly {
		return img.verifyStructure(ctx, "")
	}
	if err := img.verifyTables(ctx); err != nil {
		return err
	}
	workers := runtime.GOMAXPROCS(0)
	return img.extract(ctx, workers, discard{}, nil, func(ctx context.Context, x *extractor) error {
		return img.verifyTree(ctx, "", x)
	})
}

// verifyStructure is Verify without content; dir is newWalker's.
func (img *Image) verifyStructure(ctx context.Context, dir string) error {
	if err := img.verifyTables(ctx); err != nil {
		return err
	}
	return img.verifyTree(ctx, dir, nil)
}

// discard is a sink that keeps nothing.
type discard struct{}

func (discard) begin(*fileTask) error                { return nil }
func (discard) write(*fileTask, int64, []byte) error { return nil }
func (discard) finish(*fileTask) error               { return nil }

// verifyTables reads every entry of the fragment and xattr tables.
func (img *Image) verifyTables(ctx context.Context) error {
	for i := range img.sb.Fragments {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if _, _, err := img.FragmentBlock(i); err != nil {
			return err
		}
	}
	if img.xattrIDs == nil {
		return nil
	}
	for i := range img.xattrIDs.count {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if _, err := img.xattrsAt(i); err != nil {
			return fmt.Errorf("xattr id %d: %w", i, err)
		}
	}
	return nil
}

// verifyTree walks the image, and hands its files to x if there is one.
func (img *Image) verifyTree(ctx context.Context, dir string, x *extractor) error {
	w, err := newWalker(img, dir)
	if err != nil {
		return err
	}
	defer w.close()
	if err := img.verifyInode(w.root.ino); err != nil {
		return errorAt(".", err)
	}
	err = w.walk(ctx, func(n *treeName) error {
		if n.again {
			return nil
		}
		err := img.verifyInode(n.ino)
		if err == nil && n.ino.IsDir() && n.ino.parent != n.dir.ino.Number {
			err = corruptf("its parent is given as inode %d, and is %d", n.ino.parent, n.dir.ino.Number)
		}
		if err != nil {
			return errorAt(n.path(), err)
		}
		if x == nil || !n.ino.isFile() {
			return nil
		}
		return x.add(ctx, &fileTask{dir: n.dir, name: n.name, ino: n.ino})
	})
	if err != nil {
		return err
	}
	if w.seen.inodes != img.sb.Inodes {
		return corruptf("the superblock counts %d inodes, %d have a name", img.sb.Inodes, w.seen.inodes)
	}
	return nil
}

// verifyInode checks what refers to an inode beside its name.
func (img *Image) verifyInode(ino *Inode) error {
	if img.exports != nil {
		b, err := img.exports.entry(img, uint64(ino.Number-1))
		if err != nil {
			return err
		}
		if ref := binary.LittleEndian.Uint64(b); ref != uint64(ino.ref) {
			return corruptf("inode %d is at %#x, the export table says %#x", ino.Number, uint64(ino.ref), ref)
		}
	}
	return img.verifyIndex(ino)
}

// verifyIndex reads a directory's listing beside its index: an entry must lead
// to a header, and name what comes behind it.
func (img *Image) verifyIndex(dir *Inode) error {
	if dir.indexCount == 0 {
		return nil
	}
	d, err := img.openListing(dir)
	if err != nil {
		return err
	}
	return img.eachIndex(dir, func(x dirIndex) (bool, error) {
		for d.count > 0 || dir.listingLen-d.left < int64(x.Offset) {
			if _, ok, err := d.next(); err != nil || !ok {
				return false, err
			}
		}
		at, ref := dir.listingLen-d.left, d.c.ref()
		e, _, err := d.next()
		if err != nil {
			return false, err
		}
		if at != int64(x.Offset) || ref != indexTarget(dir, x) || e.Name != x.Name {
			return false, corruptf("the directory index leads to %d for %q, there is %q at %d", x.Offset, x.Name, e.Name, at)
		}
		return true, nil
	})
}
