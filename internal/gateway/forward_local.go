// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// target is what a client wants to be connected to.
type target struct {
	host string // the path of a Unix socket
	port int    // or unixPort
}

func (t target) String() string {
	if t.port == unixPort {
		return short(t.host)
	}
	return net.JoinHostPort(short(t.host), strconv.Itoa(t.port))
}

// parseTarget reads what comes with the opening of a direct-tcpip channel (RFC 4254, section
// 7.2) or a direct-streamlocal one (PROTOCOL of OpenSSH, section 2.4). What it says of the
// originator nobody can check.
func parseTarget(typ string, data []byte) (t target, err error) {
	if typ == "direct-tcpip" {
		var m struct {
			Host       string
			Port       uint32
			Originator string
			From       uint32
		}
		if err := ssh.Unmarshal(data, &m); err != nil {
			return t, err
		}
		if m.Port > 0xffff {
			return t, errors.New("no such port")
		}
		t = target{m.Host, int(m.Port)}
	} else {
		var m struct {
			Path     string
			Reserved string
			More     uint32
		}
		if err := ssh.Unmarshal(data, &m); err != nil {
			return t, err
		}
		t = target{m.Path, unixPort}
	}
	if strings.IndexByte(t.host, 0) >= 0 {
		return t, errors.New("NUL byte")
	}
	return t, nil
}

// serveDirect connects the client to a port or a Unix socket (ssh -L, -D, -W).
func (s *server) serveDirect(c *conn, sc *ssh.ServerConn, nc ssh.NewChannel) {
	f := c.forwards
	log := c.log.With("forward", c.ids.Add(1), "type", nc.ChannelType())
	answered := false
	refuse := func(reason ssh.RejectionReason, why string) {
		answered = true
		log.Info("forward refused", "why", why)
		nc.Reject(reason, why)
	}
	defer f.contain("forward", func() {
		if !answered {
			nc.Reject(ssh.ConnectionFailed, "internal error")
		}
	})
	t, err := parseTarget(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		refuse(ssh.Prohibited, err.Error())
		return
	}
	log = log.With("to", t.String())
	l, ok := sc.Permissions.ExtraData[loginKey{}].(*login)
	if !ok {
		refuse(ssh.Prohibited, "this connection has not logged in")
		return
	}
	if err := c.permitForward(l.key, localForward, t.host, t.port); err != nil {
		refuse(ssh.Prohibited, err.Error())
		return
	}
	if why := s.stopping(); why != "" {
		refuse(ssh.Prohibited, why)
		return
	}
	if !f.take() {
		refuse(ssh.ResourceShortage, errForwarded.Error())
		return
	}
	defer f.put()
	to, err := f.dial(t)
	if err != nil {
		refuse(ssh.ConnectionFailed, connectError(err))
		return
	}
	defer to.Close()
	answered = true
	ch, reqs, err := nc.Accept()
	if err != nil {
		return
	}
	f.relay(log, ch, reqs, to)
}

// dial connects to a port in the pod's network, which is the sessions' own, or to a Unix
// socket where the sessions see it.
func (f *forwards) dial(t target) (duplex, error) {
	if t.port == unixPort {
		return f.c.srv.jail.Dial(t.host)
	}
	if t.host == "" { // Go would take it for the loopback
		return nil, &net.DNSError{IsNotFound: true}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-f.c.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	nc, err := new(net.Dialer).DialContext(ctx, tcpNetwork(f.c.set), net.JoinHostPort(t.host, strconv.Itoa(t.port)))
	if err != nil {
		return nil, err
	}
	return nc.(*net.TCPConn), nil
}

// tcpNetwork is AddressFamily in Go's terms.
func tcpNetwork(set *sshdconf.Settings) string {
	switch set.AddressFamily {
	case "inet":
		return "tcp4"
	case "inet6":
		return "tcp6"
	}
	return "tcp"
}

// connectError words err as the C library does, and sshd with it.
func connectError(err error) string {
	var dns *net.DNSError
	var errno syscall.Errno
	text := err.Error()
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return "Name or service not known"
	case errors.As(err, &dns):
		return "Temporary failure in name resolution"
	case errors.As(err, &errno):
		text = errno.Error()
	}
	return strings.ToUpper(text[:1]) + text[1:]
}
