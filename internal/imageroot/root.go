// SPDX-License-Identifier: Apache-2.0

// Package imageroot works inside an image root on behalf of a process that
// has more to lose than the root: the sidecar holds S3 and OAuth secrets, and
// whoever had the shell owns every name and link in the tree.
//
// All paths are resolved with the root as "/" (openat2(2) RESOLVE_IN_ROOT,
// through pathrs-lite): an absolute symlink means the image's file, ".."
// stops at the top, and /proc magic links are refused. A name is opened
// O_PATH first and looked at; only a regular file or a directory is then
// opened for real, so that no FIFO blocks us and no device is touched.
//
// It refuses to follow a symlink in place of the root itself, to open
// anything but regular files and directories, and to use an empty kernel or
// initrd. Whether the link leads to a file the user should ship is the
// user's business: they own all of them.
package imageroot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// ErrNotRegular is wrapped by errors about a name that is something else than
// a regular file.
var ErrNotRegular = errors.New("not a regular file")

// Root is an open image root.
type Root struct {
	dir  *os.File // O_PATH
	path string   // as given, for messages
}

// Open opens the image root at path, whose last component must be a real
// directory: in plain mode the user can put a symlink there.
func Open(path string) (*Root, error) {
	dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("image root %s: a symbolic link or a file, not a directory: nothing was opened: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("image root: %w", err)
	}
	return &Root{dir: dir, path: path}, nil
}

// Close releases the root.
func (r *Root) Close() error { return r.dir.Close() }

// Name returns the path the root was opened with.
func (r *Root) Name() string { return r.path }

// FDPath returns a path to the opened directory itself, valid in this process
// until Close, whatever has been put at Name in the meantime.
func (r *Root) FDPath() string { return fdPath(r.dir) }

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// Locate resolves name in the root, following links, and returns an O_PATH
// handle: good for Stat, not for reading.
func (r *Root) Locate(name string) (*os.File, error) {
	f, err := pathrs.OpenatInRoot(r.dir, name)
	if err != nil {
		return nil, &fs.PathError{Op: "open in image root", Path: clean(name), Err: cause(err)}
	}
	return f, nil
}

// OpenFile resolves name in the root and opens the regular file or directory
// it leads to. flags are those of os.OpenFile without O_CREATE: files are made
// by WriteFile, which never writes through a link.
func (r *Root) OpenFile(name string, flags int) (*os.File, error) {
	if flags&os.O_CREATE != 0 {
		return nil, &fs.PathError{Op: "open in image root", Path: clean(name), Err: errors.ErrUnsupported}
	}
	handle, err := r.Locate(name)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	info, err := handle.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", clean(name), err)
	}
	if !info.Mode().IsRegular() && !info.IsDir() {
		return nil, &fs.PathError{Op: "open in image root", Path: clean(name), Err: fmt.Errorf("%w but a %s", ErrNotRegular, kind(info.Mode()))}
	}
	f, err := pathrs.Reopen(handle, flags|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC)
	if err != nil {
		return nil, &fs.PathError{Op: "open in image root", Path: clean(name), Err: cause(err)}
	}
	return f, nil
}

// OpenRegular resolves name in the root and opens it for reading. It must be
// a regular file.
func (r *Root) OpenRegular(name string) (*os.File, error) {
	f, err := r.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		if err == nil {
			err = fmt.Errorf("%w but a %s", ErrNotRegular, kind(info.Mode()))
		}
		return nil, &fs.PathError{Op: "open in image root", Path: clean(name), Err: err}
	}
	return f, nil
}

// OpenDir resolves name in the root and opens the directory it leads to.
func (r *Root) OpenDir(name string) (*os.File, error) {
	return r.OpenFile(name, unix.O_RDONLY|unix.O_DIRECTORY)
}

// IsAbsent reports whether err says that a name leads to nothing: it, or a
// directory or link on the way, does not exist, is no directory, or goes round
// in circles.
func IsAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// IsRegular reports whether name, resolved in the root, is a regular file. A
// name that does not exist is not an error.
func (r *Root) IsRegular(name string) (bool, error) {
	f, err := r.Locate(name)
	if IsAbsent(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular(), err
}

// InRoot returns the path of f as seen from inside the root, for messages.
func (r *Root) InRoot(f *os.File) string {
	root, err1 := os.Readlink(fdPath(r.dir))
	full, err2 := os.Readlink(fdPath(f))
	rest, ok := strings.CutPrefix(full, strings.TrimSuffix(root, "/"))
	if err1 != nil || err2 != nil || !ok || !strings.HasPrefix(rest, "/") {
		return full
	}
	return rest
}

// parent resolves the directory of name and returns it with the last
// component, on which *at system calls then work without following it.
func (r *Root) parent(name string) (*os.File, string, error) {
	name = clean(name)
	if name == "/" {
		return nil, "", &fs.PathError{Op: "open in image root", Path: name, Err: unix.EISDIR}
	}
	dir, err := r.OpenDir(path.Dir(name))
	if err != nil {
		return nil, "", err
	}
	return dir, path.Base(name), nil
}

// Remove unlinks name, a symlink included, without following its last
// component. A name that does not exist is not an error; a directory is.
func (r *Root) Remove(name string) error {
	dir, base, err := r.parent(name)
	if IsAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove in image root", Path: clean(name), Err: err}
	}
	return nil
}

// Touch makes an empty regular file at name, or leaves one that is there
// alone. A symlink or other inode in its place is replaced, a directory is an
// error.
func (r *Root) Touch(name string, mode uint32) error {
	dir, base, err := r.parent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	for attempt := 0; ; attempt++ {
		fd, err := unix.Openat(int(dir.Fd()), base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EEXIST) || attempt > 3 {
			return &fs.PathError{Op: "create in image root", Path: clean(name), Err: err}
		}
		var st unix.Stat_t
		err = unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			return nil
		}
		if err := unix.Unlinkat(int(dir.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return &fs.PathError{Op: "create in image root", Path: clean(name), Err: err}
		}
	}
}

// clean writes a name the way it is seen from inside the root.
func clean(name string) string { return path.Clean("/" + name) }

// cause strips the layers that pathrs-lite puts around an errno; the caller's
// PathError says the same in our words.
func cause(err error) error {
	var pe *fs.PathError
	for errors.As(err, &pe) {
		err = pe.Err
	}
	return err
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeNamedPipe != 0:
		return "FIFO"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeDevice != 0:
		return "device"
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	}
	return "special file"
}
