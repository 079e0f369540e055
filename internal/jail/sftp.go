// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/sftpserver"
)

// sftpMain serves SFTP on stdin and stdout, inside the jail, where "/" is the image and names come from its passwd
// file, and writes what it does to stderr. It starts in the user's home, as sftp-server does. The end of the input is
// the normal end.
func sftpMain() error {
	opts, _, err := sftpserver.ParseOptions(os.Args[2:])
	if err != nil {
		return err
	}
	home := os.Getenv("HOME")
	if err := os.Chdir(home); err != nil {
		if err := os.Chdir("/"); err != nil {
			return err
		}
	}
	if opts.Dir != "" {
		dir := strings.NewReplacer("%%", "%", "%d", home, "%u", os.Getenv("USER")).Replace(opts.Dir)
		if err := os.Chdir(dir); err != nil {
			fmt.Fprintln(os.Stderr, "sftp server:", err) // and stays at home, as sftp-server does
		}
	}
	if opts.Umask >= 0 {
		unix.Umask(opts.Umask)
	}
	log := &pipeLog{fd: unix.Stderr}
	if err := unix.SetNonblock(log.fd, true); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return sftpserver.Serve(os.Stdin, os.Stdout, opts, log)
}

// logPatience is how long the log may keep a session waiting, in all.
const logPatience = time.Second

// pipeLog writes to a pipe in non-blocking mode. A reader that is behind is waited for, but only logPatience in all:
// from then on what does not fit at once is lost, because files matter more than the log of them.
type pipeLog struct {
	fd     int
	waited time.Duration
}

var errLogFull = errors.New("the log is full")

// Write takes at most PIPE_BUF bytes: all or none.
func (l *pipeLog) Write(b []byte) (int, error) {
	for {
		n, err := unix.Write(l.fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != unix.EAGAIN {
			return max(n, 0), err
		}
		left := logPatience - l.waited
		if left <= 0 {
			return 0, errLogFull
		}
		began := time.Now()
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		l.waited += time.Since(began)
		if err != nil && err != unix.EINTR {
			return 0, err
		}
	}
}
