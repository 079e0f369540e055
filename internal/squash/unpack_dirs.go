// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/list"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxDirFDs is how many directories are kept open; more only while they are used.
const maxDirFDs = 128

// dirFDs opens the directories of the tree being made, one name at a time from
// a directory that is open already, and keeps those used last open.
type dirFDs struct {
	root *dirFD

	mu   sync.Mutex
	used list.List // of *treeDir with a dirFD, the one used last in front
}

// dirFD is an open directory.
type dirFD struct {
	fd    int
	users atomic.Int32  // more only with the lock held
	place *list.Element // in used
}

func newDirFDs(root int) *dirFDs { return &dirFDs{root: &dirFD{fd: root}} }

// put says that the caller of get is done.
func (d *dirFD) put() { d.users.Add(-1) }

// get returns a directory, open until put.
func (c *dirFDs) get(d *treeDir) (*dirFD, error) {
	if d.parent == nil {
		c.root.users.Add(1)
		return c.root, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := d.open; e != nil {
		e.users.Add(1)
		c.used.MoveToFront(e.place)
		return e, nil
	}
	// Open the way down from the nearest ancestor that is open.
	var way []*treeDir
	at := d
	for ; at.parent != nil && at.open == nil; at = at.parent {
		way = append(way, at)
	}
	from := c.root
	if at.parent != nil {
		from = at.open
	}
	for i := len(way) - 1; i >= 0; i-- {
		next := &dirFD{}
		err := ignoringEINTR(func() (err error) {
			next.fd, err = openDir(from.fd, way[i].name)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("open directory %s: %w", way[i].path(), err)
		}
		next.place = c.used.PushFront(way[i])
		from, way[i].open = next, next
		if i == 0 {
			next.users.Add(1)
		}
		c.trim()
	}
	return from, nil
}

// trim closes the directories used longest ago.
func (c *dirFDs) trim() {
	for at := c.used.Back(); at != nil && c.used.Len() > maxDirFDs; {
		d, last := at.Value.(*treeDir), at
		at = at.Prev()
		if d.open.users.Load() == 0 {
			c.drop(d)
			c.used.Remove(last)
		}
	}
}

// close closes all but the root. Nothing was written through them, so there is
// no error to lose.
func (c *dirFDs) close() {
	for at := c.used.Front(); at != nil; at = at.Next() {
		c.drop(at.Value.(*treeDir))
	}
}

func (c *dirFDs) drop(d *treeDir) {
	unix.Close(d.open.fd)
	d.open = nil
}
