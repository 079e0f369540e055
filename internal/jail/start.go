// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Start builds the jail, starts its init and proves the confinement. With Level Auto it takes the strongest level the
// container allows and says why if that is not Namespaces. It fails, rather than to take a weaker level, when a
// confinement was built but does not hold. ctx bounds the start only.
func Start(ctx context.Context, cfg Config) (*Jail, error) {
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("jail: %w", err)
	}
	cfg.Root = root
	if cfg.Mount != nil && cfg.Level == Auto {
		cfg.Level = Namespaces // what may mount may do that
	}
	if cfg.Level != Auto {
		j, err := establish(ctx, cfg, cfg.Level)
		if err != nil {
			return nil, fmt.Errorf("jail: level %s: %w", cfg.Level, err)
		}
		return j, nil
	}
	var reasons []string
	for _, level := range []Level{Namespaces, Chroot} {
		j, err := establish(ctx, cfg, level)
		if err == nil {
			cfg.Log.Info("jail", "level", level, "stronger", strings.Join(reasons, "; "))
			return j, nil
		}
		reasons = append(reasons, fmt.Sprintf("%s: %v", level, err))
		if errors.Is(err, errBreakout) || errors.Is(err, errImage) || ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("jail: %s", strings.Join(reasons, "; "))
}

// levelCaps are the capabilities that building a level takes.
var levelCaps = map[Level][]int{
	Namespaces: {unix.CAP_SYS_ADMIN, unix.CAP_SETPCAP},
	Chroot:     {unix.CAP_SYS_CHROOT, unix.CAP_SETPCAP},
}

// establish builds one level.
func establish(ctx context.Context, cfg Config, level Level) (_ *Jail, err error) {
	if level < Plain || level > Namespaces {
		return nil, errors.New("unknown")
	}
	missing, err := missingCaps(levelCaps[level]...)
	if err != nil {
		return nil, err
	}
	if missing != "" {
		return nil, fmt.Errorf("the container lacks %s; give it that, or do not ask for a jail", missing)
	}
	if cfg.Mount != nil && level == Chroot {
		return nil, errors.New("a root that has to be mounted takes a mount namespace")
	}
	dir, err := openImageDir(cfg.Root, cfg.Mount, cfg.Log)
	if err != nil {
		return nil, err
	}
	j := &Jail{
		log: cfg.Log, level: level, dir: dir, done: make(chan struct{}), stopDone: make(chan struct{}), killWait: killWait,
		pending: make(map[uint32]chan packet), running: make(map[uint32]*Process),
	}
	defer func() {
		if err != nil {
			if j.proc != nil {
				j.kill(err)
				<-j.done
			}
			err = errors.Join(err, dir.restore())
			dir.f.Close()
		}
	}()
	setup := setupMsg{level: level, root: cfg.Root, dev: dir.st.Dev, ino: dir.st.Ino, env: cfg.Env}
	setup.legacy = level == Plain && cfg.DKMS && mayMount(cfg.Log)
	if level != Plain || setup.legacy {
		if err := dir.makeMountPoints("proc", "sys", "dev"); err != nil {
			return nil, err
		}
	}
	var lent []*os.File
	if cfg.Mount != nil {
		setup.attach, lent = true, []*os.File{cfg.Mount}
	} else if level == Chroot {
		if lent, err = j.borrow(ctx, setup); err != nil {
			j.log.Warn("sessions have no /proc, and programs in them cannot open terminals (tmux, screen, script, sudo with use_pty): this container allows no user namespaces", "err", err)
			if setup.noNodes, err = j.guardDevices(); err != nil {
				return nil, err
			}
		}
	}
	err = j.startInit(ctx, setup, lent)
	if cfg.Mount == nil {
		for _, f := range lent {
			f.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	if level != Plain {
		if err := j.prove(ctx); err != nil {
			return nil, err
		}
	}
	return j, nil
}

// guardDevices prepares the image's device nodes for the chroot level and reports whether sessions must not make any.
func (j *Jail) guardDevices() (noNodes bool, err error) {
	open, err := j.dir.openDevices()
	if err != nil {
		return false, err
	}
	if open != "" {
		j.log.Warn("sessions cannot make device nodes: this container lets root open devices", "for example", open)
		if err := j.dir.findDevices(); err != nil {
			return false, err
		}
	}
	return open != "", j.dir.makeDevices()
}

// mayMount reports whether the plain level can mount what DKMS asks for.
func mayMount(log *slog.Logger) bool {
	missing, err := missingCaps(unix.CAP_SYS_ADMIN)
	if err != nil || missing != "" {
		log.Warn("DKMS asked for, but /proc, /sys and /dev cannot be mounted in the image root", "missing", missing, "err", err)
		return false
	}
	return true
}

// initNamespaces are the clone flags of a level.
func initNamespaces(m setupMsg) uintptr {
	switch {
	case m.level == Namespaces:
		return unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	case m.legacy, m.attach:
		return unix.CLONE_NEWNS
	}
	return 0
}

// startInit starts the init child and has it build the confinement.
func (j *Jail) startInit(ctx context.Context, setup setupMsg, lent []*os.File) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "jail-init")
	defer theirs.Close()
	if j.conn, err = newConn(os.NewFile(uintptr(fds[0]), "jail")); err != nil {
		return err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		j.conn.close()
		return err
	}
	j.trace = newTail(j.log)
	err = j.fork(theirs, errW, initNamespaces(setup))
	errW.Close()
	if err != nil {
		j.conn.close()
		errR.Close()
		return err
	}
	go j.trace.read(errR)
	j.conn.limit, j.conn.stuck = initLimit, func() { _ = j.proc.Signal(unix.SIGCONT) } // await says who may have stopped it

	stop := context.AfterFunc(ctx, func() { j.kill(ctx.Err()) })
	defer stop()
	if err := j.conn.send(opSetup, 0, &setup, lent...); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	p, err := j.conn.recv()
	if err != nil {
		j.kill(nil)
		<-j.done
		return fmt.Errorf("set up: init ended: %w", j.endError())
	}
	p.closeFiles()
	switch p.op {
	case opReady:
		var m readyMsg
		if err := m.decode(p.body); err != nil {
			return err
		}
		j.caps = m.caps
		for _, n := range m.notes {
			j.log.Warn("jail is incomplete", "level", j.level, "note", n)
		}
		go j.receive()
		return nil
	case opFailed:
		var m failedMsg
		if err := m.decode(p.body); err != nil {
			return err
		}
		return errors.New(m.text)
	}
	return fmt.Errorf("set up: %w: operation %d", errMalformed, p.op)
}

// childEnv is all the environment that init gets: nothing of the gateway's goes into the jail. The setting keeps the Go
// runtime from holding files of the container open (it would watch the CPU limit).
var childEnv = append([]string{"GODEBUG=containermaxprocs=0,updatemaxprocs=0"}, raceEnv...)

// fork starts this program as init. The kernel kills init when the thread that started it ends, so that thread waits for
// it. In the levels without a PID namespace init must get the chance to end its descendants: there only the closed
// socket tells it that the gateway is gone.
func (j *Jail) fork(socket, stderr *os.File, namespaces uintptr) error {
	attr := &os.ProcAttr{
		Dir:   "/",
		Env:   childEnv,
		Files: []*os.File{nil, nil, stderr, socket},
		Sys:   &syscall.SysProcAttr{Setsid: true, Cloneflags: namespaces, Credential: AsRoot()},
	}
	if j.level == Namespaces {
		attr.Sys.Pdeathsig = unix.SIGKILL
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	attr.Files[0], attr.Files[1] = null, null
	if j.level != Namespaces {
		// Should somebody kill init, its children come here, where Stop finds them.
		if err := AdoptOrphans(); err != nil {
			return err
		}
	}
	if j.level == Chroot {
		if err := guardLimits(); err != nil {
			return err
		}
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		p, err := os.StartProcess("/proc/self/exe", []string{"sshd", modeInit}, attr)
		if err != nil {
			started <- fmt.Errorf("start init: %w", err)
			return
		}
		j.proc = p
		started <- nil
		st, err := p.Wait()
		j.ended(st, err)
	}()
	return <-started
}

// initLimit is how long init may take nothing. It hands everything that takes time to goroutines of its own.
const initLimit = 10 * time.Second

// kill ends init, and with it the jail, because of err; nil means that the reason is what init says itself. A connection
// closed by Stop is no reason.
func (j *Jail) kill(err error) {
	j.mu.Lock()
	if j.err == nil && !j.stopping {
		j.err = err
	}
	j.mu.Unlock()
	if j.level == Namespaces {
		_ = j.proc.Kill()
	}
	// In the other levels the closed socket makes init end its descendants first.
	j.conn.close()
}

// ended records init's end and tells everybody who waits for something.
func (j *Jail) ended(st *os.ProcessState, err error) {
	j.conn.close()
	<-j.trace.done
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.stopping {
		how := fmt.Sprint(err)
		if err == nil {
			how = st.String()
		}
		e := fmt.Errorf("jail: init ended unexpectedly (%s) and all sessions with it", how)
		if said := j.trace.String(); said != "" {
			e = fmt.Errorf("%w: %s", e, said)
		}
		if j.err != nil {
			e = fmt.Errorf("%w: %w", e, j.err)
		}
		j.err = e
	} else {
		j.err = nil
	}
	close(j.done)
	for id, p := range j.running {
		delete(j.running, id)
		e := j.err
		if e == nil {
			e = ErrStopped
		}
		p.finish(Exit{Err: e})
	}
}

// tail logs what init writes to stderr, which is nothing unless it fails, and keeps the beginning of it.
type tail struct {
	log  *slog.Logger
	mu   sync.Mutex
	last []string
	done chan struct{}
}

func newTail(log *slog.Logger) *tail { return &tail{log: log, done: make(chan struct{})} }

// tailLines is enough for the reason of a Go panic and its first frames.
const tailLines = 12

func (t *tail) read(r io.ReadCloser) {
	defer close(t.done)
	defer r.Close()
	s := bufio.NewScanner(r)
	for s.Scan() {
		t.log.Warn("jail init", "line", s.Text())
		t.mu.Lock()
		if len(t.last) < tailLines {
			t.last = append(t.last, s.Text())
		}
		t.mu.Unlock()
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.last, " | ")
}
