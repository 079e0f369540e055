// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// session is one channel of type "session" (RFC 4254, section 6). Its requests are handled
// one after the other on one goroutine; what another goroutine touches is below mu.
type session struct {
	c     *conn
	sc    ssh.Conn
	login *login
	ch    ssh.Channel
	log   *slog.Logger

	tty      *jail.TTY // asked for with pty-req
	env      []string  // accepted env requests
	envBytes int
	started  bool
	forced   bool // by command= or ForceCommand: signals are refused, as in sshd
	subsys   bool // a subsystem was asked for
	signals  chan unix.Signal

	events  chan struct{} // from the pumps
	out     *screen       // the channel's standard output
	id      uint64        // on its connection
	opened  time.Time
	traffic traffic

	recording *recording // of the terminal; nil: none

	mu          sync.Mutex
	proc        process
	kind        string     // of the command
	command     string     // its text, cut; never logged
	interactive bool       // a shell on a terminal: somebody looks at it
	files       []*os.File // our ends; closed when the client is gone
	pumps       []*pump
	gone        bool // the client closed the channel
	over        bool // the command has ended
	outlived    bool // in that order
}

// process is a command in the jail, *jail.Process.
type process interface {
	PTY() *os.File
	PID() int
	Resize(cols, rows, xpixel, ypixel uint32) error
	Signal(unix.Signal) error
	Wait() jail.Exit
}

// screen serialises writers to the standard output of a channel: the command's output and
// notices of our own. The SSH library forbids concurrent writes.
type screen struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *screen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.w == nil {
		return 0, io.ErrClosedPipe
	}
	return s.w.Write(b)
}

// close makes later writes fail, and waits for one that is under way.
func (s *screen) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.w = nil
}

func (s *server) serveSession(c *conn, sc *ssh.ServerConn, nc ssh.NewChannel) {
	refuse := func(reason ssh.RejectionReason, why string) {
		c.log.Info("session refused", "why", why)
		nc.Reject(reason, why)
	}
	l, ok := sc.Permissions.ExtraData[loginKey{}].(*login)
	if !ok {
		refuse(ssh.Prohibited, "this connection has not logged in")
		return
	}
	if why := s.stopping(); why != "" {
		refuse(ssh.Prohibited, why)
		return
	}
	ss := &session{
		c: c, sc: sc, login: l, id: c.ids.Add(1), opened: time.Now(),
		events:  make(chan struct{}, 1),
		signals: make(chan unix.Signal, 16),
	}
	ss.log = c.log.With("session", ss.id)
	ss.traffic.touch()
	if reason, err := c.acquire(ss); err != nil {
		refuse(reason, err.Error())
		return
	}
	defer ss.clientGone()
	ch, reqs, err := nc.Accept()
	if err != nil {
		return
	}
	ss.ch, ss.out = ch, &screen{w: ss.traffic.writer(ch)}
	for req := range reqs {
		ok, then := ss.request(req.Type, req.Payload)
		// A reply that cannot be sent changes nothing: the command has been started, and a
		// client may well be gone by now.
		req.Reply(ok, nil)
		if then != nil {
			then()
		}
	}
}

// request handles one channel request; then, if not nil, runs after the reply has been sent.
func (ss *session) request(typ string, payload []byte) (ok bool, then func()) {
	var err error
	switch typ {
	case "pty-req":
		err = ss.requestPTY(payload)
	case "window-change":
		err = ss.requestResize(payload)
	case "env":
		err = ss.requestEnv(payload)
	case "shell":
		then, err = ss.start(jail.Shell, "")
	case "exec":
		var command string
		if command, err = parseString(payload); err == nil {
			then, err = ss.start(jail.Exec, command)
		}
	case "subsystem":
		var name string
		if name, err = parseString(payload); err == nil {
			then, err = ss.startSubsystem(name)
		}
	case "signal":
		err = ss.requestSignal(payload)
	case "eow@openssh.com":
		ss.stopOutput()
	case "auth-agent-req@openssh.com":
		err = ss.requestAgent()
	case "x11-req":
		err = errors.New("X11Forwarding no: this server does not forward X11")
	default:
		err = errors.New("not available")
	}
	if err != nil {
		level := slog.LevelDebug
		if typ == "exec" || typ == "shell" || typ == "subsystem" {
			level = slog.LevelWarn
		}
		ss.log.Log(context.Background(), level, "request refused", "type", short(typ), "err", err)
	}
	return err == nil, then
}

func (ss *session) requestPTY(payload []byte) error {
	switch {
	case ss.started:
		return errors.New("the command is already running")
	case ss.tty != nil:
		return errors.New("the session has a terminal already")
	case !ss.login.key.PTY:
		return errors.New("the key's options forbid a terminal")
	case !ss.c.set.PermitTTY:
		return errors.New("PermitTTY no")
	}
	tty, err := parsePTY(payload)
	if err != nil {
		return err
	}
	ss.tty = tty
	return nil
}

// requestResize keeps the latest size until there is a terminal to give it to.
func (ss *session) requestResize(payload []byte) error {
	w, err := parseWindow(payload)
	if err != nil {
		return err
	}
	if ss.tty == nil {
		return errors.New("no terminal")
	}
	ss.tty.Cols, ss.tty.Rows, ss.tty.XPixel, ss.tty.YPixel = w.Cols, w.Rows, w.XPixel, w.YPixel
	ss.recording.resize(w.Cols, w.Rows)
	if p := ss.process(); p != nil {
		return p.Resize(w.Cols, w.Rows, w.XPixel, w.YPixel)
	}
	return nil
}

func (ss *session) requestEnv(payload []byte) error {
	if ss.started {
		return errors.New("the command is already running")
	}
	if len(ss.env) >= maxEnv || ss.envBytes+len(payload) > maxEnvBytes {
		return errors.New("too many variables")
	}
	v, err := parseEnv(payload, ss.c.set.AcceptEnv)
	if err != nil {
		return err
	}
	ss.env = append(ss.env, v)
	ss.envBytes += len(v)
	return nil
}

// requestSignal hands the signal to a goroutine of its own; when the client sends them
// faster than they can be delivered, the surplus is dropped.
func (ss *session) requestSignal(payload []byte) error {
	name, err := parseString(payload)
	if err != nil {
		return err
	}
	sig, ok := signals[name]
	switch {
	case !ok:
		return fmt.Errorf("unknown signal %s", quoteShort(name))
	case ss.process() == nil:
		return errors.New("no command is running")
	case ss.forced:
		return errors.New("signals are refused to a forced command")
	}
	select {
	case ss.signals <- sig:
		return nil
	default:
		return errors.New("too many signals")
	}
}

func (ss *session) process() process {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.proc
}

func (ss *session) startSubsystem(name string) (func(), error) {
	command, ok := subsystem(ss.c.set, name)
	if !ok {
		return nil, fmt.Errorf("no subsystem %s", quoteShort(name))
	}
	ss.subsys = true
	return ss.start(jail.Exec, command)
}

// start runs the session's one command and returns what to do after the reply.
func (ss *session) start(kind jail.Kind, command string) (func(), error) {
	if ss.started {
		return nil, errors.New("the session has a command already")
	}
	set := ss.c.set
	req := jail.Request{Kind: kind, Command: command, TTY: ss.tty}
	var original string
	switch key := ss.login.key; {
	case set.ForceCommand != "":
		ss.forced, original, req.Kind, req.Command = true, command, jail.Exec, set.ForceCommand
	case key.Forced:
		ss.forced, original, req.Kind, req.Command = true, command, jail.Exec, key.Command
	}
	if args, ok := sftpArguments(req.Command); ok && req.Kind == jail.Exec {
		if ss.forced && !ss.subsys {
			ss.started = true
			return ss.sftpOnly, nil
		}
		req.Kind, req.Command, req.TTY = jail.SFTP, args, nil
	}
	req.Env, req.SetEnv = ss.environment(original)
	ss.started = true // whatever happens: a channel has one command
	return ss.spawn(req)
}

// environment is what the session adds to the jail's own variables: what the client and its key ask for, and what the
// server says, which is the stronger (SetEnv in sshd_config(5)).
func (ss *session) environment(original string) (asked, set []string) {
	conf := ss.c.set
	asked = slices.Clone(ss.env)
	for _, e := range ss.login.key.Environment {
		name, _, _ := strings.Cut(e, "=")
		if p := conf.PermitUserEnv; p == "" || strings.EqualFold(p, "yes") || !strings.EqualFold(p, "no") && sshdconf.MatchList(name, p) {
			asked = append(asked, e)
		}
	}
	peer, peerPort, _ := net.SplitHostPort(ss.c.RemoteAddr().String())
	local, localPort, _ := net.SplitHostPort(ss.c.LocalAddr().String())
	set = append(slices.Clone(conf.SetEnv),
		fmt.Sprintf("SSH_CLIENT=%s %s %s", peer, peerPort, localPort),
		fmt.Sprintf("SSH_CONNECTION=%s %s %s %s", peer, peerPort, local, localPort))
	if sock := ss.c.forwards.agentSocket(); sock != "" {
		set = append(set, "SSH_AUTH_SOCK="+sock)
	}
	if original != "" {
		set = append(set, "SSH_ORIGINAL_COMMAND="+original)
	}
	return asked, set
}

func (ss *session) spawn(req jail.Request) (func(), error) {
	var theirs, ours []*os.File
	closeAll := func(files []*os.File) {
		for _, f := range files {
			f.Close()
		}
	}
	if req.TTY == nil {
		for i, to := range []**os.File{&req.Stdin, &req.Stdout, &req.Stderr} {
			t, o, err := pipe(i == 0)
			if err != nil {
				closeAll(theirs)
				closeAll(ours)
				return nil, err
			}
			*to, theirs, ours = t, append(theirs, t), append(ours, o)
		}
	}
	proc, err := ss.c.srv.jail.Spawn(req)
	closeAll(theirs)
	if err != nil {
		closeAll(ours)
		if errors.Is(err, jail.ErrTooLong) {
			return ss.tooLong, nil
		}
		return nil, err
	}
	kind := kinds[req.Kind]
	ss.c.srv.seen.sessions.WithLabelValues(kind).Inc()
	ss.log = ss.log.With("kind", kind, "pty", req.TTY != nil)
	ss.log.Info("session started", "forced", ss.forced, "command_bytes", len(req.Command))
	if p, ok := ss.c.Conn.(*promptAcks); ok {
		p.settled()
	}
	var stdin *os.File
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var running process = proc
	ss.proc, ss.kind, ss.command = proc, kind, cut(req.Command, shownCommand)
	ss.interactive = req.Kind == jail.Shell && req.TTY != nil
	if req.TTY != nil {
		stdin = proc.PTY()
		ss.files = []*os.File{stdin}
		ss.record(req.TTY)
		ss.pumps = []*pump{newPump(stdin, ss.out, ss.events)}
		last := ss.c.srv.last.enter(time.Now(), peerAddr(ss.c.RemoteAddr()).String())
		if ss.interactive {
			ss.pumps[0].first = greeting(ss.c.set, last, proc.Greeting())
		}
	} else if req.Kind == jail.SFTP {
		stdin = ours[0]
		ss.files = ours[:2]
		ss.pumps = []*pump{newPump(ours[1], ss.out, ss.events)}
		running = ss.logSFTP(proc, ours[2])
	} else {
		stdin = ours[0]
		ss.files = ours
		ss.record(nil)
		ss.pumps = []*pump{
			newPump(ours[1], ss.out, ss.events),
			newPump(ours[2], ss.recording.tee(ss.traffic.writer(ss.ch.Stderr()), 1), ss.events),
		}
	}
	return func() { ss.run(running, stdin, req.TTY != nil) }, nil
}

// sftpOnly ends a session that asked for a command or a shell where internal-sftp is forced: the two sides would wait for
// each other for ever, and scp -O does. The words are sshd's.
func (ss *session) sftpOnly() { ss.endWith("This service allows sftp connections only.", 1) }

// exitNotExecutable is what a shell returns when a command cannot be executed (POSIX sh).
const exitNotExecutable = 126

// tooLong ends a session whose command the kernel cannot execute, as a shell would. To
// refuse the request would look like a broken connection to Ansible.
func (ss *session) tooLong() {
	ss.endWith("sshd: the command is too long to be executed", exitNotExecutable)
}

// endWith ends a session that has no command.
func (ss *session) endWith(message string, code int) {
	fmt.Fprintln(ss.ch.Stderr(), message)
	ss.sendExit(jail.Exit{Code: code})
	ss.ch.CloseWrite()
	ss.c.release(ss)
	ss.ch.Close()
}

// run starts the goroutines of a running command.
func (ss *session) run(proc process, stdin *os.File, tty bool) {
	for _, p := range ss.pumps {
		go func() {
			defer ss.c.guard("session output")
			p.run()
		}()
	}
	go func() {
		defer ss.c.guard("session input")
		feed(stdin, ss.traffic.reader(ss.ch), func() {
			if ss.c.isOpenSSH() { // the command does not read any more: no need to send
				ss.ch.SendRequest("eow@openssh.com", false, nil)
			}
		})
		if !tty {
			stdin.Close() // the client's EOF; a terminal has none
		}
	}()
	ended := make(chan struct{})
	go func() {
		defer ss.c.guard("signal")
		for {
			select {
			case sig := <-ss.signals:
				if err := proc.Signal(sig); err != nil {
					ss.log.Debug("signal", "err", err)
				}
			case <-ended:
				return
			}
		}
	}()
	go func() {
		defer ss.c.guard("session end")
		defer close(ended)
		ss.wait(proc, stdin, tty)
	}()
}

// ptyLinger is how long the terminal of an ended command may stay open. The kernel hangs it
// up when the session leader ends, so only a process that opened it anew can hold it.
const ptyLinger = time.Second

// wait sees the command to its end and the channel after it.
func (ss *session) wait(proc process, stdin *os.File, tty bool) {
	began := time.Now()
	exit := proc.Wait()
	ss.c.awaitProofs()
	ss.commandEnded()
	if !tty {
		stdin.Close()
	}
	for !ss.all((*pump).drained) {
		<-ss.events
	}
	told := false
	if !ss.all(func(p *pump) bool { return p.done.Load() }) {
		// A background process holds the output open: the command's own end is told now.
		told = true
		ss.sendExit(exit)
		ss.log.Debug("command ended, its output is still held open")
		var limit <-chan time.Time
		if tty {
			limit = time.After(ptyLinger)
		}
		for !ss.all(func(p *pump) bool { return p.done.Load() }) {
			select {
			case <-ss.events:
			case <-limit:
				stdin.Close()
				limit = nil
			}
		}
	}
	ss.out.close()
	// Before EOF: a client that has sent its own EOF closes the channel as soon as it gets
	// ours, and nothing can be sent on a channel that the other side has closed.
	if !told {
		ss.sendExit(exit)
	}
	ss.ch.CloseWrite()
	took := time.Since(began)
	if ss.kind == kinds[jail.Exec] {
		ss.c.srv.seen.duration.Observe(took.Seconds())
	}
	attrs := []any{"code", exit.Code, "bytes_in", ss.traffic.in.Load(), "bytes_out", ss.traffic.out.Load(), "ms", took.Milliseconds()}
	if exit.Signal != 0 {
		attrs = append(attrs, "signal", signalName(exit.Signal), "core", exit.Core)
	}
	if exit.Err != nil {
		attrs = append(attrs, "err", exit.Err)
	}
	ss.recording.stop()
	// The slot is free before the client can know that the channel is closed.
	ss.c.release(ss)
	ss.ch.Close()
	ss.log.Info("session ended", attrs...)
}

// sendExit tells how the command ended. When that could not be observed nothing is sent:
// a made-up code would be taken for the command's.
func (ss *session) sendExit(e jail.Exit) {
	if e.Err != nil {
		return
	}
	typ, payload := exitRequest(e)
	ss.ch.SendRequest(typ, false, payload)
}

func (ss *session) all(is func(*pump) bool) bool {
	for _, p := range ss.pumps {
		if !is(p) {
			return false
		}
	}
	return true
}

// stopOutput closes our end of the command's standard output: the client reads no more
// (eow@openssh.com, PROTOCOL of OpenSSH, section 2.1).
func (ss *session) stopOutput() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if len(ss.files) == 3 {
		ss.files[1].Close()
	}
}

// clientGone runs when the channel is closed from the other side or with its connection.
// A terminal is hung up; without one the pipes close and the command runs on.
func (ss *session) clientGone() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.gone = true
	for _, f := range ss.files {
		f.Close()
	}
	if ss.proc != nil && !ss.over && len(ss.files) > 1 {
		ss.outlived = true
		ss.c.srv.outlived.Add(1)
	}
	ss.c.release(ss)
}

// commandEnded runs when the command has ended.
func (ss *session) commandEnded() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.over = true
	if ss.outlived {
		ss.c.srv.outlived.Add(-1)
	}
}

// hangUp ends a session on a terminal from our side, with a line that says why.
func (ss *session) hangUp(why string) {
	ss.mu.Lock()
	tty := len(ss.files) == 1
	files := ss.files
	ss.mu.Unlock()
	if !tty {
		return
	}
	told := make(chan struct{})
	go func() {
		defer ss.c.guard("hang-up")
		defer close(told)
		fmt.Fprintf(ss.out, "\r\n%s\r\n", why)
	}()
	select {
	case <-told:
	case <-time.After(100 * time.Millisecond): // the client does not read; it must not hold the job up
	}
	files[0].Close()
}

// busy reports whether the session runs something that is not a person's shell.
func (ss *session) busy() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.proc != nil && !ss.interactive
}
