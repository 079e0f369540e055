// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// begin implements contentSink: it makes the file.
func (u *unpacker) begin(f *fileTask) error {
	dir, err := u.dirs.get(f.dir)
	if err != nil {
		return err
	}
	defer u.dirs.put(f.dir)
	// The mode it will have in the end, which spares setting it. Nobody else can
	// enter the directories yet, and we can write attributes.
	mode := uint32(f.ino.Mode.Perm()) | 0o600
	err = ignoringEINTR(func() error {
		f.fd, err = unix.Openat(dir, f.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return u.explain("make file", f.path(), err)
	}
	u.mu.Lock()
	u.open[f] = struct{}{}
	u.mu.Unlock()
	// A hole at the end is made by nothing but the size.
	if n := len(f.ino.Blocks); n > 0 && f.ino.Blocks[n-1] == 0 {
		err = ignoringEINTR(func() error { return unix.Ftruncate(f.fd, f.ino.Size) })
		return u.explain("set size of", f.path(), err)
	}
	return nil
}

// write implements contentSink.
func (u *unpacker) write(f *fileTask, off int64, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(f.fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return u.explain("write", f.path(), err)
		}
		b = b[n:]
		off += int64(n)
	}
	return nil
}

// finish implements contentSink.
func (u *unpacker) finish(f *fileTask) error {
	if err := u.finishFD(f.fd, f.ino, f.path); err != nil {
		return err
	}
	u.mu.Lock()
	delete(u.open, f)
	u.mu.Unlock()
	// Close is where a network file system tells that a write went wrong.
	if err := unix.Close(f.fd); err != nil && !errors.Is(err, unix.EINTR) {
		return u.explain("close", f.path(), err)
	}
	return nil
}

// closeFiles closes what an error left open.
func (u *unpacker) closeFiles() {
	for f := range u.open {
		unix.Close(f.fd)
	}
}

// times returns the access and modification time to set.
func times(ino *Inode) []unix.Timespec {
	ts := unix.Timespec{Sec: int64(ino.MTime)}
	return []unix.Timespec{ts, ts}
}

// futimens is utimensat(2) without a name: for an open file, no path is looked
// up. The unix package has no call for that.
func futimens(fd int, ts []unix.Timespec) error {
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ignoringEINTR repeats a call that a signal interrupted; file systems in user
// space and on the network let signals through.
func ignoringEINTR(call func() error) error {
	for {
		err := call()
		if err != unix.EINTR {
			return err
		}
	}
}

func ownerOp(ino *Inode) string { return fmt.Sprintf("set owner %d:%d of", ino.UID, ino.GID) }

// explain adds the operation, the path, and what the user can do.
func (u *unpacker) explain(op, path string, err error) error {
	if err == nil {
		return nil
	}
	var hint string
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		hint = fmt.Sprintf(": the image needs %d bytes and as many inodes as it has, free some below %s", u.total, u.target)
	case errors.Is(err, unix.EPERM) && strings.HasPrefix(op, "set owner"):
		hint = ": unpack needs root or CAP_CHOWN"
	case errors.Is(err, unix.EPERM) && strings.HasSuffix(op, "device"):
		hint = ": unpack needs root or CAP_MKNOD"
	case errors.Is(err, unix.EEXIST):
		hint = fmt.Sprintf(": something else writes to %s, or its file system does not tell upper from lower case", u.target)
	case errors.Is(err, unix.EMFILE):
		hint = ": raise the limit of open files (ulimit -n)"
	}
	return fmt.Errorf("%s %s: %w%s", op, path, err, hint)
}

// explainXattr is explain for extended attributes.
func (u *unpacker) explainXattr(x Xattr, path string, err error) error {
	var hint string
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case unix.EPERM:
		need := "CAP_SYS_ADMIN"
		if x.Name == "security.capability" {
			need = "CAP_SETFCAP"
		}
		hint = ": unpack needs " + need
		if strings.HasPrefix(x.Name, "user.") {
			hint = ": Linux allows user attributes on files and directories only"
		}
	case unix.ENOTSUP:
		hint = fmt.Sprintf(": the file system of %s does not have such attributes, unpack to another", u.target)
	case unix.ENOSPC, unix.E2BIG, unix.ERANGE, unix.EDQUOT:
		hint = fmt.Sprintf(": the file system of %s is full or cannot hold %d bytes, unpack to another", u.target, len(x.Value))
	}
	return fmt.Errorf("set %s on %s: %w%s", x.Name, path, err, hint)
}
