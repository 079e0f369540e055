// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/authkeys"
	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

type ptyPayload struct {
	Term                       string
	Cols, Rows, XPixel, YPixel uint32
	Modes                      string
}

func TestParsePTY(t *testing.T) {
	// ECHO (53) off, VERASE (3) = 0x7f, output speed (129), end; what follows is no mode.
	modes := "\x35\x00\x00\x00\x00\x03\x00\x00\x00\x7f\x81\x00\x00\x96\x00\x00\x01\x00\x00\x00\x01"
	got, err := parsePTY(ssh.Marshal(ptyPayload{"xterm", 80, 1 << 20, 1, 2, modes}))
	want := &jail.TTY{Term: "xterm", Cols: 80, Rows: 65535, XPixel: 1, YPixel: 2, Modes: map[uint8]uint32{53: 0, 3: 0x7f, 129: 38400}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	if _, err := parsePTY(ssh.Marshal(ptyPayload{Term: "x\x00y"})); err == nil {
		t.Error("a NUL byte in TERM was accepted")
	}
}

func TestParseEnv(t *testing.T) {
	payload := func(n, v string) []byte { return ssh.Marshal(struct{ N, V string }{n, v}) }
	for _, tt := range []struct {
		name, value string
		accept      []string
		ok          bool
	}{
		{"LANG", "C", nil, true},
		{"LC_ALL", "de_DE.UTF-8", nil, true},
		{"FOO", "x", nil, false},
		{"FOO", "x", []string{"FO?"}, true},
		{"LANG", "C", []string{"FOO"}, false},
		{"LD_PRELOAD", "/x", []string{"*"}, false},
		{"PATH", "/x", []string{"*"}, false},
		{"IMS_JOB_ID", "x", []string{"IMS_*"}, false},
		{"BASH_ENV", "x", []string{"*"}, false},
		{"ANSIBLE_X", "x", []string{"*"}, true},
		{"LC_A=B", "x", nil, false},
		{"", "x", []string{"*"}, false},
		{"LC_A", "a\x00b", nil, false},
	} {
		got, err := parseEnv(payload(tt.name, tt.value), tt.accept)
		if (err == nil) != tt.ok || tt.ok && got != tt.name+"="+tt.value {
			t.Errorf("%s=%q with AcceptEnv %v: %q, %v", tt.name, tt.value, tt.accept, got, err)
		}
	}
}

func TestEnvLimits(t *testing.T) {
	ss := requestOnly()
	accepted := 0
	for range 2 * maxEnv {
		if ok, _ := ss.request("env", ssh.Marshal(struct{ N, V string }{"LC_X", strings.Repeat("v", 1000)})); ok {
			accepted++
		}
	}
	if ss.envBytes > maxEnvBytes || accepted == 0 || accepted > maxEnv {
		t.Errorf("%d variables of %d bytes were accepted", accepted, ss.envBytes)
	}
}

// requestOnly is a session that can take any request that does not start a command.
func requestOnly() *session {
	s := quietServer()
	s.set = quietSettings()
	return &session{
		c: testConn(s), log: s.log, login: &login{key: &authkeys.Key{PTY: true}},
		signals: make(chan unix.Signal, 1), events: make(chan struct{}, 1),
	}
}

func quietSettings() *sshdconf.Settings {
	s, _ := sshdconf.Load("", nil)
	return s
}

func TestRequestsBeforeStart(t *testing.T) {
	ss := requestOnly()
	resize := ssh.Marshal(windowSize{100, 50, 0, 0})
	for _, step := range []struct {
		typ     string
		payload []byte
		ok      bool
	}{
		{"window-change", resize, false}, // no terminal yet
		{"signal", ssh.Marshal(struct{ S string }{"TERM"}), false},
		{"pty-req", ssh.Marshal(ptyPayload{Term: "xterm", Cols: 80, Rows: 24}), true},
		{"window-change", resize, true},
		{"pty-req", ssh.Marshal(ptyPayload{Term: "vt100"}), false},
		{"env", ssh.Marshal(struct{ N, V string }{"LANG", "C"}), true},
		{"auth-agent-req@openssh.com", nil, false},
		{"x11-req", nil, false},
		{"no-such-request", []byte("x"), false},
		{"exec", []byte("short"), false},
		{"exec", ssh.Marshal(struct{ S string }{"a\x00b"}), false},
		{"subsystem", ssh.Marshal(struct{ S string }{"netconf"}), false},
	} {
		if ok, _ := ss.request(step.typ, step.payload); ok != step.ok {
			t.Errorf("%s: got %v, want %v", step.typ, ok, step.ok)
		}
	}
	if ss.tty.Term != "xterm" || ss.tty.Cols != 100 || ss.tty.Rows != 50 || ss.started {
		t.Errorf("terminal %+v, started %v", ss.tty, ss.started)
	}
}

func TestEnvironment(t *testing.T) {
	ss := requestOnly()
	ss.c.Conn = addrConn{}
	ss.env = []string{"LANG=client", "LC_A=1"}
	ss.c.srv.set.SetEnv = []string{"LANG=server", "X=set"}
	ss.login.key.Environment = []string{"X=key", "SSH_CLIENT=forged"}
	server := []string{"LANG=server", "X=set", "SSH_CLIENT=192.0.2.1 1024 22", "SSH_CONNECTION=192.0.2.1 1024 192.0.2.2 22"}
	asked, set := ss.environment("ls")
	if want := []string{"LANG=client", "LC_A=1", "X=key", "SSH_CLIENT=forged"}; !reflect.DeepEqual(asked, want) {
		t.Errorf("asked for: got %q, want %q", asked, want)
	}
	if want := append(server, "SSH_ORIGINAL_COMMAND=ls"); !reflect.DeepEqual(set, want) {
		t.Errorf("set: got %q, want %q", set, want)
	}
	ss.c.srv.set.PermitUserEnv = "no"
	asked, set = ss.environment("")
	if want := []string{"LANG=client", "LC_A=1"}; !reflect.DeepEqual(asked, want) || !reflect.DeepEqual(set, server) {
		t.Errorf("PermitUserEnvironment no: got %q and %q", asked, set)
	}
}

func TestSelectAlgorithms(t *testing.T) {
	base, all := []string{"a", "b"}, []string{"a", "b", "c"}
	for _, tt := range []struct {
		want string
		got  []string
	}{
		{"", base}, {"c,a", []string{"c", "a"}}, {"+c", []string{"a", "b", "c"}}, {"^b", []string{"b", "a"}},
		{"-a", []string{"b"}}, {"*", all}, {"unknown", nil},
	} {
		if got := selectAlgorithms(tt.want, base, all); !reflect.DeepEqual(got, tt.got) {
			t.Errorf("%q: got %q, want %q", tt.want, got, tt.got)
		}
	}
}

// Whatever a client sends before it has a command running, the session must answer, and
// must not start anything.
func FuzzRequests(f *testing.F) {
	f.Add("pty-req", ssh.Marshal(ptyPayload{"xterm", 80, 24, 0, 0, "\x35\x00\x00\x00\x01\x00"}))
	f.Add("window-change", ssh.Marshal(windowSize{1, 2, 3, 4}))
	f.Add("env", ssh.Marshal(struct{ N, V string }{"LC_ALL", "C"}))
	f.Add("signal", ssh.Marshal(struct{ S string }{"KILL"}))
	f.Add("subsystem", ssh.Marshal(struct{ S string }{"nothing"}))
	f.Add("eow@openssh.com", []byte{})
	f.Fuzz(func(t *testing.T, typ string, payload []byte) {
		if typ == "shell" || typ == "exec" || typ == "subsystem" {
			if s, err := parseString(payload); err == nil && strings.IndexByte(s, 0) >= 0 {
				t.Fatal("a NUL byte passed")
			}
			return
		}
		ss := requestOnly()
		for range 2 {
			ss.request(typ, payload)
		}
		if ss.tty != nil && (ss.tty.Cols > 65535 || ss.tty.Rows > 65535 || len(ss.tty.Term) > maxTerm) {
			t.Fatalf("terminal %+v", ss.tty)
		}
		if ss.started {
			t.Fatal("a command was started")
		}
	})
}

// addrConn is a connection with addresses and nothing else.
type addrConn struct{ net.Conn }

func (addrConn) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1024}
}
func (addrConn) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 22} }
