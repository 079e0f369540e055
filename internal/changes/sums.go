// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"path"
	"slices"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// report turns the nodes into what is printed, without packages.
func (c *comparison) report() *Report {
	r := &Report{Format: Format, Old: c.old.image(), New: c.next.image(),
		Packages: []PackageChange{}, Directories: []DirectoryChange{}, Changes: make([]Change, 0, len(c.nodes)), Notes: []string{}}
	r.Summary.ImageGrowth = r.New.Bytes - r.Old.Bytes
	r.Summary.ContentGrowth = r.New.Content - r.Old.Content
	dirs := map[string]*DirectoryChange{}
	for _, n := range c.nodes {
		change := c.change(n)
		c.count(n, &change, &r.Summary, dirs)
		r.Changes = append(r.Changes, change)
	}
	for _, d := range dirs {
		r.Directories = append(r.Directories, *d)
	}
	slices.SortFunc(r.Directories, func(a, b DirectoryChange) int { return comparePaths(string(a.Path), string(b.Path)) })
	return r
}

func (s *side) image() Image {
	info := s.Image.Info()
	s.info.Name, s.info.Bytes, s.info.Created = Name(s.Name), info.BytesUsed, info.Created
	return s.info
}

func (c *comparison) change(n *node) Change {
	change := Change{Path: Name(n.path), Kind: Modified, How: n.how, Xattrs: n.xattrs}
	if n.from != "" {
		from := Name(n.from)
		change.Kind, change.From = Renamed, &from
	}
	if n.old != nil {
		change.Old = c.old.state(n.old)
	} else {
		change.Kind = Added
	}
	if n.new != nil {
		change.New = c.next.state(n.new)
	} else {
		change.Kind = Removed
	}
	return change
}

func (s *side) state(ino *squash.Inode) *State {
	st := stateOf(ino)
	if g := s.links[ino.Number]; g != nil && !ino.IsDir() && len(g.names) > 1 {
		st.Links = uint32(len(g.names))
	}
	return st
}

// touched tells whether nothing but the time changed.
func (c *Change) touched() bool {
	return c.Kind == Modified && len(c.How) == 1 && c.How[0] == HowTime
}

// count weighs a change and adds it to the sums of the image and of every directory above it.
func (c *comparison) count(n *node, change *Change, s *Summary, dirs map[string]*DirectoryChange) {
	if change.touched() {
		s.Touched++
		return
	}
	var one DirectoryChange
	var before, after int64
	if n.old != nil && n.from == "" {
		before = c.old.weight(n.old, n.path)
	}
	if n.new != nil {
		after = c.next.weight(n.new, n.path)
	}
	one.Growth = after - before
	switch change.Kind {
	case Added:
		one.Added, one.AddedBytes = 1, after
	case Removed:
		one.Removed, one.RemovedBytes = 1, before
	case Renamed:
		one.Renamed = 1
		addUp(dirs, n.from, DirectoryChange{Growth: -n.old.Size})
	case Modified:
		one.Modified = 1
		switch {
		case slices.Contains(n.how, HowType):
			one.AddedBytes, one.RemovedBytes = after, before
		case slices.Contains(n.how, HowContent):
			one.RewrittenBytes = after
			change.weight = max(before, after)
		}
	}
	change.weight = max(change.weight, one.AddedBytes+one.RemovedBytes)
	s.Added += one.Added
	s.Removed += one.Removed
	s.Modified += one.Modified
	s.Renamed += one.Renamed
	s.AddedBytes += one.AddedBytes
	s.RemovedBytes += one.RemovedBytes
	s.RewrittenBytes += one.RewrittenBytes
	addUp(dirs, n.path, one)
}

func addUp(dirs map[string]*DirectoryChange, name string, one DirectoryChange) {
	for name != "." {
		name = path.Dir(name)
		d := dirs[name]
		if d == nil {
			d = &DirectoryChange{Path: Name(name)}
			dirs[name] = d
		}
		d.Added += one.Added
		d.Removed += one.Removed
		d.Modified += one.Modified
		d.Renamed += one.Renamed
		d.AddedBytes += one.AddedBytes
		d.RemovedBytes += one.RemovedBytes
		d.RewrittenBytes += one.RewrittenBytes
		d.Growth += one.Growth
	}
}
