// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Option relaxes a comparison.
type Option int

const (
	// Seconds compares modification times in whole seconds, which is all
	// SquashFS keeps.
	Seconds Option = iota
	// NoMtime leaves modification times out.
	NoMtime
	// NoOwner leaves uid and gid out, for tests without root.
	NoOwner
	// NoXattrs leaves extended attributes out.
	NoXattrs
)

// Entry is everything compared about one inode. Mode holds the st_mode bits,
// type included; Peers are the other names of the same inode in the tree.
type Entry struct {
	Mode     uint32
	UID, GID uint32
	Size     int64 // regular files only
	SHA256   string
	Mtime    unix.Timespec
	Rdev     uint64
	Target   string
	Xattrs   map[string]string
	Peers    []string
}

// Snapshot is a tree at one moment: entries by path relative to its root,
// which itself is ".".
type Snapshot map[string]Entry

// Take reads the tree at dir. It does not follow symlinks.
func Take(dir string) (Snapshot, error) {
	snap := Snapshot{}
	type inode struct{ dev, ino uint64 }
	names := map[inode][]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		e, err := entry(path, &st)
		if err != nil {
			return err
		}
		snap[rel] = e
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			id := inode{uint64(st.Dev), st.Ino}
			names[id] = append(names[id], rel)
		}
		return nil
	})
	for _, group := range names {
		for _, name := range group {
			e := snap[name]
			e.Peers = slices.DeleteFunc(slices.Clone(group), func(s string) bool { return s == name })
			slices.Sort(e.Peers)
			snap[name] = e
		}
	}
	return snap, err
}

func entry(path string, st *unix.Stat_t) (Entry, error) {
	e := Entry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		e.SHA256, err = hashFile(path)
	case unix.S_IFLNK:
		e.Target, err = os.Readlink(path)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = uint64(st.Rdev)
	}
	if err != nil {
		return e, err
	}
	e.Xattrs, err = xattrs(path)
	return e, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "llistxattr", Path: path, Err: err}
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &os.PathError{Op: "lgetxattr " + name, Path: path, Err: err}
		}
		all[name] = string(value[:n])
	}
	return all, nil
}

// Diff lists every difference between s and other, one line each, by path.
func (s Snapshot) Diff(other Snapshot, opts ...Option) []string {
	paths := slices.Sorted(maps.Keys(s))
	for path := range other {
		if _, ok := s[path]; !ok {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	var out []string
	for _, path := range paths {
		a, inA := s[path]
		b, inB := other[path]
		switch {
		case !inB:
			out = append(out, path+": only in the first tree")
		case !inA:
			out = append(out, path+": only in the second tree")
		default:
			for _, d := range a.diff(b, opts) {
				out = append(out, path+": "+d)
			}
		}
	}
	return out
}

func (e Entry) diff(o Entry, opts []Option) []string {
	var out []string
	add := func(what string, a, b any) {
		out = append(out, fmt.Sprintf("%s: %v, not %v", what, b, a))
	}
	if e.Mode != o.Mode {
		add("mode", fmt.Sprintf("%#o", e.Mode), fmt.Sprintf("%#o", o.Mode))
	}
	if !slices.Contains(opts, NoOwner) && (e.UID != o.UID || e.GID != o.GID) {
		add("owner", fmt.Sprintf("%d:%d", e.UID, e.GID), fmt.Sprintf("%d:%d", o.UID, o.GID))
	}
	if e.Size != o.Size {
		add("size", e.Size, o.Size)
	}
	if e.SHA256 != o.SHA256 {
		add("sha256", e.SHA256, o.SHA256)
	}
	if e.Target != o.Target {
		add("target", e.Target, o.Target)
	}
	if e.Rdev != o.Rdev {
		add("rdev", e.Rdev, o.Rdev)
	}
	if !slices.Contains(opts, NoMtime) {
		a, b := e.Mtime, o.Mtime
		if slices.Contains(opts, Seconds) {
			a.Nsec, b.Nsec = 0, 0
		}
		if a != b {
			add("mtime", fmt.Sprintf("%d.%09d", a.Sec, a.Nsec), fmt.Sprintf("%d.%09d", b.Sec, b.Nsec))
		}
	}
	if !slices.Contains(opts, NoXattrs) && !maps.Equal(e.Xattrs, o.Xattrs) {
		add("xattrs", fmt.Sprintf("%q", e.Xattrs), fmt.Sprintf("%q", o.Xattrs))
	}
	if !slices.Equal(e.Peers, o.Peers) {
		add("hard links", e.Peers, o.Peers)
	}
	return out
}

// Diff compares the trees at a and b in full. An unreadable tree is a
// difference too, so an empty result always means "equal".
func Diff(a, b string, opts ...Option) []string {
	first, err := Take(a)
	if err != nil {
		return []string{"reading " + a + ": " + err.Error()}
	}
	second, err := Take(b)
	if err != nil {
		return []string{"reading " + b + ": " + err.Error()}
	}
	return first.Diff(second, opts...)
}

// Equal fails t with every difference between the trees at a and b.
func Equal(t testing.TB, a, b string, opts ...Option) {
	t.Helper()
	if d := Diff(a, b, opts...); len(d) > 0 {
		t.Errorf("%s and %s differ:\n%s", a, b, strings.Join(d, "\n"))
	}
}
