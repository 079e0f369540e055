// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"io"
	"log/slog"
	"net"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// Who is closed beyond MaxStartups: a flood of connections that do nothing must not push
// out a login that is under way.
func TestStartupsVictim(t *testing.T) {
	s := &server{set: &sshdconf.Settings{MaxStartups: 3}, conns: map[*conn]struct{}{}, log: slog.New(slog.DiscardHandler)}
	s.seen = newMetrics(s)
	open := func() (*conn, net.Conn) {
		ours, theirs := net.Pipe()
		c := newConn(s, ours)
		s.add(c)
		return c, theirs
	}
	closed := func(c *conn) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.reason != ""
	}
	login, peer := open()
	login.in.Store(1000)
	login.offered.Store(true)
	talks, _ := open()
	talks.in.Store(1000)
	var idle []*conn
	for i := range 10 {
		c, _ := open()
		idle = append(idle, c)
		if i > 0 && (!closed(idle[i-1]) || closed(c)) {
			t.Fatalf("newcomer %d: %t, the one before: %t", i, closed(c), closed(idle[i-1]))
		}
	}
	if closed(login) || closed(talks) {
		t.Error("a connection that had got further was closed")
	}
	idle[9].in.Store(1000)
	if open(); !closed(talks) || closed(idle[9]) || closed(login) {
		t.Error("of two that got equally far the older one is to go")
	}
	login.end("the end")
	if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
}
