// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit codes of a shell that cannot run what it was asked to: POSIX sh, "Exit Status for Commands".
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

var errStopping = errors.New("the jail is being stopped")

// spawn starts one command and answers started, or failed if that is not the user's fault.
func (s *supervisor) spawn(id uint32, m *spawnMsg, files []*os.File) {
	defer s.contain(id)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	acct := lookupAccount(s.root, &s.files)
	var std [3]*os.File
	var master, slave *os.File
	var ttyName string
	if m.tty != nil {
		var err error
		master, slave, ttyName, err = openPTY(s.ptsDir(), m.tty, acct.ttyGID)
		if err != nil {
			s.refuse(id, err)
			return
		}
		defer master.Close()
		std = [3]*os.File{slave, slave, slave}
	} else {
		null, err := s.stdio(m, files, &std)
		if err != nil {
			s.refuse(id, err)
			return
		}
		if null != nil {
			defer null.Close()
		}
	}

	var start func() (int, error)
	if m.kind >= SFTP {
		start = func() (int, error) { return s.execSelf(m, &acct, std) }
	} else {
		start = func() (int, error) { return s.execShell(m, &acct, ttyName, std) }
	}
	var answers []*os.File
	if master != nil {
		answers = []*os.File{master}
	}
	var hello Greeting
	if m.kind == Shell && m.tty != nil {
		hello = s.greeting(&acct)
	}
	s.start(id, start, hello, answers, std[2], slave)
}

// maxMotd bounds what is shown of the message of the day.
const maxMotd = 64 << 10

// greeting reads what a login shell on a terminal greets its user with. What cannot be read is not shown.
func (s *supervisor) greeting(acct *account) (g Greeting) {
	b, _ := readInRoot(s.root, "/etc/motd")
	g.Motd = string(b[:min(len(b), maxMotd)])
	_, err := modeInRoot(s.root, path.Join(acct.home, ".hushlogin"))
	g.Hushed = err == nil
	return g
}

// start runs fork on the right thread, registers the child and answers. What the user's own files are to blame for is
// told on stderr and by the exit code, as a shell would. The terminal stays open until the child has been reaped: many
// programs close their three files before they exit, and the hang-up of whoever saw the end of the terminal then would
// kill them.
func (s *supervisor) start(id uint32, fork func() (int, error), hello Greeting, answers []*os.File, stderr, tty *os.File) {
	done := make(chan struct{})
	s.onMain <- func() {
		defer close(done)
		defer s.contain(id)
		s.mu.Lock()
		defer s.mu.Unlock()
		defer func() { tty.Close() }() // a nil one, too
		if s.stopping {
			s.refuse(id, errStopping)
			return
		}
		pid, err := fork()
		var ee *execError
		switch {
		case err == nil:
			s.running[pid], s.pids[id] = child{id, tty}, pid
			select {
			case s.forked <- struct{}{}:
			default:
			}
			tty = nil
			s.answer(opStarted, id, &startedMsg{pid: uint32(pid), greeting: hello}, answers...)
		case errors.As(err, &ee):
			fmt.Fprintf(stderr, "sshd: %v\n", ee)
			s.answer(opStarted, id, &startedMsg{}, answers...)
			s.answer(opExited, id, &exitedMsg{code: ee.code()})
		default:
			s.refuse(id, err)
		}
	}
	<-done
}

// execError says that the image's shell cannot be executed.
type execError struct {
	path string
	err  error
}

func (e *execError) Error() string { return fmt.Sprintf("%s: %v", e.path, e.err) }
func (e *execError) Unwrap() error { return e.err }

func (e *execError) code() uint32 {
	if errors.Is(e.err, fs.ErrNotExist) || errors.Is(e.err, unix.ENOTDIR) || errors.Is(e.err, unix.ELOOP) {
		return exitNotFound
	}
	return exitNotExecutable
}

// ptsDir is where init finds the devpts instance that terminals come from: the jail's own, which no session can hide by
// unmounting or renaming, or else the container's.
func (s *supervisor) ptsDir() string {
	if s.pts == nil {
		return devPTS
	}
	return fmt.Sprintf("/proc/self/fd/%d", s.pts.Fd())
}

// stdio fills std from the descriptors that came along, and with /dev/null.
func (s *supervisor) stdio(m *spawnMsg, files []*os.File, std *[3]*os.File) (null *os.File, err error) {
	next := 0
	for i := range std {
		if m.stdio&(1<<i) == 0 {
			if null == nil {
				if null, err = os.OpenFile("/dev/null", os.O_RDWR, 0); err != nil {
					return nil, err
				}
			}
			std[i] = null
			continue
		}
		if next >= len(files) {
			return null, fmt.Errorf("%w: a descriptor is missing", errMalformed)
		}
		fd, err := rawFD(files[next])
		if err == nil {
			// Programs do not expect EAGAIN; the mode belongs to the open file, which this side is the only user of.
			err = unix.SetNonblock(fd, false)
		}
		if err != nil {
			return null, err
		}
		std[i] = files[next]
		next++
	}
	return null, nil
}

// attr is what every command starts with: a session of its own, the terminal if there is one, and nothing open but its
// three files. In the chroot level the child changes its root between fork and execve: "." is init's working
// directory, and the bounding set decides that execve takes CAP_SYS_CHROOT away for good.
func (s *supervisor) attr(acct *account, env []string, std [3]*os.File, tty bool) (*syscall.ProcAttr, error) {
	a := &syscall.ProcAttr{
		Env: env,
		Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: tty,
			Credential: &syscall.Credential{Gid: acct.gid, Groups: acct.groups},
		},
	}
	for _, f := range std {
		fd, err := rawFD(f)
		if err != nil {
			return nil, err
		}
		a.Files = append(a.Files, uintptr(fd))
	}
	return a, nil
}

// execShell starts the account's shell, or /bin/sh where that is missing. It runs on the main thread.
func (s *supervisor) execShell(m *spawnMsg, acct *account, ttyName string, std [3]*os.File) (int, error) {
	home := acct.home
	if mode, err := modeInRoot(s.root, home); err != nil || !mode.IsDir() {
		home = "/"
	}
	var first error
	for _, shell := range []string{acct.shell, defaultShell} {
		a, err := s.attr(acct, acct.environment(defaultEnv(s.level), shell, acct.home, ttyName, m, s.env), std, m.tty != nil)
		if err != nil {
			return 0, err
		}
		a.Dir = home
		if s.level == Chroot {
			a.Sys.Chroot = "."
		}
		argv := []string{"-" + path.Base(shell)}
		if m.kind == Exec {
			argv = []string{path.Base(shell), "-c", m.command}
		}
		pid, err := syscall.ForkExec(shell, argv, a)
		runtime.KeepAlive(std)
		if err == nil {
			return pid, nil
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOMEM) {
			return 0, fmt.Errorf("start %s: %w", shell, err)
		}
		if first == nil {
			first = &execError{shell, err}
		}
		if shell == acct.shell && acct.shell == defaultShell || errors.Is(err, unix.E2BIG) {
			break
		}
	}
	return 0, first
}

// execSelf starts this program in one of its child modes inside the jail. In the chroot level the enter mode goes inside
// first and executes the program by descriptor.
func (s *supervisor) execSelf(m *spawnMsg, acct *account, std [3]*os.File) (int, error) {
	mode := map[Kind]string{SFTP: modeSFTP, kindProbe: modeProbe, kindSockets: modeSockets}[m.kind]
	env := append([]string{"HOME=" + acct.home, "USER=" + acct.name, "PATH=" + defaultPath}, raceEnv...)
	a, err := s.attr(acct, env, std, false)
	if err != nil {
		return 0, err
	}
	argv := []string{"sshd", mode}
	switch m.kind {
	case kindProbe:
		argv = append(argv, m.command)
	case SFTP:
		argv = append(argv, strings.Fields(m.command)...)
	}
	program := "/proc/self/exe"
	if s.self != nil {
		self, err := rawFD(s.self)
		if err != nil {
			return 0, err
		}
		program = "/proc/self/fd/" + strconv.Itoa(self)
	}
	if s.level != Chroot {
		return syscall.ForkExec(program, argv, a)
	}
	root, err := rawFD(s.root)
	if err != nil {
		return 0, err
	}
	a.Files = append(a.Files, uintptr(root))
	argv = append([]string{argv[0], modeEnter, strconv.FormatUint(s.caps, 16)}, argv[1:]...)

	// Entering takes CAP_SYS_CHROOT, which execve on the main thread would take away: fork from another one.
	type result struct {
		pid int
		err error
	}
	c := make(chan result)
	go func() {
		pid, err := syscall.ForkExec(program, argv, a)
		c <- result{pid, err}
	}()
	r := <-c
	return r.pid, r.err
}

// rootFD is where the enter mode finds the image root.
const rootFD = 3

// enterMain changes into the image root for good and executes this program again, in the mode that follows the bounding
// set in the arguments. It holds more capabilities than the sessions until execve takes them away, so that no process of
// the jail can trace it meanwhile.
func enterMain() error {
	runtime.LockOSThread()
	if len(os.Args) < 4 || !slices.Contains([]string{modeSFTP, modeProbe, modeSockets}, os.Args[3]) {
		return errors.New("internal mode, started by sshd only")
	}
	caps, err := strconv.ParseUint(os.Args[2], 16, 64)
	if err != nil {
		return fmt.Errorf("read bounding set: %w", err)
	}
	if err := cleanThread(); err != nil {
		return err
	}
	if err := closeInherited(rootFD); err != nil {
		return err
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("open own program: %w", err)
	}
	user, err := shieldUser()
	if err != nil {
		return err
	}
	if err := unix.Fchdir(rootFD); err != nil {
		return fmt.Errorf("enter image root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	unix.CloseOnExec(rootFD)
	if _, err := boundThread(caps); err != nil {
		return err
	}
	if err := sealThread(runtime.GOARCH, user); err != nil {
		return err
	}
	argv := append([]string{os.Args[0]}, os.Args[3:]...)
	return fmt.Errorf("execute own program: %w", execFD(self, argv, os.Environ()))
}

// execFD is execveat(2) with AT_EMPTY_PATH; it returns only on failure.
func execFD(f *os.File, argv, env []string) error {
	empty, err := unix.BytePtrFromString("")
	if err != nil {
		return err
	}
	argvp, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	return execveat(f, empty, argvp, envp)
}
