// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// ErrTooMany says that there were more changes than Options.MaxChanges.
var ErrTooMany = errors.New("too many changes to report")

// Options of a comparison.
type Options struct {
	// MaxChanges bounds the memory a comparison takes, about half a kilobyte a
	// change. Zero means no bound.
	MaxChanges int
}

// Side is one of two images to compare, and what to call it.
type Side struct {
	Name  string
	Image *squash.Image
}

// Compare reports what next changed against old. Its memory is bounded by the
// number of changes and of names of hard links, not by the images.
func Compare(ctx context.Context, old, next Side, opt Options) (*Report, error) {
	c := &comparison{old: side{Side: old}, next: side{Side: next}, opt: opt, same: squash.NewComparer(old.Image, next.Image)}
	c.old.links, c.next.links = map[uint32]*linkGroup{}, map[uint32]*linkGroup{}
	if err := c.walk(ctx); err != nil {
		return nil, err
	}
	if err := c.findRenames(ctx); err != nil {
		return nil, err
	}
	r := c.report()
	r.Packages = comparePackages(ctx, old.Image, next.Image, r)
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	return r, nil
}

// side is an image and what a walk learns of it.
type side struct {
	Side
	info  Image
	links map[uint32]*linkGroup // by inode number
}

// linkGroup are the names of an inode with more than one.
type linkGroup struct {
	names []string // as the walk meets them
	kept  string   // the first name that is in both images, if any
}

// node is a name that is not, or may not be, the same in both images.
type node struct {
	path     string
	old, new *squash.Inode // nil where there is no such name
	how      []string
	xattrs   *XattrChange
	content  *contentTask // of a file in both, until it is known
	from     string       // of a renamed file
}

// contentTask is two files to be compared; names of hard links share one.
type contentTask struct {
	old, new *squash.Inode
	same     bool
}

type comparison struct {
	old, next side
	opt       Options
	same      *squash.Comparer

	mu    sync.Mutex
	nodes []*node
}

// keep adds a change; workers call it too.
func (c *comparison) keep(n *node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = append(c.nodes, n)
	if limit := c.opt.MaxChanges; limit > 0 && len(c.nodes) > limit {
		return fmt.Errorf("%w: more than %d", ErrTooMany, limit)
	}
	return nil
}

// step is one name of a walk, or the error it ended with.
type step struct {
	path string
	ino  *squash.Inode
	err  error
}

// names walks an image; it stops with the consumer.
func (s *side) names(ctx context.Context) iter.Seq[step] {
	return func(yield func(step) bool) {
		stop := errors.New("stop")
		err := s.Image.Walk(ctx, func(path string, ino *squash.Inode) error {
			if s.note(path, ino); !yield(step{path: path, ino: ino}) {
				return stop
			}
			return nil
		})
		if err != nil && err != stop {
			yield(step{err: fmt.Errorf("%s: %w", s.Name, err)})
		}
	}
}

// note counts a name.
func (s *side) note(path string, ino *squash.Inode) {
	if !ino.IsDir() && ino.NLink > 1 {
		g := s.links[ino.Number]
		if g == nil {
			g = &linkGroup{}
			s.links[ino.Number] = g
		}
		g.names = append(g.names, path)
		if len(g.names) > 1 {
			return
		}
	}
	switch {
	case ino.IsDir():
		s.info.Directories++
	case ino.Mode.IsRegular():
		s.info.Files++
		s.info.Content += ino.Size
	default:
		s.info.Others++
	}
}

// walk meets the names of both images in their common order and compares the
// contents of files on all processors.
func (c *comparison) walk(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	tasks := make(chan *node, 256)
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			for n := range tasks {
				if err := c.compareContent(ctx, n); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		defer close(tasks)
		return c.merge(ctx, tasks)
	})
	if err := group.Wait(); err != nil {
		return err
	}
	c.settle()
	return nil
}

func (c *comparison) merge(ctx context.Context, tasks chan<- *node) error {
	nextOld, stopOld := iter.Pull(c.old.names(ctx))
	defer stopOld()
	nextNew, stopNew := iter.Pull(c.next.names(ctx))
	defer stopNew()
	shared := map[[2]uint32]*contentTask{}
	a, okA := nextOld()
	b, okB := nextNew()
	for okA || okB {
		if err := cmp.Or(a.err, b.err); err != nil {
			return err
		}
		order := 0
		switch {
		case !okA:
			order = 1
		case !okB:
			order = -1
		default:
			order = comparePaths(a.path, b.path)
		}
		var err error
		switch {
		case order < 0:
			err = c.keep(&node{path: a.path, old: a.ino})
		case order > 0:
			err = c.keep(&node{path: b.path, new: b.ino})
		default:
			err = c.pair(ctx, &node{path: a.path, old: a.ino, new: b.ino}, shared, tasks)
		}
		if err != nil {
			return err
		}
		if order <= 0 {
			a, okA = nextOld()
		}
		if order >= 0 {
			b, okB = nextNew()
		}
	}
	return nil
}

// comparePaths is the order of a walk: the separator comes before everything.
func comparePaths(a, b string) int {
	if (a == ".") != (b == ".") { // the root
		if a == "." {
			return -1
		}
		return 1
	}
	for i := range min(len(a), len(b)) {
		if x, y := a[i], b[i]; x != y {
			switch {
			case x == '/':
				return -1
			case y == '/':
				return 1
			}
			return cmp.Compare(x, y)
		}
	}
	return cmp.Compare(len(a), len(b))
}

// pair compares what two inodes of one name say of themselves. Files go on to
// the workers; names of hard links wait until all of them are known.
func (c *comparison) pair(ctx context.Context, n *node, shared map[[2]uint32]*contentTask, tasks chan<- *node) error {
	linked := false
	for s, ino := range map[*side]*squash.Inode{&c.old: n.old, &c.next: n.new} {
		if g := s.links[ino.Number]; g != nil && !ino.IsDir() {
			g.kept, linked = cmp.Or(g.kept, n.path), true
		}
	}
	if n.old.Mode.Type() != n.new.Mode.Type() {
		n.how = []string{HowType}
		return c.keep(n)
	}
	if err := c.describe(n); err != nil {
		return err
	}
	if !n.old.Mode.IsRegular() {
		if len(n.how) > 0 || linked {
			return c.keep(n)
		}
		return nil
	}
	n.content = &contentTask{old: n.old, new: n.new}
	if linked {
		key := [2]uint32{n.old.Number, n.new.Number}
		if t := shared[key]; t != nil {
			n.content = t
			return c.keep(n)
		}
		shared[key] = n.content
	}
	select {
	case tasks <- n:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// describe finds what differs beside the content.
func (c *comparison) describe(n *node) error {
	x, y := n.old, n.new
	add := func(differs bool, how string) {
		if differs {
			n.how = append(n.how, how)
		}
	}
	add(permissions(x.Mode) != permissions(y.Mode), HowMode)
	add(x.UID != y.UID || x.GID != y.GID, HowOwner)
	var err error
	if n.xattrs, err = c.compareXattrs(n); err != nil {
		return fmt.Errorf("%s: %w", n.path, err)
	}
	add(n.xattrs != nil, HowXattrs)
	add(x.Mode&fs.ModeSymlink != 0 && x.Target != y.Target, HowTarget)
	add(x.Mode&fs.ModeDevice != 0 && x.Rdev != y.Rdev, HowDevice)
	add(x.MTime != y.MTime, HowTime)
	return nil
}

func (c *comparison) compareXattrs(n *node) (*XattrChange, error) {
	a, err := c.old.Image.Xattrs(n.old)
	if err != nil {
		return nil, err
	}
	b, err := c.next.Image.Xattrs(n.new)
	if err != nil || len(a) == 0 && len(b) == 0 {
		return nil, err
	}
	values := map[string][]byte{}
	for _, x := range a {
		values[x.Name] = x.Value
	}
	var change XattrChange
	for _, x := range b {
		old, ok := values[x.Name]
		switch {
		case !ok:
			change.Added = append(change.Added, Name(x.Name))
		case !bytes.Equal(old, x.Value):
			change.Changed = append(change.Changed, Name(x.Name))
		}
		delete(values, x.Name)
	}
	for name := range values {
		change.Removed = append(change.Removed, Name(name))
	}
	if len(change.Added)+len(change.Removed)+len(change.Changed) == 0 {
		return nil, nil
	}
	for _, list := range [][]Name{change.Added, change.Removed, change.Changed} {
		slices.Sort(list)
	}
	return &change, nil
}

func (c *comparison) compareContent(ctx context.Context, n *node) error {
	var err error
	if n.content.same, err = c.same.Same(ctx, n.content.old, n.content.new); err != nil {
		return fmt.Errorf("%s: %w", n.path, err)
	}
	if n.content.same && len(n.how) == 0 && n.old.NLink == 1 && n.new.NLink == 1 {
		return nil
	}
	return c.keep(n)
}

// settle puts the nodes in order and completes what had to wait.
func (c *comparison) settle() {
	slices.SortFunc(c.nodes, func(a, b *node) int { return comparePaths(a.path, b.path) })
	c.nodes = slices.DeleteFunc(c.nodes, func(n *node) bool {
		if n.old == nil || n.new == nil || slices.Contains(n.how, HowType) {
			return false
		}
		if n.content != nil && !n.content.same {
			n.how = append([]string{HowContent}, n.how...)
		}
		if !slices.Equal(c.old.namesOf(n.old, n.path), c.next.namesOf(n.new, n.path)) {
			n.how = append(n.how, HowLinks)
			if i := slices.Index(n.how, HowTime); i >= 0 {
				n.how = append(slices.Delete(n.how, i, i+1), HowTime)
			}
		}
		return len(n.how) == 0
	})
}

// namesOf returns the names of an inode one of whose is path.
func (s *side) namesOf(ino *squash.Inode, path string) []string {
	if g := s.links[ino.Number]; g != nil && !ino.IsDir() {
		return g.names
	}
	return []string{path}
}

// weight is the content that a name stands for: that of its inode, once, under
// the first name that is in both images, or else the first.
func (s *side) weight(ino *squash.Inode, path string) int64 {
	if !ino.Mode.IsRegular() {
		return 0
	}
	if g := s.links[ino.Number]; g != nil && path != cmp.Or(g.kept, g.names[0]) {
		return 0
	}
	return ino.Size
}
