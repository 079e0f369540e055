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
	if err := u.create(f); err != nil {
		return err
	}
	u.mu.Lock()
	u.open[f] = struct{}{}
	u.mu.Unlock()
	// A hole at the end is made by nothing but the size.
	if n := len(f.ino.Blocks); n > 0 && f.ino.Blocks[n-1] == 0 {
		err := ignoringEINTR(func() error { return unix.Ftruncate(f.fd, f.ino.Size) })
		return u.explain("set size of", f.path(), err)
	}
	return nil
}

// create makes and opens a file.
func (u *unpacker) create(f *fileTask) error {
	dir, err := u.dirs.get(f.dir)
	if err != nil {
		return err
	}
	err = ignoringEINTR(func() (err error) {
		f.fd, err = unix.Openat(dir.fd, f.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, createMode(f.ino))
		return err
	})
	dir.put()
	if err != nil {
		return u.explain("make file", f.path(), err)
	}
	return nil
}

// createMode is the mode a file will have in the end, which spares setting it.
// Nobody else can enter the directories yet, and we can write attributes.
func createMode(ino *Inode) uint32 { return uint32(ino.Mode.Perm()) | 0o600 }

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
	if err := u.finishFile(f); err != nil {
		return err
	}
	u.mu.Lock()
	delete(u.open, f)
	u.mu.Unlock()
	return u.close(f)
}

// whole implements wholeSink. The file is in nobody else's hands, so there is
// nothing to keep about it.
func (u *unpacker) whole(f *fileTask, b []byte) error {
	if err := u.create(f); err != nil {
		return err
	}
	err := u.write(f, 0, b)
	if err == nil {
		err = u.finishFile(f)
	}
	if err != nil {
		unix.Close(f.fd)
		return err
	}
	return u.close(f)
}

// finishFile restores a file's metadata.
func (u *unpacker) finishFile(f *fileTask) error {
	is, err := u.madeAs(f)
	if err != nil {
		return err
	}
	return u.restore(f.fd, f.ino, is, f.path)
}

// madeAs returns the owner and mode a file was made with. They depend on the mode
// asked for and on nothing else: all directories are ours, made alike, and
// finished when all files are. So one file of each mode is looked at.
func (u *unpacker) madeAs(f *fileTask) (*access, error) {
	known := &u.made[createMode(f.ino)]
	if a := known.Load(); a != nil {
		return a, nil
	}
	a, err := u.look(f.fd, f.path)
	if err == nil {
		known.Store(&a)
	}
	return &a, err
}

func (u *unpacker) close(f *fileTask) error {
	// This is where a network file system tells that a write went wrong.
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
func times(ino *Inode) [2]unix.Timespec {
	ts := unix.Timespec{Sec: int64(ino.MTime)}
	return [2]unix.Timespec{ts, ts}
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
