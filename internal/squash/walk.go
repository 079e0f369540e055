// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
	"fmt"
	"path"
)

// treeDir is a directory met in a walk of an image.
type treeDir struct {
	parent *treeDir // nil for the root
	name   string
	ino    *Inode
	open   *dirFD // of dirFDs, which may hold it open
}

// path returns the directory's path in the image, "." for the root.
func (d *treeDir) path() string {
	if d.parent == nil {
		return "."
	}
	return path.Join(d.parent.path(), d.name)
}

// join returns the path of a name in the directory.
func (d *treeDir) join(name string) string { return path.Join(d.path(), name) }

// treeName is one name met in a walk.
type treeName struct {
	dir   *treeDir
	name  string
	ino   *Inode
	sub   *treeDir  // the directory, if it is one
	again bool      // the inode has been met by another name
	link  *linkName // that name, if the walker keeps them
}

// linkName is a name of an inode that has more than one.
type linkName struct {
	dir  *treeDir
	name string
}

func (n *treeName) path() string { return n.dir.join(n.name) }

// walker visits every name of an image once, each directory before what is in
// it, in the order of names, which is the order in which writers lay out data.
type walker struct {
	img   *Image
	root  *treeDir
	spool *spool
	seen  visits
	links *table      // inodeRefs of inodes with several names
	named bool        // names are kept
	names []*linkName // by their places in links
}

// newWalker returns a walker, which is to be closed. What grows with the tree is
// in files in dir, empty for os.TempDir, once it is large.
func newWalker(img *Image, dir string) (*walker, error) {
	root, err := img.Root()
	if err != nil {
		return nil, errorAt(".", err)
	}
	s := &spool{dir: dir}
	w := &walker{img: img, root: &treeDir{ino: root}, spool: s, seen: newVisits(img), links: newTable(s, linkRefSize, linkRefSize)}
	return w, w.seen.note(root)
}

const linkRefSize = 8

func (w *walker) close() { w.spool.close() }

// visits is which inodes of an image a walk has met.
type visits struct {
	img    *Image
	met    map[uint32]uint64 // bit set of inode numbers
	inodes uint32
	listed int64 // bytes of the directories' listings
}

func newVisits(img *Image) visits { return visits{img: img, met: map[uint32]uint64{}} }

// note marks an inode as met; it is an error if it was already. That a directory
// has one place only is what makes the image a tree, and the walk end.
func (v *visits) note(ino *Inode) error {
	word, bit := ino.Number>>6, uint64(1)<<(ino.Number&63)
	if v.met[word]&bit != 0 {
		if ino.IsDir() {
			return corruptf("directory loop: inode %d is in two directories", ino.Number)
		}
		return corruptf("inode number %d is used more often than its link count %d allows", ino.Number, ino.NLink)
	}
	// Listings do not overlap, so together they are no longer than the table.
	if v.listed += ino.listingLen; v.listed > v.img.dirsRaw {
		return corruptf("the directories' listings overlap")
	}
	v.met[word] |= bit
	v.inodes++
	return nil
}

// walk calls visit for every name but the root's, which must not keep what it is
// given. Errors of the image itself name the path; visit's are passed on as they
// are.
func (w *walker) walk(ctx context.Context, visit func(*treeName) error) error {
	return guard(ctx, func(ctx context.Context) error { return w.walkTree(ctx, visit) })
}

func (w *walker) walkTree(ctx context.Context, visit func(*treeName) error) error {
	type level struct {
		dir  *treeDir
		list *listing
	}
	list, err := w.img.openListing(w.root.ino)
	if err != nil {
		return errorAt(".", err)
	}
	stack := []level{{w.root, list}}
	var n treeName // of one turn only, to spare the allocation
	for len(stack) > 0 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		at := stack[len(stack)-1]
		e, ok, err := at.list.next()
		if err != nil {
			return errorAt(at.dir.path(), err)
		}
		if !ok {
			stack = stack[:len(stack)-1]
			continue
		}
		n = treeName{dir: at.dir, name: e.Name}
		if err := w.meet(&n, e); err != nil {
			return errorAt(n.path(), err)
		}
		if err := visit(&n); err != nil {
			return err
		}
		if n.sub == nil {
			continue
		}
		if list, err = w.img.openListing(n.ino); err != nil {
			return errorAt(n.path(), err)
		}
		if stack = append(stack, level{n.sub, list}); len(stack) > maxDepth+1 {
			return errorAt(n.path(), errTooDeep)
		}
	}
	return nil
}

// meet reads the inode of an entry.
func (w *walker) meet(n *treeName, e dirEntry) (err error) {
	if n.ino, err = w.img.entryInode(e); err != nil {
		return err
	}
	linked := !n.ino.IsDir() && n.ino.NLink > 1
	var key []byte
	if linked {
		key = binary.LittleEndian.AppendUint64(nil, uint64(e.ref))
		var at int
		if at, n.again = w.links.find(key); n.again {
			if w.named {
				n.link = w.names[at]
			}
			return nil
		}
	}
	if err := w.seen.note(n.ino); err != nil {
		return err
	}
	if n.ino.IsDir() {
		n.sub = &treeDir{parent: n.dir, name: n.name, ino: n.ino}
	}
	if !linked {
		return nil
	}
	if w.named {
		w.names = append(w.names, &linkName{n.dir, n.name})
	}
	_, err = w.links.add(key)
	return err
}

// errorAt adds the path an error of the image is about.
func errorAt(path string, err error) error { return fmt.Errorf("%s: %w", path, err) }
