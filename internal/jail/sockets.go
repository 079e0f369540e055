// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Unix socket has a path, and a path means what it means inside the jail. So a child that is confined like every
// session makes, connects and removes the sockets; the gateway gets descriptors and never resolves such a path. One
// child serves the job, one request after the other. Root in the jail may kill it: the next request starts another.

// socketTimeout is how long the child may take. It does nothing that waits; root in the jail can stop it, though.
const socketTimeout = 10 * time.Second

// socketBacklog is SSH_LISTEN_BACKLOG of OpenSSH.
const socketBacklog = 128

// sockets is the gateway's side.
type sockets struct {
	mu   sync.Mutex // held for the whole of a request
	conn *conn      // nil: no child yet
	proc *Process
	made map[*Listener]struct{}
	shut bool
}

// Listener is a socket that listens inside the jail.
type Listener struct {
	*net.UnixListener
	j    *Jail
	name socketMsg
}

// Path is the socket's name inside the jail.
func (l *Listener) Path() string { return l.name.path }

// Close stops listening and removes the socket from the file system, if it is still the one that was made there.
func (l *Listener) Close() error {
	err := l.UnixListener.Close()
	s := &l.j.socks
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.made[l]; !ok {
		return err
	}
	delete(s.made, l)
	return errors.Join(err, s.remove(l))
}

// remove removes l's name; the caller holds mu.
func (s *sockets) remove(l *Listener) error {
	_, err := s.request(l.j, opRemove, &l.name, opRemoved)
	if err != nil {
		return fmt.Errorf("remove socket %s in the jail: %w", l.name.path, err)
	}
	return nil
}

// Listen makes a Unix socket that listens at path inside the jail; a relative path starts at "/". mask is the umask for
// it; with unlink, what is at path is removed before. Close and Stop remove the socket.
func (j *Jail) Listen(path string, mask uint32, unlink bool) (*Listener, error) {
	if path == "" {
		return nil, errors.New("listen in the jail: empty path")
	}
	return j.listen(&listenMsg{path: path, mask: mask, unlink: unlink})
}

// ListenAgent makes a socket for a forwarded agent inside the jail: /tmp/ssh-XXXXXXXXXX/agent.N, which only root can get
// at. Close and Stop remove it with its directory.
func (j *Jail) ListenAgent() (*Listener, error) { return j.listen(&listenMsg{mask: 0o177}) }

func (j *Jail) listen(m *listenMsg) (*Listener, error) {
	s := &j.socks
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.request(j, opListen, m, opSocket)
	if err != nil {
		return nil, err
	}
	defer p.closeFiles()
	l := &Listener{j: j}
	if err := l.name.decode(p.body); err != nil {
		s.discard()
		return nil, err
	}
	nl, err := net.FileListener(p.files[0])
	if err == nil {
		var ok bool
		if l.UnixListener, ok = nl.(*net.UnixListener); !ok {
			nl.Close()
			err = errMalformed
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen in the jail: %w", err), s.remove(l))
	}
	if s.made == nil {
		s.made = map[*Listener]struct{}{}
	}
	s.made[l] = struct{}{}
	return l, nil
}

// Dial connects to the Unix socket at path inside the jail; a relative path starts at "/".
func (j *Jail) Dial(path string) (*net.UnixConn, error) {
	s := &j.socks
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.request(j, opConnect, &stringMsg{s: path}, opSocket)
	if err != nil {
		return nil, err
	}
	defer p.closeFiles()
	nc, err := net.FileConn(p.files[0])
	if err != nil {
		return nil, fmt.Errorf("connect in the jail: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("connect in the jail: %w", errMalformed)
	}
	return uc, nil
}

// request asks the child, a new one if there is none or the old one is gone; the caller holds mu. An answer with a
// descriptor is one of opSocket.
func (s *sockets) request(j *Jail, o op, m message, want op) (packet, error) {
	if s.shut {
		return packet{}, ErrStopped
	}
	var err error
	for range 2 {
		if s.conn == nil {
			if err := s.start(j); err != nil {
				return packet{}, err
			}
		}
		var p packet
		if p, err = s.exchange(o, m); err != nil {
			s.discard()
			continue
		}
		switch {
		case p.op == opFailed:
			p.closeFiles()
			var f failedMsg
			if err := f.decode(p.body); err != nil {
				s.discard()
				return packet{}, err
			}
			return packet{}, errors.New(f.text)
		case p.op != want || (len(p.files) == 1) != (want == opSocket) || len(p.files) > 1:
			p.closeFiles()
			s.discard()
			return packet{}, fmt.Errorf("%w: operation %d", errMalformed, p.op)
		}
		return p, nil
	}
	return packet{}, fmt.Errorf("ask the jail for a socket: %w", err)
}

func (s *sockets) exchange(o op, m message) (packet, error) {
	if err := s.conn.c.SetDeadline(time.Now().Add(socketTimeout)); err != nil {
		return packet{}, err
	}
	if err := s.conn.send(o, 0, m); err != nil {
		return packet{}, err
	}
	return s.conn.recv()
}

func (s *sockets) start(j *Jail) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "jail-sockets")
	defer theirs.Close()
	c, err := newConn(os.NewFile(uintptr(fds[0]), "jail"))
	if err != nil {
		return err
	}
	if s.proc, err = j.Spawn(Request{Kind: kindSockets, Stdin: theirs}); err != nil {
		c.close()
		return err
	}
	s.conn = c
	return nil
}

// discard ends a child that does not do what it should.
func (s *sockets) discard() {
	s.conn.close()
	s.conn = nil
	_ = s.proc.Signal(unix.SIGKILL)
}

// close removes all sockets, ends the child and refuses later requests.
func (s *sockets) close(j *Jail) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.made {
		if err := s.remove(l); err != nil {
			j.log.Warn("sockets may be left in the image root", "err", err)
			if s.conn == nil {
				break // nobody answers, and waiting for each of the others would take as long again
			}
		}
	}
	s.made, s.shut = nil, true
	if s.conn == nil {
		return
	}
	s.conn.close()
	s.conn = nil
	select {
	case <-s.proc.done:
	case <-time.After(socketTimeout): // Stop ends it with all the others
	}
}

// socketsMain is the child.
func socketsMain() error {
	// Its answers are descriptors that the gateway uses: nobody in the jail shall trace it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid dumps: %w", err)
	}
	if t, err := unix.GetsockoptInt(0, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		return errors.New("internal mode, started by sshd only")
	}
	c, err := newConn(os.NewFile(0, "gateway"))
	if err != nil {
		return err
	}
	for {
		p, err := c.recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		p.closeFiles()
		if err := answerSocket(c, p); err != nil {
			return err
		}
	}
}

// answerSocket does what p asks for and answers.
func answerSocket(c *conn, p packet) error {
	var name socketMsg
	fd, o := -1, opSocket
	var failure error
	switch p.op {
	case opListen:
		var m listenMsg
		if err := m.decode(p.body); err != nil {
			return err
		}
		fd, name, failure = listenUnix(&m)
	case opConnect:
		var m stringMsg
		if err := m.decode(p.body); err != nil {
			return err
		}
		fd, failure = connectUnix(m.s)
	case opRemove:
		if err := name.decode(p.body); err != nil {
			return err
		}
		o, failure = opRemoved, removeUnix(&name)
	default:
		return fmt.Errorf("%w: unexpected operation %d", errMalformed, p.op)
	}
	if failure != nil {
		return c.send(opFailed, p.id, &failedMsg{text: failure.Error()})
	}
	if fd < 0 {
		return c.send(o, p.id, &name)
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	return c.send(o, p.id, &name, f)
}

// address makes path absolute: that also keeps a leading '@' from meaning an abstract socket.
func address(path string) (string, *unix.SockaddrUnix, error) {
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	if strings.IndexByte(path, 0) >= 0 {
		return "", nil, unix.EINVAL
	}
	if len(path) >= len(unix.RawSockaddrUnix{}.Path) {
		return "", nil, unix.ENAMETOOLONG
	}
	return path, &unix.SockaddrUnix{Name: path}, nil
}

// listenUnix is unix_listener in misc.c of OpenSSH, and its mkdtemp for agents.
func listenUnix(m *listenMsg) (fd int, name socketMsg, err error) {
	name.path = m.path
	if m.path == "" {
		dir := filepath.Join("/tmp", "ssh-"+rand.Text()[:10])
		if err := unix.Mkdir(dir, 0o700); err != nil {
			return -1, name, err
		}
		name.ownDir, name.path = true, filepath.Join(dir, fmt.Sprintf("agent.%d", os.Getpid()))
		defer func() {
			if err != nil {
				unix.Rmdir(dir)
			}
		}()
	}
	path, sa, err := address(name.path)
	if err != nil {
		return -1, name, err
	}
	name.path = path
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, name, err
	}
	if m.unlink {
		unix.Unlink(path) // bind tells when it did not help
	}
	old := unix.Umask(int(m.mask))
	err = unix.Bind(fd, sa)
	unix.Umask(old)
	if err != nil {
		unix.Close(fd)
		return -1, name, err
	}
	var st unix.Stat_t
	if err = unix.Listen(fd, socketBacklog); err == nil {
		err = unix.Lstat(path, &st)
	}
	if err != nil {
		unix.Close(fd)
		unix.Unlink(path)
		return -1, name, err
	}
	name.dev, name.ino = st.Dev, st.Ino
	return fd, name, nil
}

func connectUnix(path string) (int, error) {
	_, sa, err := address(path)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// removeUnix removes the socket; what the user put in its place stays.
func removeUnix(m *socketMsg) error {
	var st unix.Stat_t
	err := unix.Lstat(m.path, &st)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK && st.Dev == m.dev && st.Ino == m.ino {
		err = unix.Unlink(m.path)
	}
	if m.ownDir {
		unix.Rmdir(filepath.Dir(m.path)) // not empty: the user's files are the user's
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}
