// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// The end of a terminal's client hangs it up, whether the client closes the channel, or its connection is lost, or it is
// closed from here; the session's slot is free then. A sibling on the same connection notices nothing while there is one.
func TestHangUp(t *testing.T) {
	for name, end := range map[string]func(*job, *ssh.Session, net.Conn){
		"channel closed":      func(_ *job, s *ssh.Session, _ net.Conn) { s.Close() },
		"session killed":      func(j *job, _ *ssh.Session, _ net.Conn) { j.closeSession() },
		"connection lost":     func(_ *job, _ *ssh.Session, nc net.Conn) { nc.(*net.TCPConn).SetLinger(0); nc.Close() },
		"connection closed":   func(_ *job, _ *ssh.Session, nc net.Conn) { nc.Close() },
		"client's own signal": func(_ *job, s *ssh.Session, _ net.Conn) { s.Signal(ssh.SIGHUP) },
	} {
		t.Run(name, func(t *testing.T) {
			j := start(t, options{config: "MaxSessions 2"})
			nc, err := net.Dial("tcp", j.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			sc, chans, reqs, err := ssh.NewClientConn(nc, j.addr, &ssh.ClientConfig{User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(j.key)},
				HostKeyCallback: ssh.InsecureIgnoreHostKey()})
			if err != nil {
				t.Fatal(err)
			}
			c := ssh.NewClient(sc, chans, reqs)
			sibling := newSession(t, c)
			in, _ := sibling.StdinPipe()
			echo, _ := sibling.StdoutPipe()
			if err := sibling.Start("cat"); err != nil {
				t.Fatal(err)
			}
			s := newSession(t, c)
			if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
				t.Fatal(err)
			}
			mark := filepath.Join(t.TempDir(), "mark")
			out, _ := s.StdoutPipe()
			if err := s.Start(fmt.Sprintf("trap 'echo HUP > %s; exit' HUP; echo ready; while :; do sleep 0.1; done", mark)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
				t.Fatal(err)
			}
			end(j, s, nc)
			eventually(t, "the trap has run", func() bool { got, _ := os.ReadFile(mark); return string(got) == "HUP\n" })
			eventually(t, "the session has ended", func() bool {
				return strings.Contains(j.log.String(), "kind=exec pty=true code=")
			})
			if strings.HasPrefix(name, "connection") {
				eventually(t, "no slot is taken", func() bool { return len(j.status().Connections) == 0 })
				return
			}
			if out, code := execute(t, c, "echo alive"); out != "alive\n" || code != 0 {
				t.Errorf("in its slot: %q, %d", out, code)
			}
			io.WriteString(in, "as before\n")
			in.Close()
			if out, err := io.ReadAll(echo); string(out) != "as before\n" || err != nil {
				t.Errorf("its sibling: %q, %v", out, err)
			}
			if err := sibling.Wait(); err != nil {
				t.Errorf("its sibling ended: %v", err)
			}
		})
	}
}

// closeSession does what sshd status --close does to the one session on a terminal.
func (j *job) closeSession() {
	j.t.Helper()
	for _, c := range j.status().Connections {
		for _, s := range c.Sessions {
			if !s.TTY {
				continue
			}
			if _, err := ask(j.runDir(), statusRequest{Close: s.ID}); err != nil {
				j.t.Error(err)
			}
		}
	}
}

// held is what the gateway of this process and its jail's init hold.
type held struct{ goroutines, files, initFiles, children int }

func holds(t *testing.T) held {
	t.Helper()
	count := func(dir string) int { d, _ := os.ReadDir(dir); return len(d) }
	h := held{goroutines: runtime.NumGoroutine(), files: count("/proc/self/fd")}
	below := func(pid string) (pids []string) {
		tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			pids = append(pids, strings.Fields(string(b))...)
		}
		return pids
	}
	for _, init := range below("self") {
		h.children += 1 + len(below(init))
		h.initFiles += count("/proc/" + init + "/fd")
	}
	return h
}

// Commands that ran, and clients that broke off anywhere, leave no goroutine, descriptor or process behind. The numbers of
// a long job are tried by integration/clients (IMS_BUILDENV_SOAK=1).
func TestManyConnectionsLeaveNothing(t *testing.T) {
	j := start(t, options{})
	j.awaitLog("waiting for the user")
	many := func(execs, aborts int) {
		c, err := j.dialAs("root", j.key)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range execs {
			if out, code := execute(t, c, "echo x"); out != "x\n" || code != 0 {
				t.Fatalf("%q, %d", out, code)
			}
		}
		for i := range aborts {
			nc, err := net.Dial("tcp", j.addr)
			if err != nil {
				t.Fatal(err)
			}
			nc.(*net.TCPConn).SetLinger(0) // a reset
			switch i % 4 {
			case 0:
				io.WriteString(nc, "SSH-2.0-Bro")
			case 1:
				io.WriteString(nc, "SSH-2.0-OpenSSH_9.2\r\n\x00\x00\x04\x00\x06\x14half a packet")
				io.ReadFull(nc, make([]byte, 40))
			default:
				sc, chans, reqs, err := ssh.NewClientConn(nc, j.addr, &ssh.ClientConfig{User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(j.key)},
					HostKeyCallback: ssh.InsecureIgnoreHostKey()})
				if err != nil {
					t.Fatal(err)
				}
				s := newSession(t, ssh.NewClient(sc, chans, reqs))
				if i%4 == 3 {
					if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.Start("cat"); err != nil {
					t.Fatal(err)
				}
			}
			nc.Close()
		}
	}
	first := holds(t)
	var before, after held
	defer func() { t.Logf("first %+v, before %+v, after %+v", first, before, after) }()
	many(20, 8) // what init opens for the first of them is kept for the next
	eventually(t, "quiet", func() bool {
		before = holds(t)
		return before.goroutines <= first.goroutines && before.files <= first.files && before.children == first.children
	})
	many(500, 200)
	eventually(t, "all is given back", func() bool {
		after = holds(t)
		return after.goroutines <= before.goroutines && after.files <= before.files && after.initFiles <= before.initFiles && after.children <= before.children
	})
}
