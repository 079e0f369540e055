// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The child modes: the first argument of a re-executed program, and only there.
const (
	modeInit  = "jail-init"  // the long-lived parent of all sessions
	modeEnter = "jail-enter" // chroot level: go inside, then execute one of the following
	modeSFTP  = "jail-sftp"  // serve SFTP on stdin and stdout
	modeProbe = "jail-probe" // try to break out, report on stdout

	modeSockets = "jail-sockets" // make Unix sockets for the gateway, which is on stdin
)

// The kinds that never come from a client.
const (
	kindProbe   Kind = SFTP + 1 + iota // the break-out attempts
	kindSockets                        // the maker of Unix sockets
)

// socketFD is init's end of the pair.
const socketFD = 3

// exitInternal is the status of a child mode that could not do its work (sshd's own 254/255 habit).
const exitInternal = 254

// ChildMain must be the first call of main (and of TestMain). In a child mode of this package it does the child's work
// and never returns; otherwise it does nothing.
func ChildMain() {
	if len(os.Args) < 2 {
		return
	}
	var run func() error
	switch os.Args[1] {
	case modeInit:
		run = initMain
	case modeLend:
		run = lendMain
	case modeEnter:
		run = enterMain
	case modeSFTP:
		run = sftpMain
	case modeProbe:
		run = probeMain
	case modeSockets:
		run = socketsMain
	default:
		return
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
		os.Exit(exitInternal)
	}
	os.Exit(0)
}

// supervisor is the jail's init: PID 1 of the namespaces level, a subreaper in the others. It lives outside the sessions'
// reach: with more capabilities than they have, so they cannot trace it, and not dumpable.
type supervisor struct {
	conn   *conn
	level  Level
	root   *os.File // what sessions see as "/"
	pts    *os.File // the devpts instance that terminals come from
	lent   *os.File // chroot: the mount namespace that root belongs to, if it is a lent one
	self   *os.File // this program, read-only, where the sessions have a /proc to find it in
	caps   uint64   // the bounding set of the sessions
	dev    uint64   // of the image root
	ino    uint64
	env    []string
	files  rootFiles
	forked chan struct{} // holds one: there may be a child

	// onMain hands work to the main thread, the only one whose bounding set is cut: capabilities belong to threads.
	onMain chan func()

	reaping  sync.Mutex // held until the gateway has been told of all that was reaped; taken before mu
	mu       sync.Mutex // held from before a fork until the pid is registered, and while reaping
	running  map[int]child
	pids     map[uint32]int
	stopping bool

	stopOnce sync.Once
	hurry    chan struct{}
	stopped  chan struct{}
	result   stoppedMsg
}

// child is a command that has not been reaped.
type child struct {
	id  uint32
	tty *os.File // its terminal, nil without one: closing that does nothing
}

func initMain() error {
	runtime.LockOSThread()
	if t, err := unix.GetsockoptInt(socketFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		return errors.New("internal mode, started by sshd only")
	}
	if err := cleanProcess(); err != nil {
		return err
	}
	unix.CloseOnExec(socketFD)
	c, err := newConn(os.NewFile(socketFD, "gateway"))
	if err != nil {
		return err
	}
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)

	s := &supervisor{
		conn: c, onMain: make(chan func()), running: make(map[int]child), pids: make(map[uint32]int),
		hurry: make(chan struct{}), stopped: make(chan struct{}), forked: make(chan struct{}, 1),
	}
	p, err := c.recv()
	if err != nil {
		return fmt.Errorf("read setup: %w", err)
	}
	notes, err := s.setup(p)
	if err != nil {
		return c.send(opFailed, p.id, &failedMsg{text: err.Error()})
	}
	if err := c.send(opReady, p.id, &readyMsg{caps: s.caps, notes: notes}); err != nil {
		return err
	}
	go s.reap(chld)
	go s.await()
	done := make(chan error, 1)
	go func() { done <- s.serve() }()
	for {
		select {
		case f := <-s.onMain:
			f()
		case err := <-done:
			return err
		}
	}
}

// cleanProcess makes init a neutral parent: its children inherit the signal mask and dispositions, niceness, umask and
// descriptors of a freshly booted machine, whatever the gateway was started with.
func cleanProcess() error {
	// Every signal gets a handler, so that execve resets it to its default even if it was ignored, and so that none but
	// SIGKILL ends init. Nobody reads the channel: the runtime drops what does not fit.
	signal.Notify(make(chan os.Signal, 1))
	if err := catchLibcSignals(); err != nil {
		return err
	}
	if err := cleanThread(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid dumps: %w", err)
	}
	if err := AdoptOrphans(); err != nil {
		return err
	}
	if err := guardLimits(); err != nil {
		return err
	}
	unix.Umask(0o022)
	os.Clearenv()
	// An OOM immunity meant for the gateway must not reach the sessions.
	if b, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil && strings.HasPrefix(string(b), "-") {
		if err := os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0); err != nil {
			return fmt.Errorf("reset oom_score_adj: %w", err)
		}
	}
	// A session keyring of its own; kernels without keys do without.
	_, _ = unix.KeyctlJoinSessionKeyring("")
	return closeInherited(socketFD)
}

// guardLimits keeps root in a jail from changing this process's resource limits: without CAP_SYS_RESOURCE prlimit(2)
// takes a target whose real, effective and saved ids are all the caller's. What this process executes has them again.
func guardLimits() error {
	const nogroup = 65534
	if err := syscall.Setresgid(-1, -1, nogroup); err != nil {
		return fmt.Errorf("set saved group: %w", err)
	}
	return nil
}

// cleanThread resets what threads have of their own: signal mask and niceness.
func cleanThread() error {
	var none unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &none, nil); err != nil {
		return fmt.Errorf("clear signal mask: %w", err)
	}
	// The system call returns 20-nice (getpriority(2), "C library/kernel differences").
	if n, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil && n > 20 {
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 0); err != nil {
			return fmt.Errorf("reset niceness: %w", err)
		}
	}
	return nil
}

// closeInherited closes every descriptor above last that this program inherited. Those it opened itself are
// close-on-exec, those it inherited cannot be.
func closeInherited(last int) error {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open files: %w", err)
	}
	for _, e := range d {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= last {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	return nil
}

// setup builds the confinement the first packet asks for.
func (s *supervisor) setup(p packet) (notes []string, err error) {
	var m setupMsg
	if p.op != opSetup || len(p.files) > 1 && len(p.files) != lentFiles {
		p.closeFiles()
		return nil, fmt.Errorf("%w: %d instead of setup", errMalformed, p.op)
	}
	if err := m.decode(p.body); err != nil {
		p.closeFiles()
		return nil, err
	}
	if m.attach {
		err := attach(&m, p.files)
		p.closeFiles()
		if err != nil {
			return nil, err
		}
	}
	s.level, s.env, s.dev, s.ino = m.level, m.env, m.dev, m.ino
	switch s.level {
	case Namespaces:
		if s.self, err = readonlyBinary(); err != nil {
			return nil, err
		}
		if notes, err = enterRoot(&m, false); err != nil {
			return nil, err
		}
		if s.root, err = os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return nil, err
		}
	case Chroot:
		if len(p.files) == lentFiles {
			s.root, s.lent, s.self = p.files[0], p.files[1], p.files[2]
			err = sameRoot(s.root, &m)
		} else {
			s.root, err = openRoot(&m)
		}
		if err != nil {
			return nil, err
		}
		// The working directory is what SysProcAttr.Chroot "." refers to; init itself stays outside.
		if err := unix.Fchdir(int(s.root.Fd())); err != nil {
			return nil, fmt.Errorf("enter image root: %w", err)
		}
	case Plain:
		if m.legacy {
			if err := mountLegacy(&m); err != nil {
				return nil, err
			}
		}
		if s.root, err = os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return nil, err
		}
		s.caps = boundingSet()
		return notes, unix.Chdir("/")
	}
	if s.level == Namespaces || s.lent != nil {
		if s.pts, _, err = at(s.root, "dev/pts"); err != nil {
			return nil, err
		}
	}
	keep := uint64(sessionCaps)
	if s.level == Chroot {
		keep &^= 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL
		if m.noNodes {
			keep &^= 1 << unix.CAP_MKNOD
		}
	}
	if s.caps, err = boundThread(keep); err != nil {
		return nil, err
	}
	if s.level != Chroot {
		return notes, filterThread(runtime.GOARCH, 0)
	}
	user, err := shieldUser()
	if err != nil {
		return nil, err
	}
	if err := Shield(); err != nil {
		return nil, err
	}
	return notes, sealThread(runtime.GOARCH, user)
}

// reap collects every child that ends: commands and whatever was orphaned inside the jail.
func (s *supervisor) reap(chld <-chan os.Signal) {
	for range chld {
		s.reapNow()
	}
}

// await is reap without the way of a signal through the runtime, which takes a fifth of a millisecond of every command. It
// ends when the jail is being stopped: those who hunt a chain of short lives then need the processor more.
func (s *supervisor) await() {
	for range s.forked {
		for {
			err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT|unix.WALL, nil)
			if err == nil {
				s.reapNow()
				if s.isStopping() {
					return
				}
			} else if !errors.Is(err, unix.EINTR) {
				break // no child is left: until the next one
			}
		}
	}
}

func (s *supervisor) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// reapNow collects what has ended and reports whether init has no child at all any more. Since orphans become its
// children, that proves that nothing is left of the jail, however short-lived: a look at /proc does not. By then the
// gateway has been told of every end, whoever reaped it: once the jail counts as stopped it listens no more.
func (s *supervisor) reapNow() (childless bool) {
	s.reaping.Lock()
	defer s.reaping.Unlock()
	type end struct {
		id uint32
		ws unix.WaitStatus
	}
	var ends []end
	s.mu.Lock()
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG|unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			childless = errors.Is(err, unix.ECHILD)
			break
		}
		if c, ok := s.running[pid]; ok {
			delete(s.running, pid)
			delete(s.pids, c.id)
			c.tty.Close()
			ends = append(ends, end{c.id, ws})
		}
	}
	s.mu.Unlock()
	for _, e := range ends {
		m := exitedMsg{}
		if e.ws.Signaled() {
			m.signal, m.core = uint32(e.ws.Signal()), e.ws.CoreDump()
		} else {
			m.code = uint32(e.ws.ExitStatus())
		}
		s.answer(opExited, e.id, &m)
	}
	return childless
}

// answer sends m; a gateway that cannot be written to is gone, which serve notices.
func (s *supervisor) answer(o op, id uint32, m message, files ...*os.File) {
	if err := s.conn.send(o, id, m, files...); err != nil {
		s.conn.close()
	}
}

func (s *supervisor) refuse(id uint32, err error) {
	s.answer(opFailed, id, &failedMsg{text: err.Error()})
}

// contain turns a panic into the refusal of the one request that met it: the other sessions end with this process.
func (s *supervisor) contain(id uint32) {
	if p := recover(); p != nil {
		fmt.Fprintf(os.Stderr, "panic in request %d: %v\n%s", id, p, debug.Stack())
		s.refuse(id, fmt.Errorf("internal error: %v", p))
	}
}

// serve handles requests until the gateway closes the socket, then ends everything in the jail.
func (s *supervisor) serve() error {
	err := s.requests()
	s.stop(0)
	// What is left would be nobody's once init is gone: go on for as long as it takes.
	for left := s.result.left; len(left) > 0; {
		_, left = s.herd().end(0, nil)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func (s *supervisor) requests() error {
	for {
		p, err := s.conn.recv()
		if err != nil {
			return err
		}
		if err := s.handle(p); err != nil {
			return err
		}
	}
}

// handle starts what p asks for. Nothing here may block for long: one request must not hold up the others.
func (s *supervisor) handle(p packet) error {
	switch p.op {
	case opSpawn:
		var m spawnMsg
		if err := m.decode(p.body); err != nil {
			p.closeFiles()
			return err
		}
		go s.spawn(p.id, &m, p.files)
		return nil
	case opSignal:
		var m numberMsg
		defer p.closeFiles()
		if err := m.decode(p.body); err != nil {
			return err
		}
		if m.n < 1 || m.n > 64 {
			return fmt.Errorf("%w: signal %d", errMalformed, m.n)
		}
		s.signal(p.id, unix.Signal(m.n))
		return nil
	case opExists:
		var m stringMsg
		defer p.closeFiles()
		if err := m.decode(p.body); err != nil {
			return err
		}
		go func() {
			defer s.contain(p.id)
			ok, err := regularInRoot(s.root, m.s)
			if err != nil {
				s.refuse(p.id, err)
				return
			}
			var n numberMsg
			if ok {
				n.n = 1
			}
			s.answer(opExists, p.id, &n)
		}()
		return nil
	case opStop:
		var m numberMsg
		defer p.closeFiles()
		if err := m.decode(p.body); err != nil {
			return err
		}
		grace := time.Duration(min(m.n, 1<<40)) * time.Millisecond
		go func() {
			s.stop(grace)
			s.answer(opStopped, p.id, &s.result)
		}()
		return nil
	}
	p.closeFiles()
	return fmt.Errorf("%w: unexpected operation %d", errMalformed, p.op)
}

// signal signals the process group of a command that has not been reaped: its pid cannot belong to anybody else.
func (s *supervisor) signal(id uint32, sig unix.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pid, ok := s.pids[id]; ok {
		unix.Kill(-pid, sig)
	}
}

// stop refuses new commands and ends all processes. The first call does it, the others wait for it; one with no grace
// ends the first one's.
func (s *supervisor) stop(grace time.Duration) {
	s.mu.Lock()
	first := !s.stopping
	s.stopping = true
	s.mu.Unlock()
	if grace == 0 {
		s.stopOnce.Do(func() { close(s.hurry) })
	}
	if first {
		s.result.killed, s.result.left = s.herd().end(grace, s.hurry)
		close(s.stopped)
	}
	<-s.stopped
}

func (s *supervisor) herd() herd { return herd{list: s.alive, strike: s.strike, gone: s.reapNow} }

// alive lists every process of the jail but init.
func (s *supervisor) alive() ([]procInfo, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	var found []procInfo
	switch s.level {
	case Namespaces:
		found = all
	case Chroot:
		// A process rooted in the image belongs to the jail wherever it was started.
		found = append(rootedAt(all, s.dev, s.ino), descendants(all, self)...)
	case Plain:
		found = descendants(all, self)
	}
	return living(found, self), nil
}

// strike kills without looking closely. PID 1 of a namespace can kill all others in it in one blow, forks and all.
func (s *supervisor) strike() {
	if s.level == Namespaces && os.Getpid() == 1 {
		unix.Kill(-1, unix.SIGKILL)
		return
	}
	killDescendants(os.Getpid())
}
