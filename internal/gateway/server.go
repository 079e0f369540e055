// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	gssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// server is one running SSH server over one jail.
type server struct {
	set  *sshdconf.Settings
	jail *jail.Jail
	log  *slog.Logger
	ssh  *gssh.Server
	algs algorithms
	seen *metrics

	hostKeys []ssh.Signer // all of them, without certificates

	recorder *recordings // of terminals; nil: none
	last     lastLogin
	root     string // the image root

	ids      atomic.Uint64
	outlived atomic.Int64 // commands that run on although their client has gone
	mu       sync.Mutex
	conns    map[*conn]struct{}
	unauth   []*conn // in order of arrival
	ending   string  // why nobody may log in any more; empty while open
	ended    string  // why no session may start any more
}

// connKey finds the *conn in a gliderlabs context.
type connKey struct{}

func newServer(set *sshdconf.Settings, j *jail.Jail, keys []ssh.Signer, version string, log *slog.Logger) (*server, error) {
	s := &server{set: set, jail: j, log: log, conns: map[*conn]struct{}{}}
	s.seen = newMetrics(s)
	var err error
	if s.algs, err = chooseAlgorithms(set); err != nil {
		return nil, err
	}
	s.ssh = &gssh.Server{
		Version: softwareVersion + " ims-buildenv_" + version,
		ConnCallback: func(ctx gssh.Context, nc net.Conn) net.Conn {
			ctx.SetValue(connKey{}, nc)
			nc.(*conn).ctx = ctx
			return nc
		},
		ServerConfigCallback: func(ctx gssh.Context) *ssh.ServerConfig {
			return s.serverConfig(ctx.Value(connKey{}).(*conn))
		},
		ConnectionFailedCallback: s.handshakeFailed,
		ChannelHandlers: map[string]gssh.ChannelHandler{
			"session":                        s.channel(s.serveSession),
			"direct-tcpip":                   s.channel(s.serveDirect),
			"direct-streamlocal@openssh.com": s.channel(s.serveDirect),
			"default": s.channel(func(c *conn, _ *ssh.ServerConn, nc ssh.NewChannel) {
				c.log.Info("channel refused", "type", short(nc.ChannelType()), "why", "unknown type")
				nc.Reject(ssh.UnknownChannelType, "this server has no channels of type "+quoteShort(nc.ChannelType()))
			}),
		},
		RequestHandlers: map[string]gssh.RequestHandler{
			"tcpip-forward":                          s.forwarding((*forwards).listenTCP),
			"cancel-tcpip-forward":                   s.forwarding((*forwards).cancelTCP),
			"streamlocal-forward@openssh.com":        s.forwarding((*forwards).listenUnix),
			"cancel-streamlocal-forward@openssh.com": s.forwarding((*forwards).cancelUnix),
			"no-more-sessions@openssh.com": s.global(func(c *conn, _ *ssh.Request) bool {
				c.noMoreSessions()
				return true
			}),
			"hostkeys-prove-00@openssh.com": s.proveHostKeys,
			"default": s.global(func(c *conn, req *ssh.Request) bool {
				// keepalive@openssh.com arrives here: any answer keeps the client content, and
				// OpenSSH's sshd answers it with a failure too.
				c.log.Debug("global request refused", "type", short(req.Type))
				return false
			}),
		},
	}
	s.hostKeys = plainKeys(keys)
	offered, err := offerHostKeys(keys, set.HostKeyAlgorithms)
	if err != nil {
		return nil, err
	}
	for _, k := range offered {
		s.ssh.AddHostKey(k)
	}
	return s, nil
}

// serve accepts connections until l is closed.
func (s *server) serve(l net.Listener) error {
	var delay time.Duration
	for {
		nc, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Out of descriptors or memory, or a peer that went away: none of it is a reason
			// to stop listening, because a client that is refused may give its job up.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Warn("accept", "err", err, "retry_in", delay)
			time.Sleep(delay)
			continue
		}
		delay = 0
		s.awaitRoom()
		go s.handle(s.enter(nc))
	}
}

// enter takes a connection in; those that come later do not get ahead of it.
func (s *server) enter(nc net.Conn) *conn {
	if t, ok := nc.(*net.TCPConn); ok {
		// Long enough to survive a network outage of some minutes.
		t.SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: s.set.TCPKeepAlive, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 9,
		})
		nc = newPromptAcks(t)
	}
	c := newConn(s, nc)
	s.add(c)
	return c
}

func (s *server) handle(c *conn) {
	defer c.guard("the end of a connection")
	defer s.remove(c)
	defer c.guard("connection")
	c.ciphers = s.algs.ciphers
	if s.set.Ciphers == "" && fastAES() {
		c.ciphers = c.greet()
	}
	s.ssh.HandleConn(c)
}

// stay is how long a connection has at least before another one pushes it out. A client has things to do between its
// connect and its first words: OpenSSH's reads the user's keys.
const stay = 200 * time.Millisecond

// awaitRoom returns when there is room within MaxStartups, or when whoever has to go has had its time. A flood comes in no
// faster than that; until then it waits in the kernel.
func (s *server) awaitRoom() {
	for {
		wait := time.Duration(0)
		s.mu.Lock()
		if len(s.unauth) >= s.set.MaxStartups && len(s.unauth) > 0 {
			wait = stay - time.Since(victim(s.unauth).opened)
		}
		s.mu.Unlock()
		if wait <= 0 {
			return
		}
		time.Sleep(min(wait, lookEvery)) // somebody may leave
	}
}

// victim is who has got least far with its login, and of these the oldest.
func victim(unauth []*conn) *conn {
	return slices.MinFunc(unauth, func(a, b *conn) int { return a.progress() - b.progress() })
}

// add enters a connection that has yet to authenticate. Beyond MaxStartups one of those is
// closed that has got least far with its login, of these the oldest, and never the newest:
// strangers who sit on connections, or open one after the other, cannot keep a client with
// a key out, and authenticated connections are never counted.
func (s *server) add(c *conn) {
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.unauth = append(s.unauth, c)
	var out *conn
	if old := s.unauth[:len(s.unauth)-1]; len(old) >= s.set.MaxStartups && len(old) > 0 {
		out = victim(old)
		s.forget(out)
	}
	s.mu.Unlock()
	if out != nil {
		out.end("MaxStartups: too many connections that have not logged in")
	}
	s.seen.connections.Inc()
	c.log.Debug("connection opened")
}

func (s *server) authenticated(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(c)
}

// forget drops c from the unauthenticated; the caller holds mu.
func (s *server) forget(c *conn) {
	for i, u := range s.unauth {
		if u == c {
			s.unauth = append(s.unauth[:i:i], s.unauth[i+1:]...)
			return
		}
	}
}

func (s *server) remove(c *conn) {
	c.finish(c.cause())
	close(c.gone)
	s.mu.Lock()
	delete(s.conns, c)
	s.forget(c)
	s.seen.closed(c)
	s.mu.Unlock()
	c.forwards.close()
	c.logEnd()
}

// snapshot returns the connections there are.
func (s *server) snapshot() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	cs := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		cs = append(cs, c)
	}
	return cs
}

// closing says why logins are refused; empty while they are not.
func (s *server) closing() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending
}

// stopping says why sessions are refused on connections that are there already.
func (s *server) stopping() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// channel adapts a handler to gliderlabs' signature; a panic ends this channel's handler
// and nothing else.
func (s *server) channel(h func(*conn, *ssh.ServerConn, ssh.NewChannel)) gssh.ChannelHandler {
	return func(_ *gssh.Server, sc *ssh.ServerConn, nc ssh.NewChannel, ctx gssh.Context) {
		c := ctx.Value(connKey{}).(*conn)
		defer c.guard("channel " + quoteShort(nc.ChannelType()))
		c.announceHostKeys(sc)
		h(c, sc, nc)
	}
}

func (s *server) global(h func(*conn, *ssh.Request) bool) gssh.RequestHandler {
	return func(ctx gssh.Context, _ *gssh.Server, req *ssh.Request) (ok bool, _ []byte) {
		c := ctx.Value(connKey{}).(*conn)
		defer c.guard("global request")
		c.announceHostKeys(ctx.Value(gssh.ContextKeyConn).(*ssh.ServerConn))
		return h(c, req), nil
	}
}

// conn is one connection; it is the net.Conn that the SSH library reads and writes.
type conn struct {
	net.Conn
	srv       *server
	set       *sshdconf.Settings // for its two ends
	algs      algorithms         // of set
	log       *slog.Logger
	id        uint64
	ctx       gssh.Context // of the SSH library, once it has the connection
	opened    time.Time
	ids       atomic.Uint64 // of its sessions
	gone      chan struct{} // closed when the connection is over
	announced sync.Once     // the host keys
	proofs    sync.RWMutex  // of host keys that are under way
	in        atomic.Int64  // bytes read from the client

	forwards *forwards
	offered  atomic.Bool // it has named a key that may log in

	// Of the first exchange, see greet; then read and written by the SSH library alone.
	reader  *bufio.Reader // what greet has looked at
	sent    []byte        // the version line the library has yet to "send"
	ciphers []string

	out atomic.Int64

	mu       sync.Mutex
	grace    *time.Timer // LoginGraceTime; nil: none
	login    *login      // set when the login is complete
	client   string      // its version string, then
	sessions map[*session]struct{}
	begun    int       // sessions it has had
	noMore   bool      // the client promised to open no more sessions
	lastEnd  time.Time // when its last session ended
	by       closer    // who closed it, and
	reason   string    // why; the first reason stays
}

func newConn(s *server, nc net.Conn) *conn {
	c := &conn{Conn: nc, srv: s, id: s.ids.Add(1), opened: time.Now(), gone: make(chan struct{}), sessions: map[*session]struct{}{}}
	c.set, c.algs = s.set.For(peerOf(nc)), s.algs
	if c.set != s.set {
		var err error
		if c.algs, err = chooseAlgorithms(c.set); err != nil { // each value was tried at the start
			s.log.Error("algorithms", "err", err)
		}
	}
	c.forwards = &forwards{c: c}
	c.log = s.log.With("conn", c.id, "peer", nc.RemoteAddr().String())
	c.mu.Lock()
	defer c.mu.Unlock()
	if d := s.set.LoginGraceTime; d > 0 {
		c.grace = time.AfterFunc(d, func() { c.end(fmt.Sprintf("LoginGraceTime: no login within %s", d)) })
	}
	return c
}

// Read is the SSH library's; it is the only reader.
func (c *conn) Read(b []byte) (int, error) {
	if c.reader != nil && c.reader.Buffered() > 0 {
		return c.reader.Read(b)
	}
	c.reader = nil
	return incoming{c}.Read(b)
}

// incoming is what arrives from the client, counted when it does: how far a login has got decides who has to go.
type incoming struct{ c *conn }

func (i incoming) Read(b []byte) (int, error) {
	n, err := i.c.Conn.Read(b)
	i.c.in.Add(int64(n))
	return n, err
}

// Write counts.
func (c *conn) Write(b []byte) (int, error) {
	if c.sent != nil {
		return len(b), c.swallow(b)
	}
	n, err := c.Conn.Write(b)
	c.out.Add(int64(n))
	return n, err
}

// SetDeadline does nothing: gliderlabs sets "no deadline" before each read and write,
// which would cost a timer operation per packet; limits here are timers of our own.
func (c *conn) SetDeadline(time.Time) error { return nil }

// end closes the connection from our side; the first caller's reason goes to the log.
func (c *conn) end(why string) { c.finish(byServer, why) }

// stopGrace ends LoginGraceTime; the caller holds mu.
func (c *conn) stopGrace() {
	if c.grace != nil {
		c.grace.Stop()
	}
}

// progress orders connections by how near they are to their login.
func (c *conn) progress() int {
	switch {
	case c.offered.Load():
		return 2
	case c.in.Load() > 0:
		return 1
	}
	return 0
}

// loggedIn records the completed login.
func (c *conn) loggedIn(l *login, client string) {
	c.mu.Lock()
	c.login, c.client = l, client
	c.stopGrace()
	c.mu.Unlock()
	c.srv.seen.logins.Inc()
	c.srv.authenticated(c)
	if every := c.set.ClientAliveInterval; every > 0 {
		go c.keepAlive(every, c.set.ClientAliveCountMax)
	}
}

func (c *conn) isOpenSSH() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Contains(c.client, "OpenSSH")
}

func (c *conn) noMoreSessions() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noMore = true
}

// keepAlive asks a client that is silent for an answer, and gives it up after more than most
// intervals without a byte (ClientAliveInterval and ClientAliveCountMax; 0: never). It begins with the
// login: ssh -N -L opens no channel for hours.
func (c *conn) keepAlive(every time.Duration, most int) {
	defer c.guard("keepalive")
	tick := time.NewTicker(every)
	defer tick.Stop()
	var seen int64
	var asking atomic.Bool // one question at a time: a peer that is gone for long must not collect them
	for silent := 0; ; {
		select {
		case <-c.gone:
			return
		case <-tick.C:
		}
		if n := c.in.Load(); n != seen {
			seen, silent = n, 0
			continue
		}
		if silent++; most > 0 && silent > most {
			c.end(fmt.Sprintf("ClientAliveCountMax: no sign of life for %s", time.Duration(silent)*every))
			return
		}
		// The SSH library has the connection a moment after the login.
		if sc, ok := c.ctx.Value(gssh.ContextKeyConn).(ssh.Conn); ok && asking.CompareAndSwap(false, true) {
			go func() {
				defer c.guard("keepalive")
				sc.SendRequest("keepalive@openssh.com", true, nil) // returns with the answer or the connection
				asking.Store(false)
			}()
		}
	}
}

// acquire takes one of the connection's session slots.
func (c *conn) acquire(ss *session) (ssh.RejectionReason, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	// The request comes right after the open of the client's one session, and the SSH library
	// delivers the two on separate ways: the session may be seen second.
	case c.noMore && c.begun > 0:
		return ssh.Prohibited, errors.New("the client asked for no more sessions on this connection")
	case len(c.sessions) >= c.set.MaxSessions:
		return ssh.ResourceShortage, fmt.Errorf("MaxSessions: this connection has %d sessions open", len(c.sessions))
	}
	c.sessions[ss] = struct{}{}
	c.begun++
	return 0, nil
}

func (c *conn) release(ss *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.sessions[ss]; ok {
		delete(c.sessions, ss)
		c.lastEnd = time.Now()
		c.srv.seen.active.Store(c.lastEnd.UnixNano())
	}
}

func (c *conn) sessionList() []*session {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := make([]*session, 0, len(c.sessions))
	for ss := range c.sessions {
		l = append(l, ss)
	}
	return l
}

// guard turns a panic into a log line and the end of this connection.
func (c *conn) guard(what string) {
	if p := recover(); p != nil {
		c.logPanic(what, p)
		c.end("internal error")
	}
}

func (c *conn) logPanic(what string, p any) {
	c.log.Error("panic in "+what, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
}

// short cuts a peer's text for the log, which quotes it.
func short(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// quoteShort makes a peer's text fit to stand in a message.
func quoteShort(s string) string { return fmt.Sprintf("%q", short(s)) }
