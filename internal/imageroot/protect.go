// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// imageDir is where the image build leaves its configuration, secrets among it.
const imageDir = "image"

// ProtectImageDir makes /image in the root, and all below it, root's alone:
// directories 0700, scripts (*.sh) 0700, other files 0600. Links are neither
// followed nor changed: one that leads to /etc must not lock it. An image
// without /image, or with a link of that name, is left as it is.
func (r *Root) ProtectImageDir() error {
	dir, err := unix.Openat(int(r.dir.Fd()), imageDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("protect /%s in the image: %w", imageDir, err)
	}
	return protectDir(os.NewFile(uintptr(dir), "/"+imageDir))
}

// protectDir takes over dir and closes it.
func protectDir(dir *os.File) error {
	defer dir.Close()
	if err := makeRoots(dir, 0o700); err != nil {
		return err
	}
	for {
		entries, err := dir.ReadDir(256)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := protectEntry(dir, e.Name()); err != nil {
				return err
			}
		}
	}
}

func protectEntry(dir *os.File, name string) error {
	path := dir.Name() + "/" + name
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return ignoreMissing(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		sub, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("protect %s in the image: %w", path, err)
		}
		return protectDir(os.NewFile(uintptr(sub), path))
	case info.Mode().IsRegular() && strings.HasSuffix(name, ".sh"):
		return makeRoots(f, 0o700)
	case info.Mode().IsRegular():
		return makeRoots(f, 0o600)
	}
	return nil
}

// makeRoots gives f to root with that mode, and writes only what differs, so
// that an inode which is right already keeps its change time.
func makeRoots(f *os.File, mode uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("protect %s in the image: %w", f.Name(), err)
	}
	// By /proc, because fchmod(2) and fchown(2) refuse O_PATH descriptors.
	if st.Uid != 0 {
		if err := unix.Chown(fdPath(f), 0, -1); err != nil {
			return fmt.Errorf("protect %s in the image: %w", f.Name(), err)
		}
	}
	if st.Mode&0o7777 != mode {
		if err := unix.Chmod(fdPath(f), mode); err != nil {
			return fmt.Errorf("protect %s in the image: %w", f.Name(), err)
		}
	}
	return nil
}

// EnsureTmp makes /tmp (mode 1777) in an image that has none, where a jailed
// user must leave the flag. undo takes it away again, unless somebody used it.
// An image with a /tmp, or a link that leads to a directory, is left alone.
func (r *Root) EnsureTmp() (undo func() error, err error) {
	if dir, err := r.OpenDir("tmp"); err == nil {
		return func() error { return nil }, dir.Close()
	}
	top, err := r.OpenDir("/")
	if err != nil {
		return nil, err
	}
	defer top.Close()
	if err := quietly(top, func() error { return r.makeDir("tmp", 0o1777) }); err != nil {
		return nil, fmt.Errorf("the image has no usable /tmp, where a jailed user ends the job: %w: make it a directory in the source image", err)
	}
	return r.removeTmp, nil
}

func (r *Root) removeTmp() error {
	top, err := r.OpenDir("/")
	if err != nil {
		return err
	}
	defer top.Close()
	return quietly(top, func() error {
		err := unix.Unlinkat(int(top.Fd()), "tmp", unix.AT_REMOVEDIR)
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		return ignoreMissing(err)
	})
}
