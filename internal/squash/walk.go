// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"fmt"
	"path"
)

// treeDir is a directory met in a walk of an image.
type treeDir struct {
	parent *treeDir // nil for the root
	name   string
	ino    *Inode
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
	dir  *treeDir
	name string
	ino  *Inode
	sub  *treeDir  // the directory, if it is one
	link *linkName // the inode's first name, if this is not it
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
	img    *Image
	root   *treeDir
	seen   map[uint32]uint64 // bit set of inode numbers
	links  map[inodeRef]*linkName
	inodes uint32 // met so far
}

func newWalker(img *Image) (*walker, error) {
	root, err := img.Root()
	if err != nil {
		return nil, errorAt(".", err)
	}
	w := &walker{img: img, root: &treeDir{ino: root}, seen: map[uint32]uint64{}, links: map[inodeRef]*linkName{}}
	return w, w.note(root)
}

// note marks an inode as met; it is an error if it was already.
func (w *walker) note(ino *Inode) error {
	word, bit := ino.Number>>6, uint64(1)<<(ino.Number&63)
	if w.seen[word]&bit != 0 {
		return corruptf("inode number %d is used more often than its link count %d allows", ino.Number, ino.NLink)
	}
	w.seen[word] |= bit
	w.inodes++
	return nil
}

// walk calls visit for every name but the root's. Errors of the image itself
// name the path; visit's are passed on as they are.
func (w *walker) walk(ctx context.Context, visit func(*treeName) error) error {
	type level struct {
		dir  *treeDir
		list *listing
	}
	list, err := w.img.openListing(w.root.ino)
	if err != nil {
		return errorAt(".", err)
	}
	stack := []level{{w.root, list}}
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
		n, err := w.meet(at.dir, e)
		if err != nil {
			return errorAt(at.dir.join(e.Name), err)
		}
		if err := visit(n); err != nil {
			return err
		}
		if n.sub == nil {
			continue
		}
		if list, err = w.img.openListing(n.ino); err != nil {
			return errorAt(n.path(), err)
		}
		stack = append(stack, level{n.sub, list})
	}
	return nil
}

// meet reads the inode of an entry.
func (w *walker) meet(dir *treeDir, e dirEntry) (*treeName, error) {
	ino, err := w.img.child(dir.ino, e)
	if err != nil {
		return nil, err
	}
	n := &treeName{dir: dir, name: e.Name, ino: ino}
	if first := w.links[e.ref]; first != nil {
		n.link = first
		return n, nil
	}
	if err := w.note(ino); err != nil {
		return nil, err
	}
	switch {
	case ino.IsDir():
		n.sub = &treeDir{parent: dir, name: e.Name, ino: ino}
	case ino.NLink > 1:
		w.links[e.ref] = &linkName{dir, e.Name}
	}
	return n, nil
}

// errorAt adds the path an error of the image is about.
func errorAt(path string, err error) error { return fmt.Errorf("%s: %w", path, err) }
