// SPDX-License-Identifier: Apache-2.0

package layers

import (
	"errors"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// node is a name in the merged view.
type node struct {
	path  string
	upper *unix.Stat_t  // nil: not in the upper layer
	white bool          // the upper layer has a whiteout
	lower *squash.Inode // what the image would show if the upper layer had nothing here; may be nil
	// merged is the image's directory whose entries show in this one; nil if none do.
	merged *squash.Inode
}

// absent: nothing of that name is seen.
func (n *node) absent() bool { return n.upper == nil && (n.white || n.lower == nil) }

// at is where a path lies in the upper layer. It is only used for names whose
// parents are known to be directories there.
func (r *Root) at(p string) string { return r.dir.FDPath() + "/" + p }

// top is the root itself, which always is a directory of both layers.
func (r *Root) top() (*node, error) {
	lower, err := r.base.Root()
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(r.at("."), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: ".", Err: err}
	}
	return &node{path: ".", upper: &st, lower: lower, merged: lower}, nil
}

// look returns an entry of a directory that is in the upper layer.
func (r *Root) look(dir *node, entry string) (*node, error) {
	n := &node{path: path.Join(dir.path, entry)}
	var st unix.Stat_t
	switch err := unix.Lstat(r.at(n.path), &st); {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return nil, &fs.PathError{Op: "lstat", Path: n.path, Err: err}
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
		n.white = true
	default:
		n.upper = &st
	}
	if dir.merged != nil {
		info, err := r.base.Lstat(n.path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			n.lower = info.Sys().(*squash.Inode)
		}
	}
	if n.lower == nil || !n.lower.IsDir() || n.white {
		return n, nil
	}
	if n.upper == nil {
		n.merged = n.lower
	} else if isDir(n.upper) {
		opaque, err := r.opaque(n.path)
		if err != nil {
			return nil, err
		}
		if !opaque {
			n.merged = n.lower
		}
	}
	return n, nil
}

// find returns the entry at a path that goes through directories of the upper
// layer alone, nil when one of them is missing.
func (r *Root) find(p string) (*node, error) {
	n, err := r.top()
	for entry := range strings.SplitSeq(p, "/") {
		if err != nil || n.upper == nil || !isDir(n.upper) {
			return nil, err
		}
		n, err = r.look(n, entry)
	}
	return n, err
}

func isDir(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

// opaqueMark is set on a directory that hides the image's of the same name
// (Documentation/filesystems/overlayfs.rst; mounted with userxattr).
const opaqueMark = "user.overlay.opaque"

func (r *Root) opaque(p string) (bool, error) {
	buf := make([]byte, 8)
	n, err := unix.Lgetxattr(r.at(p), opaqueMark, buf)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ERANGE) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "read attribute " + opaqueMark + " of", Path: p, Err: err}
	}
	return string(buf[:n]) == "y", nil
}
