// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"

	gssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// closer says who ended a connection.
type closer string

const (
	byClient   closer = "client"
	byServer   closer = "server"
	byNetwork  closer = "network"  // it broke: a reset, a timeout
	byProtocol closer = "protocol" // neither side wanted to: they could not agree or understand each other
)

// leftEarly is the reason for which nobody needs to look into the log: a port check.
const leftEarly = "closed before a login"

// finish closes the connection; the first caller's reason goes to the log.
func (c *conn) finish(by closer, why string) {
	c.mu.Lock()
	if c.reason == "" {
		c.by, c.reason = by, why
	}
	c.stopGrace()
	c.mu.Unlock()
	c.Conn.Close()
}

// handshakeFailed notes why there was no login; the connection's own log line tells it.
func (s *server) handshakeFailed(failed net.Conn, err error) {
	for _, c := range s.snapshot() {
		// The library wraps the connection; the address is the very same one.
		if c.RemoteAddr() != failed.RemoteAddr() {
			continue
		}
		by, why := classify(err)
		var auth *ssh.ServerAuthError
		switch {
		case errors.As(err, &auth):
			by, why = byClient, "gave up after failed logins"
			if n := len(auth.Errors); n == 0 || errors.Is(auth.Errors[n-1], ssh.ErrNoAuth) {
				why = leftEarly
			} else if last := auth.Errors[n-1].Error(); strings.HasPrefix(last, disconnect) {
				by, why = byServer, "MaxAuthTries: too many failed logins"
			}
		case by == byClient:
			why = leftEarly
		}
		c.finish(by, why)
		return
	}
}

// disconnect begins the text of a disconnect message, sent or received; its type is not exported.
const disconnect = "ssh: disconnect, reason "

// cause says who ended a connection that we did not end.
func (c *conn) cause() (closer, string) {
	if c.ctx == nil { // it did not get as far as the SSH library
		return byClient, leftEarly
	}
	sc, ok := c.ctx.Value(gssh.ContextKeyConn).(*ssh.ServerConn)
	if !ok {
		return byClient, leftEarly
	}
	return classify(sc.Wait())
}

// classify reads the error with which the SSH library gave the connection up.
func classify(err error) (closer, string) {
	var errno unix.Errno
	switch text := err.Error(); {
	case errors.Is(err, io.EOF):
		return byClient, "closed the connection"
	case strings.HasPrefix(text, disconnect):
		return byClient, "disconnect, reason " + short(strings.TrimPrefix(text, disconnect))
	case errors.Is(err, net.ErrClosed):
		return byServer, "closed the connection"
	case errors.As(err, &errno):
		return byNetwork, errno.Error()
	default:
		return byProtocol, text
	}
}

func (c *conn) logEnd() {
	c.mu.Lock()
	defer c.mu.Unlock()
	level := slog.LevelInfo
	if c.reason == leftEarly {
		level = slog.LevelDebug
	}
	c.log.Log(context.Background(), level, "connection closed", "by", c.by, "why", c.reason, "authenticated", c.login != nil,
		"seconds", int(time.Since(c.opened).Seconds()), "bytes_in", c.in.Load(), "bytes_out", c.out.Load())
}
