// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// caDir is where an image keeps the site's CA certificates.
const caDir = "etc/cray/ca"

// maxSmallFile bounds what is read whole: certificates, resolv.conf, our state.
const maxSmallFile = 1 << 20

// InstallCA copies the files of srcDir, a ConfigMap mount, to /etc/cray/ca in
// the image. The mount's own machinery (`..data`, dated directories) stays
// out; its links are followed inside the mount only. A file that is already
// there with the same bytes is not touched, so the second run changes nothing.
func (r *Root) InstallCA(srcDir string) error {
	entries, err := os.ReadDir(srcDir)
	if err != nil {
		return fmt.Errorf("install CA certificates: %w: mount the site's CA ConfigMap there", err)
	}
	files := map[string][]byte{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		content, err := readMounted(srcDir, e.Name())
		if errors.Is(err, ErrNotRegular) {
			continue
		}
		if err != nil {
			return fmt.Errorf("install CA certificate %s/%s: %w", srcDir, e.Name(), err)
		}
		files[e.Name()] = content
	}
	dir, err := r.makeDirs(caDir)
	if err != nil {
		return fmt.Errorf("install CA certificates in the image: %w: make it a directory in the source image", err)
	}
	defer dir.Close()
	for name, content := range files {
		old, err := readFileAt(dir, name, maxSmallFile)
		if err == nil && bytes.Equal(old, content) {
			continue
		}
		if err := replaceFile(dir, name, content, 0o644); err != nil {
			return fmt.Errorf("install CA certificate /%s/%s in the image: %w", caDir, name, err)
		}
	}
	return nil
}

// readMounted reads one entry of a ConfigMap mount, following its links with
// the mount as root.
func readMounted(dir, name string) ([]byte, error) {
	handle, err := pathrs.OpenInRoot(dir, name)
	if err != nil {
		return nil, cause(err)
	}
	defer handle.Close()
	info, err := handle.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, ErrNotRegular
	}
	f, err := pathrs.Reopen(handle, os.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	return readAll(f, maxSmallFile)
}

func readAll(f *os.File, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", f.Name(), limit)
	}
	return data, err
}

// makeDirs opens the directory name in the root. What is missing of it is
// made, mode 0755 whatever the umask.
func (r *Root) makeDirs(name string) (*os.File, error) {
	parts := strings.Split(strings.Trim(clean(name), "/"), "/")
	for i := range parts {
		sub := strings.Join(parts[:i+1], "/")
		if err := r.makeDir(sub, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return r.OpenDir(name)
}

// makeDir makes one directory with exactly that mode.
func (r *Root) makeDir(name string, mode uint32) error {
	dir, base, err := r.parent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Mkdirat(int(dir.Fd()), base, mode); err != nil {
		return &os.PathError{Op: "mkdir in image root", Path: clean(name), Err: err}
	}
	made, err := unix.Openat(int(dir.Fd()), base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "mkdir in image root", Path: clean(name), Err: err}
	}
	defer unix.Close(made)
	return unix.Fchmod(made, mode)
}
