// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/list"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// maxDirFDs is how many directories are kept open; more only while they are used.
const maxDirFDs = 128

// dirFDs opens the directories of the tree being made, one name at a time from
// a directory that is open already, and keeps those used last open.
type dirFDs struct {
	root int

	mu   sync.Mutex
	open map[*treeDir]*dirFD
	used list.List // of *treeDir, the one used last in front
}

type dirFD struct {
	fd    int
	users int
	place *list.Element // in used
}

func newDirFDs(root int) *dirFDs { return &dirFDs{root: root, open: map[*treeDir]*dirFD{}} }

// get returns a descriptor of a directory, valid until put.
func (c *dirFDs) get(d *treeDir) (int, error) {
	if d.parent == nil {
		return c.root, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.open[d]; e != nil {
		e.users++
		c.used.MoveToFront(e.place)
		return e.fd, nil
	}
	// Open the way down from the nearest ancestor that is open.
	var way []*treeDir
	fd := c.root
	for at := d; at.parent != nil; at = at.parent {
		if e := c.open[at]; e != nil {
			fd = e.fd
			break
		}
		way = append(way, at)
	}
	for i := len(way) - 1; i >= 0; i-- {
		var next int
		err := ignoringEINTR(func() (err error) {
			next, err = openDir(fd, way[i].name)
			return err
		})
		if err != nil {
			return -1, fmt.Errorf("open directory %s: %w", way[i].path(), err)
		}
		e := &dirFD{fd: next, place: c.used.PushFront(way[i])}
		fd, c.open[way[i]] = next, e
		if i == 0 {
			e.users = 1
		}
		c.trim()
	}
	return fd, nil
}

// put says that the caller of get is done.
func (c *dirFDs) put(d *treeDir) {
	if d.parent == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[d].users--
}

// trim closes the directories used longest ago.
func (c *dirFDs) trim() {
	for at := c.used.Back(); at != nil && c.used.Len() > maxDirFDs; {
		d, last := at.Value.(*treeDir), at
		at = at.Prev()
		if e := c.open[d]; e.users == 0 {
			unix.Close(e.fd)
			delete(c.open, d)
			c.used.Remove(last)
		}
	}
}

// close closes all but the root. Nothing was written through them, so there is
// no error to lose.
func (c *dirFDs) close() {
	for d, e := range c.open {
		unix.Close(e.fd)
		delete(c.open, d)
	}
}
