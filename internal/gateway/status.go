// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// DefaultRunDir holds the status socket: in the container, outside every image and volume. It is a socket with a name,
// because the jail keeps its sessions from names outside the image, and in its chroot level from nothing else: an
// abstract socket or a port they could reach.
const DefaultRunDir = "/run/ims-buildenv"

const (
	socketSuffix  = ".sock"
	statusTimeout = 5 * time.Second
	maxStatus     = 64 << 20 // an answer, as the client takes it
	maxRequest    = 4 << 10

	// shownCommand is how much of a command status shows, in bytes. The log has none of it: logs are collected and
	// kept, while status is for whoever could look at the process list as well.
	shownCommand = 256
)

// statusRequest is what the socket takes, as JSON; it answers with a statusReply.
type statusRequest struct {
	Close string `json:"close,omitempty"` // a connection, "3", or a session, "3.1"; empty: list
}

type statusReply struct {
	Error  string  `json:"error,omitempty"`
	Status *status `json:"status,omitempty"`
}

// status is what `sshd status --json` prints. Idle and age are in seconds.
type status struct {
	Job         string       `json:"job"`
	PID         int          `json:"pid"`
	Jail        string       `json:"jail"`
	Closing     string       `json:"closing,omitempty"` // why nobody may log in any more
	Connections []connStatus `json:"connections"`
}

type connStatus struct {
	ID            string          `json:"id"`
	Peer          string          `json:"peer"`
	Client        string          `json:"client,omitempty"` // its version string
	Authenticated bool            `json:"authenticated"`
	Key           string          `json:"key,omitempty"`
	Comment       string          `json:"comment,omitempty"`
	Since         time.Time       `json:"since"`
	Age           int64           `json:"age"`
	Idle          int64           `json:"idle"` // since one of its sessions moved data or ended
	In            int64           `json:"bytes_in"`
	Out           int64           `json:"bytes_out"`
	Forwarded     int             `json:"forwarded"` // connections, and
	Listening     int             `json:"listening"` // sockets for them
	Sessions      []sessionStatus `json:"sessions"`
}

type sessionStatus struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind,omitempty"` // empty: no command yet
	TTY     bool      `json:"tty"`
	PID     int       `json:"pid,omitempty"`     // as the jail's init sees it
	Command string    `json:"command,omitempty"` // of exec
	Since   time.Time `json:"since"`
	Age     int64     `json:"age"`
	Idle    int64     `json:"idle"`
	In      int64     `json:"bytes_in"`
	Out     int64     `json:"bytes_out"`
}

func (s *server) status(job string) *status {
	st := &status{Job: job, PID: os.Getpid(), Jail: s.jail.Level().String(), Closing: s.closing(), Connections: []connStatus{}}
	conns := s.snapshot()
	slices.SortFunc(conns, func(a, b *conn) int { return cmp.Compare(a.id, b.id) })
	for _, c := range conns {
		st.Connections = append(st.Connections, c.describe())
	}
	return st
}

func (c *conn) name() string { return strconv.FormatUint(c.id, 10) }

func (c *conn) describe() connStatus {
	d := connStatus{
		ID: c.name(), Peer: c.RemoteAddr().String(), Since: c.opened.UTC(), Age: int64(time.Since(c.opened).Seconds()),
		In: c.in.Load(), Out: c.out.Load(), Sessions: []sessionStatus{},
	}
	d.Forwarded, d.Listening = c.forwards.count()
	c.mu.Lock()
	last := c.opened
	if c.lastEnd.After(last) {
		last = c.lastEnd
	}
	d.Client = c.client
	if c.login != nil {
		d.Authenticated, d.Key, d.Comment = true, c.login.key.Fingerprint(), c.login.key.Comment
	}
	c.mu.Unlock()
	sessions := c.sessionList()
	slices.SortFunc(sessions, func(a, b *session) int { return cmp.Compare(a.id, b.id) })
	for _, ss := range sessions {
		d.Sessions = append(d.Sessions, ss.describe())
		if t := time.Unix(0, ss.traffic.last.Load()); t.After(last) {
			last = t
		}
	}
	d.Idle = int64(time.Since(last).Seconds())
	return d
}

func (ss *session) name() string { return ss.c.name() + "." + strconv.FormatUint(ss.id, 10) }

func (ss *session) describe() sessionStatus {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	d := sessionStatus{
		ID: ss.name(), Kind: ss.kind, Command: ss.command, Since: ss.opened.UTC(),
		Age: int64(time.Since(ss.opened).Seconds()), Idle: int64(time.Since(time.Unix(0, ss.traffic.last.Load())).Seconds()),
		In: ss.traffic.in.Load(), Out: ss.traffic.out.Load(),
	}
	if ss.proc != nil {
		d.TTY, d.PID = ss.proc.PTY() != nil, ss.proc.PID()
	}
	return d
}

// closeByName ends a connection, or one session of it.
func (s *server) closeByName(name string) error {
	const why = "sshd status --close"
	for _, c := range s.snapshot() {
		if c.name() == name {
			c.end(why)
			return nil
		}
		for _, ss := range c.sessionList() {
			if ss.name() == name {
				return ss.forceClose(why)
			}
		}
	}
	return fmt.Errorf("no connection or session %s: it may have ended meanwhile", strconv.Quote(cut(name, 64)))
}

// forceClose hangs the session up: its terminal, its command with SIGHUP as when a terminal goes away, and the channel.
func (ss *session) forceClose(why string) error {
	p := ss.process()
	if p == nil {
		return fmt.Errorf("session %s has no command yet; close its connection %s", ss.name(), ss.c.name())
	}
	ss.log.Info("session closed", "by", byServer, "why", why)
	ss.hangUp("This session was closed by an administrator.")
	if err := p.Signal(unix.SIGHUP); err != nil {
		ss.log.Debug("signal", "err", err)
	}
	if err := ss.ch.Close(); !errors.Is(err, io.EOF) { // its command has ended, and it with that
		return err
	}
	return nil
}

// listenStatus makes the socket of a job, root's alone, in dir, root's alone. What an earlier gateway left in its place
// is replaced.
func listenStatus(dir, job string) (*net.UnixListener, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() || !st.IsDir() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("status socket: %s is not a directory for root alone (%s); remove it", dir, st.Mode())
	}
	path := filepath.Join(dir, socketName(job))
	if c, err := net.DialTimeout("unix", path, statusTimeout); err == nil {
		c.Close()
		return nil, fmt.Errorf("status socket: another gateway answers at %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("status socket: %w", err)
	}
	return l, nil
}

func socketName(job string) string {
	if job == "" {
		job = "job"
	}
	return strings.ReplaceAll(job, "/", "_") + socketSuffix
}

// serveStatus answers until l is closed, one at a time: a question takes a moment, and a silent asker its timeout.
func (s *server) serveStatus(l net.Listener, job string) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Warn("status socket", "err", err)
			time.Sleep(time.Second)
			continue
		}
		if err := s.answerStatus(c, job); err != nil {
			s.log.Debug("status socket", "err", err)
		}
		c.Close()
	}
}

func (s *server) answerStatus(c net.Conn, job string) error {
	defer func() {
		if p := recover(); p != nil { // the sessions are not to suffer from somebody who looks at them
			s.log.Error("panic in status socket", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	if err := c.SetDeadline(time.Now().Add(statusTimeout)); err != nil {
		return err
	}
	var req statusRequest
	if err := json.NewDecoder(io.LimitReader(c, maxRequest)).Decode(&req); err != nil {
		return err
	}
	var reply statusReply
	if req.Close != "" {
		if err := s.closeByName(req.Close); err != nil {
			reply.Error = err.Error()
		}
	} else {
		reply.Status = s.status(job)
	}
	return json.NewEncoder(c).Encode(reply)
}

// cut shortens s to at most most bytes, between characters.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most] + "…"
}
