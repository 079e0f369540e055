// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/authkeys"
)

// Limits of one connection.
const (
	maxForwarded = 1024 // forwarded connections, both directions
	maxListeners = 128  // requests to listen in force
)

// drainTime is how long what a lost client has sent may take to get where it should go.
const drainTime = 5 * time.Second

// forwards is what one connection forwards.
type forwards struct {
	c *conn

	mu        sync.Mutex
	closed    bool
	listeners []*forwarded
	open      int // forwarded connections

	agentMu sync.Mutex // held while the socket is made
	agent   string     // its path
}

// The directions of forwarding, as sshd_config(5) names them.
const (
	localForward  = "local"  // the client connects to something here
	remoteForward = "remote" // something here connects to the client
)

// unixPort is what a Unix socket has for a port; its path is the host.
const unixPort = -1

// permitForward says why sshd would not permit a forwarding (serverloop.c, channels.c). For
// Unix sockets, too, it asks AllowTcpForwarding and the lists of permitted connections; a
// list for listening never matters to them.
func (c *conn) permitForward(k *authkeys.Key, way, host string, port int) error {
	set := c.set
	switch {
	case set.DisableForwarding:
		return errors.New("DisableForwarding yes")
	case !k.PortForwarding:
		return errors.New("the key's options forbid forwarding")
	case set.TCPForwarding != "yes" && set.TCPForwarding != way:
		return fmt.Errorf("AllowTcpForwarding %s", set.TCPForwarding)
	case port == unixPort && set.StreamLocal != "yes" && set.StreamLocal != way:
		return fmt.Errorf("AllowStreamLocalForwarding %s", set.StreamLocal)
	case way == localForward && !k.PermitOpen.Open(host, port):
		return errors.New("not in permitopen= of the key")
	case way == localForward && !set.PermitOpen.Open(host, port):
		return errors.New("not in PermitOpen")
	case way == remoteForward && port != unixPort && !k.PermitListen.Listen(host, port):
		return errors.New("not in permitlisten= of the key")
	case way == remoteForward && port != unixPort && !set.PermitListen.Listen(host, port):
		return errors.New("not in PermitListen")
	}
	return nil
}

var (
	errForwarded = fmt.Errorf("this connection has %d forwarded connections open", maxForwarded)
	errListeners = fmt.Errorf("this connection listens for %d forwardings", maxListeners)
)

// take takes a slot for a forwarded connection; put gives it back.
func (f *forwards) take() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open >= maxForwarded {
		return false
	}
	f.open++
	return true
}

func (f *forwards) put() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open--
}

// count returns how many connections are forwarded, and how many forwardings listen.
func (f *forwards) count() (open, listening int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open, len(f.listeners)
}

// close ends the listeners; forwarded connections end with their channels.
func (f *forwards) close() {
	f.mu.Lock()
	f.closed = true
	list := f.listeners
	f.listeners = nil
	f.mu.Unlock()
	for _, l := range list {
		l.close()
	}
}

// contain turns a panic into a log line and the end of one forwarding.
func (f *forwards) contain(what string, undo func()) {
	if p := recover(); p != nil {
		f.c.logPanic(what, p)
		undo()
	}
}

// duplex is a connection whose directions end one by one: TCP or a Unix socket.
type duplex interface {
	net.Conn
	CloseWrite() error
}

// relay copies both ways. The end of one direction is passed on while the other goes on;
// when both are over, or the client closes the channel, everything is closed. What the
// client sent before is still delivered.
func (f *forwards) relay(log *slog.Logger, ch ssh.Channel, reqs <-chan *ssh.Request, nc duplex) {
	log.Info("forward opened")
	began := time.Now()
	closeBoth := func() {
		nc.Close()
		ch.Close()
	}
	defer closeBoth()
	done := make(chan struct{})
	var watch, copies sync.WaitGroup
	watch.Go(func() {
		defer f.contain("forward requests", closeBoth)
		ssh.DiscardRequests(reqs) // until the channel is closed
		nc.SetReadDeadline(time.Unix(1, 0))
		select {
		case <-done:
		case <-f.c.gone:
			nc.SetWriteDeadline(time.Now().Add(drainTime))
		}
	})
	var in, out int64
	copies.Go(func() {
		defer f.contain("forward", closeBoth)
		in, _ = io.Copy(nc, ch)
		nc.CloseWrite()
	})
	copies.Go(func() {
		defer f.contain("forward", closeBoth)
		out, _ = io.Copy(ch, nc)
		ch.CloseWrite()
	})
	copies.Wait()
	close(done)
	closeBoth()
	watch.Wait()
	log.Info("forward ended", "bytes_in", in, "bytes_out", out, "ms", time.Since(began).Milliseconds())
}
