// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"strings"

	"golang.org/x/sys/unix"
)

const (
	pathMax = 4096 // PATH_MAX, with the final NUL
	maxLoop = 32   // links in one path, as in OpenSSH
)

func mkdirMode(a attrs) uint32 {
	if a.flags&attrMode != 0 {
		return a.mode & 0o7777
	}
	return 0o777
}

// rename fails if to exists, even as a dangling link.
func rename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err != unix.EINVAL && err != unix.ENOSYS { // EINVAL is also: into itself; then it comes again
		return err
	}
	return renameInSteps(from, to)
}

// renameInSteps is rename where the file system cannot promise it in one step. It goes as OpenSSH does: a hard link for
// files, a look before the rename for others.
func renameInSteps(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		switch err := unix.Link(from, to); err {
		case nil:
			if err := unix.Unlink(from); err != nil {
				unix.Unlink(to)
				return err
			}
			return nil
		case unix.EOPNOTSUPP, unix.ENOSYS, unix.EPERM, unix.EXDEV: // no hard links here
		default:
			return err
		}
	}
	if unix.Lstat(to, &st) == nil {
		return unix.EEXIST
	}
	return unix.Rename(from, to)
}

func readlink(path string) (string, error) {
	b := make([]byte, pathMax)
	var n int
	err := retry(func() (err error) {
		n, err = unix.Readlink(path, b)
		return err
	})
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// realpath resolves every link, "." and ".." in path, and makes it absolute; an empty path is the working directory. As
// with OpenSSH the last component need not exist, but only without a slash after it, and ".." takes back whatever came
// before it, be it a directory or not.
func realpath(path string) (string, error) {
	if path == "" {
		path = "."
	}
	done := "/"
	if path[0] != '/' {
		wd, err := unix.Getwd()
		if err != nil {
			return "", err
		}
		done = wd
	}
	links := 0
	for left := path; left != ""; {
		if len(left) >= pathMax || len(done) >= pathMax {
			return "", unix.ENAMETOOLONG
		}
		name, rest, more := strings.Cut(left, "/")
		left = rest
		switch name {
		case "", ".":
			continue
		case "..":
			done = parent(done)
			continue
		}
		next := strings.TrimSuffix(done, "/") + "/" + name
		var st unix.Stat_t
		err := retry(func() error { return unix.Lstat(next, &st) })
		if err == unix.ENOENT && !more {
			return next, nil
		}
		if err != nil {
			return "", err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			done = next
			continue
		}
		if links++; links > maxLoop+1 {
			return "", unix.ELOOP
		}
		to, err := readlink(next)
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(to, "/") {
			done = "/"
		}
		if more {
			to = strings.TrimSuffix(to, "/") + "/" + rest
		}
		left = to
	}
	return done, nil
}

func parent(path string) string {
	return path[:max(strings.LastIndexByte(path, '/'), 1)]
}
