// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestDisconnectReasons: who ended a connection, and why, is in the log, whatever the way.
func TestDisconnectReasons(t *testing.T) {
	j := start(t, options{config: "MaxAuthTries 2"})
	raw := func() net.Conn {
		c, err := net.Dial("tcp", j.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	reset := func(c net.Conn) {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	for _, tt := range []struct {
		name string
		do   func()
		want string // of the log line
	}{
		{"a port check", func() { raw().Close() }, `level=DEBUG by=client why="closed before a login" authenticated=false`},
		{"OpenSSH's client", func() { run(t, j.tool("ssh", host, "true")) },
			`level=INFO by=client why="disconnect, reason 11: \"disconnected by user\"" authenticated=true`},
		{"a client that closes its socket", func() { j.dial().Close() }, `level=INFO by=client why="closed the connection" authenticated=true`},
		{"a client that vanishes", func() {
			c := raw()
			sc, _, _, err := ssh.NewClientConn(c, "", &ssh.ClientConfig{
				User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(j.key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err != nil {
				t.Fatal(err)
			}
			_ = sc
			reset(c)
		}, `level=INFO by=network why="connection reset by peer" authenticated=true`},
		{"a stranger that gives up", func() { j.dialAs("root", newKey(t)) }, `level=INFO by=client why="gave up after failed logins" authenticated=false`},
		{"a stranger that tries on", func() { j.dialAs("root", newKey(t), newKey(t), newKey(t)) },
			`level=INFO by=server why="MaxAuthTries: too many failed logins" authenticated=false`},
		{"another protocol", func() { fmt.Fprint(raw(), strings.Repeat("GET /", 100)) }, `level=INFO by=protocol why=`},
		{"no common algorithm", func() {
			ssh.Dial("tcp", j.addr, &ssh.ClientConfig{Config: ssh.Config{Ciphers: []string{"aes128-cbc"}}, User: "root", HostKeyCallback: ssh.InsecureIgnoreHostKey()})
		}, `level=INFO by=protocol why="ssh: no common algorithm`},
		{"garbage", func() {
			c := raw()
			fmt.Fprint(c, "SSH-2.0-x\r\n\xff\xff\xff\xff garbage garbage garbage")
			bufio.NewReader(c).ReadString(0)
		}, `level=INFO by=protocol why=`},
	} {
		before := len(j.log.String())
		tt.do()
		line := ""
		eventually(t, "the end is logged: "+tt.name, func() bool {
			for l := range strings.Lines(j.log.String()[before:]) {
				if strings.Contains(l, `msg="connection closed"`) {
					line = l
				}
			}
			return line != ""
		})
		level, rest, _ := strings.Cut(tt.want, " ")
		if !strings.Contains(line, level) || !strings.Contains(line, rest) || !strings.Contains(line, "peer=127.0.0.1:") {
			t.Errorf("%s: %s; want %s", tt.name, line, tt.want)
		}
	}
	c := j.dial()
	j.flag("complete")
	c.Wait()
	if err := j.await(); err != nil {
		t.Error(err)
	}
	j.awaitEnded(`by=server why="The image is marked complete: the build environment is closing." authenticated=true`)
}

// awaitEnded waits for text in the log of a job that may be over.
func (j *job) awaitEnded(text string) {
	j.t.Helper()
	eventually(j.t, "the log holds "+text, func() bool { return strings.Contains(j.log.String(), text) })
}

// A job that nobody works on ends, if that is wanted; one with a session does not.
func TestAbandon(t *testing.T) {
	// Nobody is missed before the script has ended, and that is when the session is there.
	dir := t.TempDir()
	gate := filepath.Join(dir, "gate")
	j := start(t, options{config: "AbandonTimeout 1s", change: func(c *Config) {
		c.SSHD.CustomizationScript = filepath.Join(dir, "script")
		os.WriteFile(c.SSHD.CustomizationScript, []byte("until [ -e "+gate+" ]; do sleep 0.01; done\n"), 0o600)
	}})
	s := newSession(t, j.dial())
	in, err := s.StdinPipe()
	if err == nil {
		err = s.Start("cat")
	}
	if err != nil {
		t.Fatal(err)
	}
	j.write(gate, "")
	j.awaitLog("customization script ended")
	began := time.Now()
	eventually(t, "the timeout has passed", func() bool { return time.Since(began) > 1500*time.Millisecond })
	if j.exists("failed") {
		t.Error("abandoned with a session")
	}
	in.Close()
	if err := j.await(); err != nil || j.flags() != "ready failed exiting" {
		t.Errorf("%v, flags %q", err, j.flags())
	}
	if !strings.Contains(j.log.String(), "job abandoned") {
		t.Error("not in the log")
	}
}
