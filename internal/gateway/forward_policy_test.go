// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// probes tries each kind of forwarding and spells which of them are permitted.
func probes(t *testing.T, c *ssh.Client, dir string) string {
	t.Helper()
	tcp, unix := answering(t, "tcp", "127.0.0.1:0"), answering(t, "unix", filepath.Join(dir, "target"))
	defer tcp.Close()
	defer unix.Close()
	ask := func(typ string, payload any) bool {
		ok, _, err := c.SendRequest(typ, true, ssh.Marshal(payload))
		return err == nil && ok
	}
	dial := func(network, addr string) bool {
		nc, err := c.Dial(network, addr)
		return err == nil && asks(nc, "x") == "X"
	}
	type listen struct {
		Host string
		Port uint32
	}
	_, port, _ := net.SplitHostPort(tcp.Addr().String())
	var got strings.Builder
	for _, p := range []struct {
		name string
		ok   bool
	}{
		{"L", dial("tcp", tcp.Addr().String())},
		{"other", dial("tcp", "localhost:"+port)},
		{"unix-L", dial("unix", filepath.Join(dir, "target"))},
		{"R", ask("tcpip-forward", listen{"localhost", 0})},
		{"R-any", ask("tcpip-forward", listen{"", 0})},
		{"unix-R", ask("streamlocal-forward@openssh.com", struct{ Path string }{filepath.Join(dir, "listen")})},
	} {
		if p.ok {
			fmt.Fprintf(&got, "%s ", p.name)
		}
	}
	s := newSession(t, c)
	defer s.Close()
	if ok, err := s.SendRequest("auth-agent-req@openssh.com", true, nil); err == nil && ok {
		got.WriteString("agent ")
	}
	return strings.TrimSpace(got.String())
}

// TestForwardingPolicy: each restriction, and none, permits here what it permits in OpenSSH's sshd.
func TestForwardingPolicy(t *testing.T) {
	testkit.NeedRoot(t)
	if os.Mkdir("/run/sshd", 0o755) == nil { // OpenSSH's sshd does not start without
		t.Cleanup(func() { os.Remove("/run/sshd") })
	}
	const all = "L other unix-L R R-any unix-R agent"
	for _, tt := range []struct{ config, key, want string }{
		{"", "", all},
		{"DisableForwarding yes", "", ""},
		{"AllowTcpForwarding no", "", "agent"},
		{"AllowTcpForwarding local", "", "L other unix-L agent"},
		{"AllowTcpForwarding remote", "", "R R-any unix-R agent"},
		{"AllowStreamLocalForwarding no", "", "L other R R-any agent"},
		{"AllowStreamLocalForwarding local", "", "L other unix-L R R-any agent"},
		{"AllowStreamLocalForwarding remote", "", "L other R R-any unix-R agent"},
		{"AllowAgentForwarding no", "", "L other unix-L R R-any unix-R"},
		{"PermitOpen 127.0.0.1:*", "", "L R R-any unix-R agent"},
		{"PermitOpen none", "", "R R-any unix-R agent"},
		{"PermitOpen *:*", "", all},
		{"PermitListen localhost:*", "", "L other unix-L R unix-R agent"},
		{"PermitListen none", "", "L other unix-L unix-R agent"},
		{"", "restrict", ""},
		{"", "restrict,port-forwarding", "L other unix-L R R-any unix-R"},
		{"", "restrict,agent-forwarding", "agent"},
		{"", "no-port-forwarding", "agent"},
		{"", "no-agent-forwarding", "L other unix-L R R-any unix-R"},
		{"", `permitopen="127.0.0.1:*"`, "L R R-any unix-R agent"},
		{"", `permitlisten="localhost:*"`, "L other unix-L R unix-R agent"},
		{"PermitOpen 127.0.0.1:*", `permitopen="localhost:*"`, "R R-any unix-R agent"},
	} {
		t.Run(tt.config+" "+tt.key, func(t *testing.T) {
			t.Parallel()
			j := start(t, options{config: tt.config})
			j.write(j.keys, j.key.line(tt.key, "the user"))
			c := j.dial()
			if got := probes(t, c, t.TempDir()); got != tt.want {
				t.Errorf("permitted: %s\nwant:      %s", got, tt.want)
			}
			c.Close()
			if other := opensshProbes(t, j, tt.config); other != tt.want {
				t.Errorf("OpenSSH's sshd permits %s\nwe want                %s", other, tt.want)
			}
		})
	}
}

// opensshProbes has OpenSSH's sshd do it with the same configuration and keys.
func opensshProbes(t *testing.T, j *job, config string) string {
	t.Helper()
	testkit.NeedTool(t, "sshd")
	conf := filepath.Join(t.TempDir(), "sshd_config")
	j.write(conf, config+"\nAuthorizedKeysFile "+j.keys+"\nStrictModes no\nUsePAM no\nHostKey "+j.key.path+"\n")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	other := *j
	other.addr = l.Addr().String()
	dialled := make(chan *ssh.Client, 1)
	go func() {
		c, err := other.dialAs("root", j.key)
		if err != nil {
			t.Error(err)
		}
		dialled <- c
	}()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	f, err := nc.(*net.TCPConn).File()
	nc.Close()
	if err != nil {
		t.Fatal(err)
	}
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(sshd, "-i", "-f", conf) // it wants to be called by its full path
	cmd.Stdin, cmd.Stdout = f, f
	err = cmd.Start()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() // it removes the agent's socket, and ends with the connection
	c := <-dialled
	if c == nil {
		t.FailNow()
	}
	defer c.Close()
	return probes(t, c, t.TempDir())
}
