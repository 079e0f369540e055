// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// renameBytes bounds what is read of each image to find renamed files: small
// ones are looked at first.
const renameBytes = 256 << 20

type contentSum [sha256.Size]byte

// findRenames joins a removed file and an added one with the same content. An
// inode with several names is taken for renamed by its first.
func (c *comparison) findRenames(ctx context.Context) error {
	bySize := map[int64][2][]*node{}
	for _, n := range c.nodes {
		var at int
		switch {
		case n.new == nil && c.old.renamable(n.old, n.path):
			at = 0
		case n.old == nil && c.next.renamable(n.new, n.path):
			at = 1
		default:
			continue
		}
		size := cmp.Or(n.old, n.new).Size
		both := bySize[size]
		both[at] = append(both[at], n)
		bySize[size] = both
	}
	var removed, added []*node
	sizes := []int64{}
	for size, both := range bySize {
		if len(both[0]) > 0 && len(both[1]) > 0 {
			sizes = append(sizes, size)
		}
	}
	slices.Sort(sizes)
	var total int64
	for _, size := range sizes {
		both := bySize[size]
		if total += size * int64(max(len(both[0]), len(both[1]))); total > renameBytes {
			break
		}
		removed, added = append(removed, both[0]...), append(added, both[1]...)
	}
	old, err := sums(ctx, c.old.Image, removed)
	if err != nil {
		return err
	}
	next, err := sums(ctx, c.next.Image, added)
	if err != nil {
		return err
	}
	return c.joinRenames(removed, added, old, next)
}

// renamable tells whether a name stands for a file that has none in the other
// image.
func (s *side) renamable(ino *squash.Inode, path string) bool {
	g := s.links[ino.Number]
	return s.weight(ino, path) > 0 && (g == nil || g.kept == "")
}

// sums returns the digests of the nodes' files, in their order.
func sums(ctx context.Context, img *squash.Image, nodes []*node) ([]contentSum, error) {
	list := make([]contentSum, len(nodes))
	group, working := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, n := range nodes {
		group.Go(func() error {
			if working.Err() != nil {
				return context.Cause(working)
			}
			h := sha256.New()
			ino := cmp.Or(n.old, n.new)
			if _, err := io.Copy(h, io.NewSectionReader(img.Content(ino), 0, ino.Size)); err != nil {
				return fmt.Errorf("%s: %w", n.path, err)
			}
			h.Sum(list[i][:0])
			return nil
		})
	}
	return list, group.Wait()
}

// joinRenames takes, for each added file, a removed one of the same name before
// one of any other.
func (c *comparison) joinRenames(removed, added []*node, old, next []contentSum) error {
	left := map[contentSum][]*node{}
	for i, n := range removed {
		left[old[i]] = append(left[old[i]], n)
	}
	drop := map[*node]bool{}
	for _, sameName := range []bool{true, false} {
		for i, n := range added {
			if n.old != nil {
				continue
			}
			from := left[next[i]]
			at := slices.IndexFunc(from, func(o *node) bool {
				return !drop[o] && (!sameName || path.Base(o.path) == path.Base(n.path))
			})
			if at < 0 {
				continue
			}
			o := from[at]
			drop[o] = true
			n.old, n.from = o.old, o.path
			if err := c.describe(n); err != nil {
				return err
			}
		}
	}
	c.nodes = slices.DeleteFunc(c.nodes, func(n *node) bool { return drop[n] })
	return nil
}
