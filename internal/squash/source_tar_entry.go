// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"archive/tar"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"net/url"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits that keep a stranger's archive from taking time and memory that are
// out of all proportion to its size.
const (
	maxTarDepth    = 4096 // like the reader's
	maxTarSymlinks = 40   // followed for one name, like the kernel's
)

// lookUp finds the directory a name belongs to, making it if need be, and the
// last part of the name, which the root does not have.
//
// tar extracts through symlinks that it has extracted before, such as lib ->
// usr/lib. It does so, and we do, for those that lead downwards only: others
// could lead out of the tree.
func (s *tarSource) lookUp(name string) (dir int, base string, err error) {
	parts, err := splitTarName(name)
	if err != nil || len(parts) == 0 {
		return 0, "", err
	}
	var at []string // the way to dir
	for links := 0; len(parts) > 1; {
		next, ok := s.tree.find(dir, parts[0])
		if !ok {
			if next, err = s.tree.add(tarDirEntry()); err == nil {
				err = s.tree.put(dir, parts[0], next)
			}
			if err != nil {
				return 0, "", err
			}
		}
		switch kind := s.tree.inode(next).mode() & unix.S_IFMT; kind {
		case unix.S_IFDIR:
		case unix.S_IFLNK:
			e, err := s.tree.entry(next, s)
			if err != nil {
				return 0, "", err
			}
			way, err := splitTarName(e.Target)
			if links++; links > maxTarSymlinks || strings.HasPrefix(e.Target, "/") || err != nil || len(way) == 0 {
				return 0, "", fmt.Errorf("it lies behind the symlink %s -> %s, which is not followed", path.Join(append(at, parts[0])...), e.Target)
			}
			parts = slices.Concat(way, parts[1:])
			continue
		default:
			return 0, "", fmt.Errorf("it lies below %s, which is not a directory", path.Join(append(at, parts[0])...))
		}
		dir, at, parts = next, append(at, parts[0]), parts[1:]
		if len(at) > maxTarDepth {
			return 0, "", fmt.Errorf("directories nested more than %d deep", maxTarDepth)
		}
	}
	return dir, parts[0], nil
}

// splitTarName returns the parts of a name, which is relative to the root.
func splitTarName(name string) ([]string, error) {
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			return nil, errors.New(`a name with ".." could lead out of the tree`)
		default:
			if len(part) > maxNameLen {
				return nil, fmt.Errorf("name of %d bytes: the limit is %d", len(part), maxNameLen)
			}
			parts = append(parts, part)
		}
	}
	if len(parts) > maxTarDepth {
		return nil, fmt.Errorf("directories nested more than %d deep", maxTarDepth)
	}
	return parts, nil
}

var tarTypes = map[byte]uint32{
	tar.TypeReg: unix.S_IFREG, tar.TypeCont: unix.S_IFREG, tar.TypeGNUSparse: unix.S_IFREG,
	tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK,
	tar.TypeFifo: unix.S_IFIFO,
}

// fillTarEntry translates a header's metadata.
func fillTarEntry(e *Entry, h *tar.Header) error {
	kind, ok := tarTypes[h.Typeflag]
	if !ok {
		return fmt.Errorf("entry of type %q, which has no meaning in an image", h.Typeflag)
	}
	if h.Uid < 0 || h.Uid > math.MaxUint32 || h.Gid < 0 || h.Gid > math.MaxUint32 {
		return fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	e.Mode = kind | uint32(h.Mode&0o7777)
	e.UID, e.GID = uint32(h.Uid), uint32(h.Gid)
	e.Mtime = h.ModTime.Unix()
	switch kind {
	case unix.S_IFLNK:
		e.Mode, e.Target = kind|0o777, strings.Clone(h.Linkname)
	case unix.S_IFCHR, unix.S_IFBLK:
		if h.Devmajor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor < 0 || h.Devminor > math.MaxUint32 {
			return fmt.Errorf("device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	return fillTarXattrs(e, h.PAXRecords)
}

// fillTarXattrs reads the attributes as GNU tar and star write them, and as
// libarchive does, which writes both.
func fillTarXattrs(e *Entry, records map[string]string) error {
	found := map[string][]byte{}
	for key, value := range records {
		if name, ok := strings.CutPrefix(key, "LIBARCHIVE.xattr."); ok {
			name, err1 := url.PathUnescape(name)
			raw, err2 := base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
			if err := errors.Join(err1, err2); err != nil {
				return fmt.Errorf("extended attribute %s: %w", key, err)
			}
			if _, twice := found[name]; !twice {
				found[name] = raw
			}
		}
	}
	for key, value := range records {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			found[name] = []byte(value)
		}
		switch key {
		case "SCHILY.acl.access", "SCHILY.acl.default", "RHT.security.selinux":
			e.Note = "attribute " + key + " left out: SquashFS holds user., trusted. and security. attributes only"
		}
	}
	for name, value := range found {
		if !isOverlayXattr(name) {
			e.Xattrs = append(e.Xattrs, Xattr{Name: name, Value: value})
		}
	}
	slices.SortFunc(e.Xattrs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
