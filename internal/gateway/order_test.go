// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// recorder is a channel that notes what a client would receive, in order.
type recorder struct {
	mu     sync.Mutex
	frames []string
	added  chan struct{} // capacity: enough for every frame of a test
}

func (r *recorder) add(f string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// Data that arrives in pieces is one frame here: only the order is of interest.
	if n := len(r.frames); n > 0 && strings.HasPrefix(f, "out ") && strings.HasPrefix(r.frames[n-1], "out ") {
		r.frames[n-1] += f[4:]
	} else {
		r.frames = append(r.frames, f)
	}
	r.added <- struct{}{}
}

func (r *recorder) list() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.frames...)
}

func (r *recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r *recorder) Write(b []byte) (int, error) { r.add("out " + string(b)); return len(b), nil }
func (r *recorder) Close() error                { r.add("close"); return nil }
func (r *recorder) CloseWrite() error           { r.add("eof"); return nil }
func (r *recorder) Stderr() io.ReadWriter       { return recorderErr{r} }
func (r *recorder) SendRequest(name string, _ bool, payload []byte) (bool, error) {
	r.add(fmt.Sprintf("%s %x", name, payload))
	return false, nil
}

type recorderErr struct{ *recorder }

func (r recorderErr) Write(b []byte) (int, error) { r.add("err " + string(b)); return len(b), nil }

// ended is a process that has ended already.
type ended struct{ exit jail.Exit }

func (ended) PID() int                       { return 0 }
func (ended) PTY() *os.File                  { return nil }
func (ended) Resize(_, _, _, _ uint32) error { return nil }
func (ended) Signal(unix.Signal) error       { return nil }
func (p ended) Wait() jail.Exit              { return p.exit }

func testConn(s *server) *conn {
	c := &conn{srv: s, set: s.set, algs: s.algs, log: s.log, sessions: map[*session]struct{}{}}
	c.forwards = &forwards{c: c}
	return c
}

func quietServer() *server {
	s := &server{log: slog.New(slog.DiscardHandler)}
	s.seen = newMetrics(s)
	return s
}

// endedSession is a session whose command has ended with exit; stdout and stderr are the
// ends the command, or what it left behind, writes to.
func endedSession(t *testing.T, exit jail.Exit) (ss *session, rec *recorder, stdout, stderr *os.File, wait func()) {
	t.Helper()
	rec = &recorder{added: make(chan struct{}, 1<<16)}
	s := quietServer()
	ss = &session{c: testConn(s), ch: rec, log: s.log, out: &screen{w: rec}, events: make(chan struct{}, 1), signals: make(chan unix.Signal, 1)}
	var ends, ours [3]*os.File
	for i := range ends {
		var err error
		if ends[i], ours[i], err = pipe(i == 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close(); ours[i].Close() })
	}
	ss.pumps = []*pump{newPump(ours[1], ss.out, ss.events), newPump(ours[2], rec.Stderr(), ss.events)}
	done := make(chan struct{})
	return ss, rec, ends[1], ends[2], func() {
		for _, p := range ss.pumps {
			go p.run()
		}
		go func() {
			defer close(done)
			ss.wait(ended{exit}, ours[0], false)
		}()
		t.Cleanup(func() { <-done })
	}
}

func (r *recorder) await(t *testing.T, want ...string) {
	t.Helper()
	for !reflect.DeepEqual(r.list(), want) {
		<-r.added
		if got := r.list(); len(got) > len(want) || got[len(got)-1] == "close" && !reflect.DeepEqual(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// REGRESSION: with EOF before the exit status, ssh(1), whose own input had ended, closed the
// channel between the two now and then, and reported 255.
func TestFramesInOrder(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 3<<10) // less than a pipe holds
	for _, tt := range []struct {
		name string
		exit jail.Exit
		last string
	}{
		{"code", jail.Exit{Code: 3}, "exit-status 00000003"},
		{"code 255", jail.Exit{Code: 255}, "exit-status 000000ff"},
		{"signal", jail.Exit{Signal: unix.SIGKILL}, "exit-signal " + fmt.Sprintf("%x", ssh.Marshal(struct {
			S    string
			Core bool
			M, L string
		}{"KILL", false, "", ""}))},
		{"core", jail.Exit{Signal: unix.SIGSEGV, Core: true}, "exit-signal " + fmt.Sprintf("%x", ssh.Marshal(struct {
			S    string
			Core bool
			M, L string
		}{"SEGV", true, "", ""}))},
		{"signal without a name in the RFC", jail.Exit{Signal: unix.SIGBUS}, "exit-signal " + fmt.Sprintf("%x", ssh.Marshal(struct {
			S    string
			Core bool
			M, L string
		}{"BUS@openssh.com", false, "", ""}))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, rec, stdout, stderr, wait := endedSession(t, tt.exit)
			io.WriteString(stdout, big)
			stdout.Close()
			stderr.Close()
			wait()
			rec.await(t, "out "+big, tt.last, "eof", "close")
		})
	}
}

func TestNoCodeIsInvented(t *testing.T) {
	_, rec, stdout, stderr, wait := endedSession(t, jail.Exit{Err: io.ErrUnexpectedEOF})
	stdout.Close()
	stderr.Close()
	wait()
	rec.await(t, "eof", "close")
}

// A background process that holds the output open must not delay the exit code, and what it
// writes later must still arrive.
func TestOutputHeldOpen(t *testing.T) {
	_, rec, stdout, stderr, wait := endedSession(t, jail.Exit{Code: 7})
	io.WriteString(stdout, "by the command;")
	stderr.Close()
	wait()
	rec.await(t, "out by the command;", "exit-status 00000007")
	io.WriteString(stdout, "by its child")
	rec.await(t, "out by the command;", "exit-status 00000007", "out by its child")
	stdout.Close()
	rec.await(t, "out by the command;", "exit-status 00000007", "out by its child", "eof", "close")
}

// When the client goes away while a background process holds the output open, nothing of
// the session stays behind but that process.
func TestClientGoneWhileHeldOpen(t *testing.T) {
	ss, rec, stdout, stderr, wait := endedSession(t, jail.Exit{})
	defer stderr.Close()
	wait()
	stdout.WriteString("x")
	rec.await(t, "out x", "exit-status 00000000")
	for _, p := range ss.pumps {
		ss.files = append(ss.files, p.r)
	}
	ss.clientGone()
	rec.await(t, "out x", "exit-status 00000000", "eof", "close")
	if _, err := stdout.Write([]byte("x")); err == nil {
		t.Error("the output can still be written; want EPIPE")
	}
}
