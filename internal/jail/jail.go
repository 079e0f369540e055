// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Level is how strongly the sessions of a job are confined.
type Level int

// The levels, weakest confinement first.
const (
	Auto       Level = iota // the strongest of Namespaces and Chroot the container allows
	Plain                   // no confinement: the container's own root and shell
	Chroot                  // chroot, without the capabilities that lead out again
	Namespaces              // own mount, PID, IPC and UTS namespace below the image root
)

func (l Level) String() string {
	switch l {
	case Auto:
		return "auto"
	case Plain:
		return "plain"
	case Chroot:
		return "chroot"
	case Namespaces:
		return "namespaces"
	}
	return fmt.Sprintf("level(%d)", int(l))
}

// Kind is what a request starts.
type Kind uint8

// The kinds of requests.
const (
	Shell Kind = iota + 1 // the user's login shell
	Exec                  // $SHELL -c command
	// SFTP is an SFTP server on stdin and stdout. It writes a line of JSON for each operation to stderr, a
	// sftpserver.Record, and text when it fails; it exits with 0 at the end of its input.
	SFTP
)

// Config describes the jail of one job.
type Config struct {
	Root string // the image root, an existing directory; an absolute path
	// Mount, if not nil, is a mount attached nowhere (fsmount(2)) whose top is the image root. The sessions see it at
	// Root, in a mount namespace of their own, and nobody else does. The caller closes it after Start; the mount ends
	// with Stop.
	Mount *os.File
	Level Level    // Auto, or the one level that is wanted
	DKMS  bool     // the job asked for /proc, /sys and /dev
	Env   []string // KEY=value, part of every shell's environment
	Log   *slog.Logger
}

// Request is one command to start inside the jail.
type Request struct {
	Kind    Kind
	Command string   // Exec: given to the shell as it is; SFTP: arguments, see sftpserver.ParseOptions
	Env     []string // KEY=value, weaker than the image's /etc/environment
	SetEnv  []string // KEY=value, stronger; weaker than Config.Env and the session's own HOME, USER, …
	TTY     *TTY     // nil: no terminal, the three files are used; ignored for SFTP
	// Stdin, Stdout and Stderr become the command's; nil means /dev/null. Spawn does not close them, and switches what
	// they refer to to blocking mode. Not used with TTY.
	Stdin, Stdout, Stderr *os.File
}

// TTY describes the terminal of a session (RFC 4254, sections 6.2 and 8).
type TTY struct {
	Term                       string
	Cols, Rows, XPixel, YPixel uint32
	Modes                      map[uint8]uint32 // opcode -> argument
}

// Greeting is what the image has for a user who logs in on a terminal.
type Greeting struct {
	Motd   string // /etc/motd, at most its first 64 KiB; empty without one
	Hushed bool   // .hushlogin in root's home: no greeting is wanted
}

// Exit says how a command ended.
type Exit struct {
	Code   int         // 0..255 when Signal is 0
	Signal unix.Signal // the signal that killed it, or 0
	Core   bool        // it dumped core
	Err    error       // set when the end could not be observed, because the jail itself ended
}

var (
	// ErrStopped is what requests get after Stop.
	ErrStopped = errors.New("the jail was stopped")

	// ErrTooLong is what Spawn returns for a command and environment that no program could be executed with.
	ErrTooLong = fmt.Errorf("command and environment: %w", unix.E2BIG)
)

// Jail is a running jail. Its methods may be called from any goroutine.
type Jail struct {
	log   *slog.Logger
	level Level
	caps  uint64 // the sessions' bounding set
	dir   *imageDir
	conn  *conn
	proc  *os.Process // init
	trace *tail       // what init said last on stderr
	socks sockets

	done chan struct{} // closed when init has been reaped

	// killWait is how long init may take beyond the grace that Stop gives.
	killWait time.Duration

	mu       sync.Mutex
	lastID   uint32
	pending  map[uint32]chan packet // requests without an answer
	running  map[uint32]*Process    // from before spawn is sent until exited
	stopping bool
	err      error // why it ended

	stopOnce sync.Once
	killed   []string
	stopErr  error
	orphans  bool // Stop: init did not end its descendants itself
	stopDone chan struct{}
}

// Level returns the level in force: never Auto.
func (j *Jail) Level() Level { return j.level }

// Done is closed when the jail has ended, by Stop or because its init died.
func (j *Jail) Done() <-chan struct{} { return j.done }

// Err says why the jail ended; nil before Done is closed and after an orderly Stop.
func (j *Jail) Err() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	select {
	case <-j.done:
		return j.err
	default:
		return nil
	}
}

// Process is a command running in the jail.
type Process struct {
	j    *Jail
	id   uint32
	pid  int
	pty  *os.File
	hi   Greeting
	done chan struct{}
	exit Exit // valid once done is closed
}

// Spawn starts a command. A shell that the image lacks is no error of Spawn: as with sshd, the command then ends with 127
// (or 126: not executable) and a message on its stderr.
func (j *Jail) Spawn(req Request) (*Process, error) {
	m := spawnMsg{kind: req.Kind, command: req.Command, env: req.Env, setEnv: req.SetEnv}
	var files []*os.File
	if req.TTY != nil && req.Kind != SFTP {
		m.tty = req.TTY
	} else {
		for i, f := range []*os.File{req.Stdin, req.Stdout, req.Stderr} {
			if f != nil {
				m.stdio |= 1 << i
				files = append(files, f)
			}
		}
	}
	p := &Process{j: j, done: make(chan struct{})}
	answer, err := j.request(opSpawn, &m, p, files...)
	if errors.Is(err, unix.E2BIG) {
		return nil, ErrTooLong
	}
	if err != nil {
		return nil, fmt.Errorf("start session: %w", err)
	}
	var s startedMsg
	if err := s.decode(answer.body); err != nil || answer.op != opStarted || (m.tty != nil) != (len(answer.files) == 1) {
		answer.closeFiles()
		j.kill(fmt.Errorf("answer to spawn: %w", errMalformed))
		return nil, errMalformed
	}
	p.pid, p.hi = int(s.pid), s.greeting
	if m.tty != nil {
		if p.pty, err = pollable(answer.files[0]); err != nil {
			return nil, fmt.Errorf("use terminal: %w", err)
		}
	}
	return p, nil
}

// pollable puts f into non-blocking mode, so that Close ends a Read of it.
func pollable(f *os.File) (*os.File, error) {
	defer f.Close()
	fd, err := rawFD(f)
	if err != nil {
		return nil, err
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(dup, true); err != nil {
		unix.Close(dup)
		return nil, err
	}
	return os.NewFile(uintptr(dup), "terminal"), nil
}

// Exists reports whether path is a regular file (after following links) as the sessions see it: with what they mounted
// in the namespaces level, below the image root in the chroot level, in the container in the plain one.
func (j *Jail) Exists(path string) (bool, error) {
	answer, err := j.request(opExists, &stringMsg{s: path}, nil)
	if err != nil {
		return false, fmt.Errorf("look for %s in the jail: %w", path, err)
	}
	defer answer.closeFiles()
	var n numberMsg
	if err := n.decode(answer.body); err != nil || answer.op != opExists {
		j.kill(fmt.Errorf("answer to exists: %w", errMalformed))
		return false, errMalformed
	}
	return n.n == 1, nil
}

// request sends one request and waits for its answer. p, if any, is registered under the request's id.
func (j *Jail) request(o op, m message, p *Process, files ...*os.File) (packet, error) {
	c := make(chan packet, 1)
	j.mu.Lock()
	if j.stopping && o != opStop {
		j.mu.Unlock()
		return packet{}, ErrStopped
	}
	j.lastID++
	id := j.lastID
	j.pending[id] = c
	if p != nil {
		p.id = id
		j.running[id] = p
	}
	j.mu.Unlock()
	forget := func() {
		j.mu.Lock()
		delete(j.pending, id)
		delete(j.running, id)
		j.mu.Unlock()
	}
	if err := j.conn.send(o, id, m, files...); err != nil {
		forget()
		return packet{}, err
	}
	answer, err := j.await(c)
	if err != nil {
		forget()
		return packet{}, err
	}
	if answer.op == opFailed {
		forget()
		answer.closeFiles()
		var f failedMsg
		if err := f.decode(answer.body); err != nil {
			return packet{}, err
		}
		return packet{}, errors.New(f.text)
	}
	return answer, nil
}

// await waits for init's answer. Where root in the jail can signal init it may have stopped it, which nobody else does.
func (j *Jail) await(c <-chan packet) (packet, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case answer := <-c:
			return answer, nil
		case <-tick.C:
			_ = j.proc.Signal(unix.SIGCONT)
		case <-j.done:
			select {
			case answer := <-c:
				return answer, nil
			default:
				return packet{}, j.endError()
			}
		}
	}
}

// endError is why there is no jail any more.
func (j *Jail) endError() error {
	if err := j.Err(); err != nil {
		return err
	}
	return ErrStopped
}

// receive hands init's messages to those waiting for them, until the socket closes. It never blocks on anybody.
func (j *Jail) receive() {
	for {
		p, err := j.conn.recv()
		if err != nil {
			j.kill(nil)
			return
		}
		if err := j.dispatch(p); err != nil {
			j.kill(err)
			return
		}
	}
}

func (j *Jail) dispatch(p packet) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if p.op == opExited {
		p.closeFiles()
		var m exitedMsg
		if err := m.decode(p.body); err != nil {
			return err
		}
		proc, ok := j.running[p.id]
		if !ok {
			return fmt.Errorf("%w: end of unknown command %d", errMalformed, p.id)
		}
		delete(j.running, p.id)
		proc.finish(Exit{Code: int(m.code), Signal: unix.Signal(m.signal), Core: m.core})
		return nil
	}
	c, ok := j.pending[p.id]
	if !ok {
		p.closeFiles()
		return fmt.Errorf("%w: answer %d to nothing", errMalformed, p.op)
	}
	delete(j.pending, p.id)
	c <- p
	return nil
}

func (p *Process) finish(e Exit) {
	p.exit = e
	close(p.done)
}

// PID is the process id as init sees it: in the namespaces level, inside the jail. 0 if the shell could not be executed.
func (p *Process) PID() int { return p.pid }

// PTY returns the master side of the terminal, nil without one. The caller closes it, and thereby hangs up. Reading ends
// with EIO once nobody in the jail has the terminal open.
func (p *Process) PTY() *os.File { return p.pty }

// Greeting is for a Shell on a terminal; nothing is shown by the jail itself.
func (p *Process) Greeting() Greeting { return p.hi }

// Resize sets the terminal's window size.
func (p *Process) Resize(cols, rows, xpixel, ypixel uint32) error {
	if p.pty == nil {
		return errors.New("set window size: no terminal")
	}
	rc, err := p.pty.SyscallConn()
	if err != nil {
		return fmt.Errorf("set window size: %w", err)
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = setWindow(int(fd), cols, rows, xpixel, ypixel) }); err != nil {
		return fmt.Errorf("set window size: %w", err)
	}
	return inner
}

// Signal signals the command's process group. After its end it does nothing.
func (p *Process) Signal(sig unix.Signal) error {
	if sig < 1 || sig > 64 {
		return fmt.Errorf("signal command: %w", unix.EINVAL)
	}
	return p.j.conn.send(opSignal, p.id, &numberMsg{n: uint64(sig)})
}

// Wait blocks until the command has ended. It may be called from several goroutines.
func (p *Process) Wait() Exit {
	<-p.done
	return p.exit
}
