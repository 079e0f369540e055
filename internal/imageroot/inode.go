// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// quietly runs do, which changes entries of dir, and gives dir the
// modification time back that it had: our own coming and going must not show
// in an image the user did not touch.
func quietly(dir *os.File, do func() error) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	err := do()
	back := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}
	return errors.Join(err, unix.UtimesNanoAt(int(dir.Fd()), ".", back, 0))
}

// replaceFile puts a regular file of that content at name in dir, atomically
// and without following what is there. It belongs to root.
func replaceFile(dir *os.File, name string, content []byte, mode uint32) (err error) {
	tmp := "." + rand.Text()
	fd, err := unix.Openat(int(dir.Fd()), tmp, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create temporary file for %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), tmp)
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Unlinkat(int(dir.Fd()), tmp, 0))
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = unix.Fchmod(fd, mode)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return unix.Renameat(int(dir.Fd()), tmp, int(dir.Fd()), name)
}

func lstatat(dir *os.File, name string) (st unix.Stat_t, err error) {
	err = unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

func readlinkat(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// readFileAt reads the regular file name in dir without following it, up to
// limit bytes. Anything else is ErrNotRegular.
func readFileAt(dir *os.File, name string, limit int64) ([]byte, error) {
	st, err := lstatat(dir, name)
	if err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, ErrNotRegular
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return readAll(f, limit)
}
