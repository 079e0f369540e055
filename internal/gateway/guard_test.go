// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// panicky is a channel whose output is a fault of ours.
type panicky struct{ recorder }

func (*panicky) Write([]byte) (int, error) { panic("a fault in one session") }

// faulty is a connection in which our own reading panics, before there is anything of the SSH library.
type faulty struct{ net.Conn }

func (faulty) Read([]byte) (int, error) { panic("a fault in one connection") }

// A panic at a connection's very beginning ends it, and neither the server nor another connection.
func TestPanicInConnection(t *testing.T) {
	_, raw, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newServer(&sshdconf.Settings{MaxStartups: 10}, nil, []ssh.Signer{key}, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	other := newConn(s, ours)
	s.add(other)
	broken, peer := net.Pipe()
	go io.Copy(io.Discard, peer)
	s.handle(s.enter(faulty{broken}))
	if _, err := broken.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the connection with the fault: %v", err)
	}
	if left := s.snapshot(); len(left) != 1 || left[0] != other {
		t.Errorf("%d connections are left", len(left))
	}
	go other.Write([]byte("x"))
	if _, err := theirs.Read(make([]byte, 1)); err != nil {
		t.Errorf("the other connection: %v", err)
	}
}

// panicked is a command that takes no signal.
type panicked struct{ ended }

func (panicked) Signal(unix.Signal) error { panic("a fault in a signal") }

// Wait waits for ever: the connection ends before.
func (panicked) Wait() jail.Exit { select {} }

// A panic where a signal is delivered, and one where a terminal is told of its end, end their connection, and not the server.
func TestPanicInSignalAndHangUp(t *testing.T) {
	for name, cause := range map[string]func(*session){
		"signal":  func(ss *session) { ss.run(panicked{}, ss.files[0], true); ss.signals <- unix.SIGTERM },
		"hang-up": func(ss *session) { ss.hangUp("the end") },
	} {
		t.Run(name, func(t *testing.T) {
			s := quietServer()
			s.set = &sshdconf.Settings{}
			ours, theirs := net.Pipe()
			tty, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			ch := &panicky{recorder{added: make(chan struct{}, 1<<16)}}
			ss := &session{c: newConn(s, ours), ch: ch, log: s.log, out: &screen{w: ch}, events: make(chan struct{}, 1),
				signals: make(chan unix.Signal, 1), files: []*os.File{tty}}
			cause(ss)
			if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the connection: %v", err)
			}
		})
	}
}

// A panic where a session's output is sent ends its connection, and not the server.
func TestPanicInOutput(t *testing.T) {
	s := quietServer()
	s.set = &sshdconf.Settings{}
	ours, theirs := net.Pipe()
	c := newConn(s, ours)
	ch := &panicky{recorder{added: make(chan struct{}, 1<<16)}}
	ss := &session{c: c, ch: ch, log: s.log, out: &screen{w: ch}, events: make(chan struct{}, 1), signals: make(chan unix.Signal, 1)}
	stdout, out, err := pipe(false)
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	ss.pumps = []*pump{newPump(out, ss.out, ss.events)}
	ss.run(ended{jail.Exit{}}, stdin, false)
	io.WriteString(stdout, "x")
	stdout.Close()
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection: %v", err)
	}
}
