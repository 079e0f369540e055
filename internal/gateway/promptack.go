// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// promptAcks acknowledges each segment of a login at once. OpenSSH's client leaves Nagle's algorithm on until its first
// session starts, so each message that it sends before an answer waits for the acknowledgement of the one before; the
// kernel holds those of a connection that is answered (TCP_QUICKACK in tcp(7)) back for up to 40 ms.
type promptAcks struct {
	*net.TCPConn
	raw syscall.RawConn // nil: the socket is not ours to set
	off atomic.Bool
}

func newPromptAcks(t *net.TCPConn) *promptAcks {
	raw, err := t.SyscallConn()
	if err != nil {
		raw = nil
	}
	return &promptAcks{TCPConn: t, raw: raw}
}

// Read reads; the setting lasts until the kernel changes its mind, so each read asks anew.
func (p *promptAcks) Read(b []byte) (int, error) {
	n, err := p.TCPConn.Read(b)
	if p.raw != nil && !p.off.Load() {
		// Without it a login takes longer: nothing to tell anybody.
		_ = p.raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) })
	}
	return n, err
}

// settled ends that: the first session has begun, and what follows may be much.
func (p *promptAcks) settled() { p.off.Store(true) }
