// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/list"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// maxDirFDs is how many directories are kept open that nobody uses.
const maxDirFDs = 128

// dirFDs opens the directories of the tree being made, one name at a time from
// a directory that is open already, and keeps those used last open.
type dirFDs struct {
	root int

	mu   sync.Mutex
	open map[*treeDir]*dirFD
	idle list.List // of *treeDir used by nobody, the one used last in front
}

type dirFD struct {
	fd    int
	users int
	place *list.Element // in idle, if users is zero
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
		c.use(e)
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
	var e *dirFD
	for i := len(way) - 1; i >= 0; i-- {
		var next int
		err := ignoringEINTR(func() (err error) {
			next, err = openDir(fd, way[i].name)
			return err
		})
		if err != nil {
			return -1, fmt.Errorf("open directory %s: %w", way[i].path(), err)
		}
		fd, e = next, &dirFD{fd: next, users: 1}
		c.open[way[i]] = e
		if i > 0 { // only on the way
			e.users, e.place = 0, c.idle.PushFront(way[i])
		}
		c.trim()
	}
	return fd, nil
}

func (c *dirFDs) use(e *dirFD) {
	if e.users++; e.place != nil {
		c.idle.Remove(e.place)
		e.place = nil
	}
}

// put says that the caller of get is done.
func (c *dirFDs) put(d *treeDir) {
	if d.parent == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.open[d]
	if e.users--; e.users == 0 {
		e.place = c.idle.PushFront(d)
		c.trim()
	}
}

// trim closes the directories used longest ago.
func (c *dirFDs) trim() {
	for c.idle.Len() > maxDirFDs {
		d := c.idle.Remove(c.idle.Back()).(*treeDir)
		unix.Close(c.open[d].fd)
		delete(c.open, d)
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
