// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Buffer sizes, in bytes. A pipe holds 64 KiB unless told otherwise, an SSH packet 32 KiB.
const (
	outBuffer   = 64 << 10
	inBuffer    = 32 << 10
	inBufferMax = 256 << 10
	pipeMax     = 1 << 20 // of a bulk transfer
	bulk        = 4 << 20 // a transfer is one when it has moved so much
)

// outBuffers are shared, so that a silent session holds none.
var outBuffers = sync.Pool{New: func() any { b := make([]byte, outBuffer); return &b }}

// pump copies one output of a command, a pipe or a terminal, to the channel.
//
// It knows when it is idle: the last read found nothing and all that was read before has
// been written. So after the command's end, "nothing left in the pipe, and idle" means
// that everything the command wrote has been sent, even when a background process still
// holds the other end. A timeout could only guess that.
type pump struct {
	r      *os.File // non-blocking
	w      io.Writer
	first  string // to be written before anything that is read
	idle   atomic.Bool
	done   atomic.Bool
	events chan<- struct{} // capacity 1: idle or done became true
}

func newPump(r *os.File, w io.Writer, events chan<- struct{}) *pump {
	return &pump{r: r, w: w, events: events}
}

func (p *pump) note(flag *atomic.Bool) {
	flag.Store(true)
	select {
	case p.events <- struct{}{}:
	default:
	}
}

// run copies until the other end is closed, r is closed, or w fails; then it closes r, so
// that a command that writes on gets SIGPIPE as it would from OpenSSH.
func (p *pump) run() {
	defer p.note(&p.done)
	defer p.r.Close()
	if p.first != "" {
		if _, err := io.WriteString(p.w, p.first); err != nil {
			return
		}
	}
	raw, err := p.r.SyscallConn()
	if err != nil {
		return
	}
	total, wide := 0, false
	for {
		var buf *[]byte
		var n int
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			p.idle.Store(false)
			buf = outBuffers.Get().(*[]byte)
			n, readErr = ignoreEINTR(func() (int, error) { return unix.Read(int(fd), *buf) })
			if !errors.Is(readErr, unix.EAGAIN) {
				return true
			}
			outBuffers.Put(buf)
			buf = nil
			p.note(&p.idle)
			return false
		})
		if total += max(n, 0); total > bulk && !wide {
			wide = true
			widen(p.r)
		}
		if err == nil && n > 0 {
			_, err = p.w.Write((*buf)[:n])
		}
		if buf != nil {
			outBuffers.Put(buf)
		}
		// A terminal without a slave gives EIO where a pipe gives 0.
		if err != nil || readErr != nil || n <= 0 {
			return
		}
	}
}

// drained reports whether all that was written to the other end before the call has been
// sent, and either run has returned or somebody still holds that end. The order matters:
// what left the pipe before the first look is still unsent only as long as the pump is not
// idle.
func (p *pump) drained() bool {
	if p.done.Load() {
		return true
	}
	raw, err := p.r.SyscallConn()
	if err != nil {
		return false
	}
	var pending int
	var held bool
	err = raw.Control(func(fd uintptr) {
		pending, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		poll := []unix.PollFd{{Fd: int32(fd)}}
		n, pollErr := ignoreEINTR(func() (int, error) { return unix.Poll(poll, 0) })
		held = pollErr == nil && (n == 0 || poll[0].Revents&unix.POLLHUP == 0)
	})
	return err == nil && pending == 0 && held && p.idle.Load() // an error: r is closed, and run about to return
}

func ignoreEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// feed copies the client's input to w until the client's EOF. When w does not take it any
// more, stopped is called once and the rest is thrown away, so that the window keeps moving.
func feed(w io.Writer, r io.Reader, stopped func()) (total int64) {
	buf := make([]byte, inBuffer)
	for wide := false; ; {
		n, err := r.Read(buf)
		total += int64(n)
		if n > 0 && w != nil {
			if _, werr := w.Write(buf[:n]); werr != nil {
				w = nil
				stopped()
			}
		}
		if err != nil {
			return total
		}
		if n == len(buf) && n < inBufferMax {
			buf = make([]byte, inBufferMax) // a bulk transfer: fewer, larger writes
		}
		if total > bulk && !wide {
			wide = true
			widen(w)
		}
	}
}

// widen lets a pipe hold more, so that the two ends of a bulk transfer wait less for each other. Where the kernel refuses,
// as it does beyond the user's share (pipe(7)), nothing changes, nor with a terminal. That share is why small transfers,
// of which there may be many at a time, go without.
func widen(end any) {
	f, ok := end.(*os.File)
	if !ok {
		return
	}
	if raw, err := f.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeMax) })
	}
}

// pipe returns the command's end, blocking as programs expect, and ours, non-blocking.
// childReads says which is which.
func pipe(childReads bool) (child, ours *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	c, o := p[1], p[0]
	if childReads {
		c, o = p[0], p[1]
	}
	if err := unix.SetNonblock(o, true); err != nil {
		unix.Close(c)
		unix.Close(o)
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(c), "pipe"), os.NewFile(uintptr(o), "pipe"), nil
}
