// SPDX-License-Identifier: Apache-2.0

package job

import (
	"net"
	"strings"
	"sync"
	"testing"
)

// gate is a TCP proxy that can stop letting bytes through to the server.
type gate struct {
	url    string
	target string
	l      net.Listener
	held   chan struct{} // closed when bytes are held back

	mu    sync.Mutex
	ready *sync.Cond
	left  int64 // bytes until it holds; below zero: no limit
	hit   bool
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

func newGate(t *testing.T, url string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{url: "http://" + l.Addr().String(), target: strings.TrimPrefix(url, "http://"), l: l,
		held: make(chan struct{}), left: -1, conns: map[net.Conn]bool{}}
	g.ready = sync.NewCond(&g.mu)
	g.wg.Go(g.accept)
	t.Cleanup(func() {
		g.close()
		g.wg.Wait()
	})
	return g
}

func (g *gate) accept() {
	for {
		client, err := g.l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", g.target)
		if err != nil {
			client.Close()
			continue
		}
		g.mu.Lock()
		g.conns[client], g.conns[server] = true, true
		g.mu.Unlock()
		g.wg.Go(func() { g.copy(server, client, true) })
		g.wg.Go(func() { g.copy(client, server, false) })
	}
}

// copy forwards one direction; only that to the server is ever held.
func (g *gate) copy(to, from net.Conn, hold bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if hold {
			g.pass(int64(n))
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass returns when n bytes may go on.
func (g *gate) pass(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.left < 0 {
		return
	}
	g.left -= min(n, g.left)
	for g.left == 0 {
		if !g.hit {
			g.hit = true
			close(g.held)
		}
		g.ready.Wait()
	}
}

// hold stops the stream after n more bytes.
func (g *gate) hold(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left = n
}

// release lets everything through again.
func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left = -1
	g.ready.Broadcast()
}

// cut ends all connections; new ones work.
func (g *gate) cut() {
	g.mu.Lock()
	for c := range g.conns {
		c.Close()
	}
	clear(g.conns)
	g.mu.Unlock()
	g.release()
}

// close ends the gate: connections are refused from now on.
func (g *gate) close() {
	g.l.Close()
	g.cut()
}
