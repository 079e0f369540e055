// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestExec(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	for _, tt := range []struct {
		command, out string
		code         int
	}{
		{"true", "", 0},
		{"exit 1", "", 1},
		{"exit 42", "", 42},
		{"exit 255", "", 255},
		{"echo out; exit 3", "out\n", 3},
		{"echo err >&2; exit 4", "err\n", 4},
		{`printf '%s|' "a  b" 'c"d' \$HOME`, `a  b|c"d|$HOME|`, 0},
		{"echo ~root && sleep 0", "/root\n", 0},
		{"test -t 0 || echo no terminal", "no terminal\n", 0},
		{"umask; pwd", "0022\n/root\n", 0},
		{"ls -l /proc/self/fd | wc -l", "", 0},
	} {
		out, code := execute(t, c, tt.command)
		if code != tt.code || tt.out != "" && out != tt.out {
			t.Errorf("%s: %q, %d; want %q, %d", tt.command, out, code, tt.out, tt.code)
		}
	}
	if out, code := execute(t, c, "/no/such/command"); code != 127 || !strings.Contains(out, "/no/such/command") {
		t.Errorf("missing command: %q, %d", out, code)
	}
	if out, code := execute(t, c, "/etc/passwd"); code != 126 {
		t.Errorf("command that is not executable: %q, %d", out, code)
	}
	if out, code := execute(t, c, "echo "+strings.Repeat("x", 200<<10)); code != 126 {
		t.Errorf("command that is too long: %q, %d", out, code)
	}
}

func TestEnvironmentOfSessions(t *testing.T) {
	j := start(t, options{config: "SetEnv FROM_CONFIG=yes"})
	c := j.dial()
	want := []string{
		"IMS_JOB_ID=11111111-2222-3333-4444-555555555555", "IMS_ARCH=x86_64", "IMS_DKMS_ENABLED=False", "REMOTE_BUILD_NODE=",
		"FROM_CONFIG=yes", "LC_ALL=C", "HOME=/root", "USER=root",
	}
	check := func(what, out string) {
		t.Helper()
		for _, w := range append(want, "SSH_CONNECTION=127.0.0.1 ", "SSH_CLIENT=127.0.0.1 ") {
			if !strings.Contains("\n"+strings.ReplaceAll(out, "\r", ""), "\n"+w) {
				t.Errorf("%s: no %s in %q", what, w, out)
			}
		}
		for _, bad := range []string{"LD_PRELOAD", "SSHD_OPTIONS", "FORGED"} {
			if strings.Contains(out, bad) {
				t.Errorf("%s: %s in the environment", what, bad)
			}
		}
	}
	prepare := func(pty bool) *ssh.Session {
		s := newSession(t, c)
		s.Setenv("LC_ALL", "C")
		for _, n := range []string{"LD_PRELOAD", "FORGED", "IMS_JOB_ID"} {
			if err := s.Setenv(n, "FORGED"); err == nil {
				t.Errorf("%s was accepted", n)
			}
		}
		if pty {
			if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
	out, err := prepare(false).Output("env")
	if err != nil {
		t.Fatal(err)
	}
	check("exec", string(out))
	if out, err = prepare(true).Output("env"); err != nil {
		t.Fatal(err)
	}
	check("exec on a terminal", string(out))
	if !strings.Contains(string(out), "SSH_TTY=/dev/pts/") || !strings.Contains(string(out), "TERM=xterm") {
		t.Errorf("no SSH_TTY or TERM: %q", out)
	}
	s := prepare(false)
	s.Stdin = strings.NewReader("env\nexit 5\n")
	var shell bytes.Buffer
	s.Stdout = &shell
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 5 {
		t.Errorf("shell: %v, want status 5", err)
	}
	check("shell", shell.String())
}

func TestDeathBySignal(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	for _, sig := range []string{"KILL", "SEGV", "TERM", "HUP"} {
		var exit *ssh.ExitError
		if err := newSession(t, c).Run("kill -" + sig + " $$; sleep 1"); !errors.As(err, &exit) || exit.Signal() != sig {
			t.Errorf("%s: %v", sig, err)
		}
	}
}

func TestSignalRequest(t *testing.T) {
	j := start(t, options{})
	s := newSession(t, j.dial())
	out, _ := s.StdoutPipe()
	if err := s.Start("trap 'echo got USR1; exit 9' USR1; echo ready; while :; do sleep 0.1; done"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 6)
	if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "ready\n" {
		t.Fatalf("%q, %v", buf, err)
	}
	if err := s.Signal(ssh.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 9 || string(rest) != "got USR1\n" {
		t.Errorf("%q, %v", rest, err)
	}
}

// The tail of the output must arrive even when the command ends at once after it.
func TestBurstThenExit(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	const size = 10 << 20
	loops := 30
	if testing.Short() {
		loops = 5
	}
	for i := range loops {
		s := newSession(t, c)
		var out, errs counter
		s.Stdout, s.Stderr = &out, &errs
		err := s.Run(fmt.Sprintf("head -c %d /dev/zero; head -c 100000 /dev/zero >&2; exit 3", size))
		var exit *ssh.ExitError
		if !errors.As(err, &exit) || exit.ExitStatus() != 3 || out != size || errs != 100000 {
			t.Fatalf("loop %d: %d and %d bytes, %v", i, out, errs, err)
		}
	}
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

func TestStdin(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	data := bytes.Repeat([]byte("0123456789abcde\x00"), 1<<18) // 4 MiB, binary
	s := newSession(t, c)
	s.Stdin = bytes.NewReader(data)
	var out bytes.Buffer
	s.Stdout = &out
	if err := s.Run("cat; echo end"); err != nil {
		t.Fatal(err)
	}
	if got, want := out.Bytes(), append(data, "end\n"...); !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, want %d", len(got), len(want))
	}
	// Input that nobody reads must not keep the session from ending.
	s = newSession(t, c)
	in, _ := s.StdinPipe()
	if err := s.Start("exec <&-; exit 6"); err != nil {
		t.Fatal(err)
	}
	in.Write(data) // fails when the session is over before all is sent
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 6 {
		t.Error(err)
	}
}

func TestBackgroundChildHoldsOutput(t *testing.T) {
	j := start(t, options{})
	ch, reqs, err := j.dial().OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(j.parent, "go")
	command := fmt.Sprintf("mkfifo %[1]s; (read x < %[1]s; echo late) & echo early; exit 4", fifo)
	if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ S string }{command})); !ok || err != nil {
		t.Fatal(ok, err)
	}
	req := <-reqs // only then the child is let go: the code came while the output was open
	if req.Type != "exit-status" || !bytes.Equal(req.Payload, []byte{0, 0, 0, 4}) {
		t.Fatalf("%s %x", req.Type, req.Payload)
	}
	if err := os.WriteFile(fifo, []byte("x\n"), 0); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(ch)
	if string(out) != "early\nlate\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	for req := range reqs {
		t.Errorf("another request: %s", req.Type)
	}
}

// A client that drops the connection right after its exec request was answered, as the
// orchestrator does that creates the flag, must find its command done: every time.
func TestFireAndForget(t *testing.T) {
	j := start(t, options{})
	const n = 200
	dir := t.TempDir()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < n; i += 4 {
				c, err := j.dialAs("root", j.key)
				if err != nil {
					t.Error(err)
					return
				}
				s, err := c.NewSession()
				if err == nil {
					err = s.Start(fmt.Sprintf("cat /dev/null; touch %s/%d", dir, i))
				}
				if err != nil {
					t.Error(err)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	eventually(t, "all flag files are there", func() bool {
		found, _ := os.ReadDir(dir)
		return len(found) == n
	})
	eventually(t, "all sessions have ended", func() bool {
		return strings.Count(j.log.String(), `msg="session ended"`) == n
	})
}

// A process that outlives its client keeps running; writing to the client gives SIGPIPE.
func TestClientGoneSIGPIPE(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	s := newSession(t, c)
	mark := filepath.Join(t.TempDir(), "mark")
	out, _ := s.StdoutPipe()
	if err := s.Start(fmt.Sprintf(`sh -c 'while :; do echo x; done'; echo $? > %s.tmp; mv %[1]s.tmp %[1]s`, mark)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	eventually(t, "the loop has ended", func() bool { _, err := os.Stat(mark); return err == nil })
	if got, _ := os.ReadFile(mark); string(got) != "141\n" { // 128 + SIGPIPE
		t.Errorf("the loop ended with %q, want 141", got)
	}
}

// A client that reads no more says so; an endless command must then end by SIGPIPE.
func TestEndOfWrites(t *testing.T) {
	j := start(t, options{})
	s := newSession(t, j.dial())
	if err := s.Start("yes"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SendRequest("eow@openssh.com", false, nil); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.Signal() != "PIPE" {
		t.Errorf("yes ended with %v, want SIGPIPE", err)
	}
}

func TestTerminal(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	terminal := func(modes ssh.TerminalModes) *ssh.Session {
		s := newSession(t, c)
		if err := s.RequestPty("xterm", 33, 99, modes); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if out, err := terminal(nil).Output(`stty -onlcr; printf 'a\nb'`); err != nil || string(out) != "a\nb" {
		t.Errorf("raw bytes: %q, %v", out, err)
	}
	if out, err := terminal(ssh.TerminalModes{ssh.ONLCR: 0}).Output(`printf 'a\nb'`); err != nil || string(out) != "a\nb" {
		t.Errorf("ONLCR off: %q, %v", out, err)
	}
	if out, err := terminal(nil).Output("stty size; tty; ttyname=$(tty); test -c $ttyname && exec >/dev/tty && echo ok"); err != nil ||
		!strings.HasPrefix(string(out), "33 99\r\n/dev/pts/") || !strings.HasSuffix(string(out), "ok\r\n") {
		t.Errorf("%q, %v", out, err)
	}
	var exit *ssh.ExitError
	s := terminal(nil)
	s.Stdin = strings.NewReader("exit 42\n")
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 42 {
		t.Errorf("shell on a terminal: %v", err)
	}
	// Much output, then the end.
	s = terminal(nil)
	var n counter
	s.Stdout = &n
	if err := s.Run("stty -opost; head -c 3000000 /dev/zero"); err != nil || n != 3000000 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// Resizes before the command, and many of them, must neither block nor get lost.
func TestResize(t *testing.T) {
	j := start(t, options{})
	s := newSession(t, j.dial())
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		if err := s.WindowChange(50+i, 100+i); err != nil {
			t.Fatal(err)
		}
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Start("stty -echo; stty size; read x; stty size"); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("99 149\r\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "99 149\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
	for i := range 1000 {
		s.WindowChange(1000+i, 10)
	}
	if _, err := newProbe(s); err != nil { // answered after the last resize was handled
		t.Fatal(err)
	}
	io.WriteString(in, "\n")
	rest, _ := io.ReadAll(out)
	if err := s.Wait(); err != nil || string(rest) != "1999 10\r\n" {
		t.Errorf("%q, %v", rest, err)
	}
}

// newProbe sends a request that is refused, and so tells when those before it were handled.
func newProbe(s *ssh.Session) (bool, error) { return s.SendRequest("probe@test", true, nil) }

func TestOneCommandPerChannel(t *testing.T) {
	j := start(t, options{})
	ch, reqs, err := j.dial().OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	exec := func(typ, s string) bool {
		ok, err := ch.SendRequest(typ, true, ssh.Marshal(struct{ S string }{s}))
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if !exec("exec", "cat") || exec("exec", "true") || exec("subsystem", "sftp") || exec("env", "x") {
		t.Error("want the first command accepted, all others refused")
	}
	for range 1000 {
		ch.SendRequest("signal", false, ssh.Marshal(struct{ S string }{"URG"}))
	}
	ch.CloseWrite()
	if out, err := io.ReadAll(ch); len(out) > 0 || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}

func TestMaxSessions(t *testing.T) {
	j := start(t, options{config: "MaxSessions 3"})
	c := j.dial()
	var open []ssh.Channel
	for range 3 {
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		open = append(open, ch)
	}
	var refused *ssh.OpenChannelError
	if _, _, err := c.OpenChannel("session", nil); !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
		t.Errorf("the fourth session: %v", err)
	}
	if out, code := execute(t, j.dial(), "echo other connection"); code != 0 {
		t.Errorf("%q, %d", out, code)
	}
	// At the exact limit, again and again: the slot is free once the client sees the close.
	open[0].Close()
	for i := range 100 {
		var err error
		for {
			var s *ssh.Session
			if s, err = c.NewSession(); err != nil {
				if i == 0 && errors.As(err, &refused) {
					continue // our close of open[0] is still under way
				}
				t.Fatalf("session %d: %v", i, err)
			}
			err = s.Run("true")
			break
		}
		if err != nil {
			t.Fatalf("session %d: %v", i, err)
		}
	}
}

func TestRefusedChannelsAndRequests(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	for typ, reason := range map[string]ssh.RejectionReason{
		"direct-tcpip": ssh.Prohibited, "direct-streamlocal@openssh.com": ssh.Prohibited, "x11": ssh.UnknownChannelType,
	} {
		var refused *ssh.OpenChannelError
		if _, _, err := c.OpenChannel(typ, nil); !errors.As(err, &refused) || refused.Reason != reason {
			t.Errorf("%s: %v", typ, err)
		}
	}
	for _, typ := range []string{"keepalive@openssh.com", "tcpip-forward", "nonsense"} {
		if ok, _, err := c.SendRequest(typ, true, nil); ok || err != nil {
			t.Errorf("%s: %v, %v; want an answer, and a failure", typ, ok, err)
		}
	}
	newSession(t, c)
	c.SendRequest("no-more-sessions@openssh.com", false, nil)
	c.SendRequest("keepalive@openssh.com", true, nil) // requests are handled in order
	if _, err := c.NewSession(); err == nil {
		t.Error("a session was opened after no-more-sessions")
	}
}
