// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// packet is one received message. Whoever takes it owns its files.
type packet struct {
	op    op
	id    uint32
	body  []byte
	files []*os.File
}

func (p packet) closeFiles() {
	for _, f := range p.files {
		f.Close()
	}
}

// conn is one end of the socket pair. send may be called from any goroutine, recv from one.
type conn struct {
	mu  sync.Mutex // one writer at a time
	c   *net.UnixConn
	buf []byte
	oob []byte

	// limit bounds how long a send waits for room, 0: for ever; meanwhile stuck is called again and again.
	limit time.Duration
	stuck func()
}

// stuckEvery is how often stuck is called.
const stuckEvery = 100 * time.Millisecond

// errStuck is what a send returns after its limit.
var errStuck = errors.New("the other end takes nothing: it is stopped or hangs")

// message is a body that knows its wire form.
type message interface {
	encode(*encoder)
	decode([]byte) error
}

// newConn takes f over.
func newConn(f *os.File) (*conn, error) {
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("use socket: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, errors.New("use socket: not a unix socket")
	}
	if err := uc.SetWriteBuffer(maxPacket); err != nil {
		uc.Close()
		return nil, fmt.Errorf("size socket: %w", err)
	}
	// One byte more than a packet may have tells a long one from a cut one; one descriptor more likewise.
	return &conn{c: uc, buf: make([]byte, maxPacket+1), oob: make([]byte, unix.CmsgSpace(4*(maxFiles+1)))}, nil
}

func (c *conn) close() { c.c.Close() }

// send writes one message. The files stay open.
func (c *conn) send(o op, id uint32, m message, files ...*os.File) error {
	e := newMessage(o, id)
	m.encode(e)
	if len(e.b) > maxPacket {
		return fmt.Errorf("send %d bytes: above %d: %w", len(e.b), maxPacket, unix.E2BIG)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fd, err := rawFD(f)
			if err != nil {
				return fmt.Errorf("send %s: %w", f.Name(), err)
			}
			fds[i] = fd
		}
		oob = unix.UnixRights(fds...)
	}
	until := time.Now().Add(c.limit) // those who wait for the lock wait no longer than those who wait for room
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.write(e.b, oob, until); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	for _, f := range files {
		runtime.KeepAlive(f)
	}
	return nil
}

// write writes one packet, whole or not at all; the caller holds mu.
func (c *conn) write(b, oob []byte, until time.Time) error {
	for {
		if c.limit > 0 {
			try := time.Now().Add(stuckEvery)
			if try.After(until) {
				try = until
			}
			if err := c.c.SetWriteDeadline(try); err != nil {
				return err
			}
		}
		_, _, err := c.c.WriteMsgUnix(b, oob, nil)
		if c.limit == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		c.stuck()
		if !time.Now().Before(until) {
			return fmt.Errorf("%w, for %s", errStuck, c.limit)
		}
	}
}

// recv reads one message; io.EOF when the other end is gone.
func (c *conn) recv() (packet, error) {
	n, oobn, flags, _, err := c.c.ReadMsgUnix(c.buf, c.oob)
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.EOF) {
			return packet{}, io.EOF
		}
		return packet{}, err
	}
	if n == 0 && oobn == 0 {
		return packet{}, io.EOF
	}
	p := packet{files: receivedFiles(c.oob[:oobn])}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > maxPacket || len(p.files) > maxFiles {
		p.closeFiles()
		return packet{}, fmt.Errorf("%w: too long", errMalformed)
	}
	if n < headerLen {
		p.closeFiles()
		return packet{}, fmt.Errorf("%w: %d bytes", errMalformed, n)
	}
	p.op, p.id = op(c.buf[0]), binary.BigEndian.Uint32(c.buf[1:])
	p.body = append([]byte(nil), c.buf[headerLen:n]...)
	return p, nil
}

// receivedFiles takes every descriptor out of oob; they are close-on-exec (MSG_CMSG_CLOEXEC, which net sets).
func receivedFiles(oob []byte) []*os.File {
	var files []*os.File
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

// rawFD returns f's descriptor without switching it to blocking mode, as f.Fd would.
func rawFD(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if err := rc.Control(func(n uintptr) { fd = int(n) }); err != nil {
		return -1, err
	}
	return fd, nil
}
