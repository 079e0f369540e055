// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// answering listens and answers each connection's whole input, in capitals, after its end.
func answering(t testing.TB, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				io.WriteString(c, strings.ToUpper(string(b)))
			}()
		}
	}()
	return l
}

// asks sends text over c, ends that direction and returns what comes.
func asks(c net.Conn, text string) string {
	defer c.Close()
	io.WriteString(c, text)
	c.(interface{ CloseWrite() error }).CloseWrite()
	b, _ := io.ReadAll(c)
	return string(b)
}

// background runs cmd until the test ends; stop ends it before.
func background(t testing.TB, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return stop
}

// agentWith starts an ssh-agent that holds the job's key and returns its socket.
func agentWith(t testing.TB, j *job) string {
	t.Helper()
	testkit.NeedTool(t, "ssh-agent", "ssh-add")
	sock := filepath.Join(t.TempDir(), "agent")
	background(t, exec.Command("ssh-agent", "-D", "-a", sock))
	awaitSocket(t, sock)
	add := exec.Command("ssh-add", j.key.path)
	add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+sock)
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v: %s", err, out)
	}
	return sock
}

// withAgent is ssh -A with the agent at sock.
func (j *job) withAgent(sock string, args ...string) *exec.Cmd {
	cmd := j.tool("ssh", append([]string{"-A"}, args...)...)
	cmd.Args[slices.Index(cmd.Args, "IdentityAgent=none")] = "IdentityAgent=" + sock
	return cmd
}

func awaitSocket(t testing.TB, path string) {
	t.Helper()
	eventually(t, path+" listens", func() bool {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// TestForwarding is what people do with ssh's options, in a plain job and in a jailed one.
func TestForwarding(t *testing.T) {
	for _, level := range []string{"plain", "jailed"} {
		t.Run(level, func(t *testing.T) {
			testkit.NeedRoot(t)
			o := options{}
			if level == "jailed" {
				o.root = imageRoot(t, "curl", "ssh-add")
			}
			j := start(t, o)
			t.Logf("%s", regexp.MustCompile(`msg=jail level=\w+`).FindString(j.log.String()))
			root := filepath.Join(j.parent, "image-root")
			before, err := tree.Take(root)
			if err != nil {
				t.Fatal(err)
			}
			// In the sessions' view, and in the test's.
			inside, seen := t.TempDir(), ""
			if level == "jailed" {
				inside, seen = "/tmp", filepath.Join(root, "tmp")
			} else {
				seen = inside
			}
			dir := t.TempDir()
			web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprintf(w, "%s of %s", r.URL.Path, r.Host) // a proxy, too
			}))
			defer web.Close()
			webAddr := web.Listener.Addr().String()
			agent := agentWith(t, j)

			cmd := j.withAgent(agent, "-N", "-o", "ExitOnForwardFailure=yes",
				"-M", "-S", dir+"/master",
				"-L", dir+"/tcp:"+webAddr, // a port here
				"-R", "0:"+webAddr, // a port there
				"-R", inside+"/web:"+webAddr, // a socket there
				"-L", dir+"/unix:"+inside+"/web", // and back to it
				host)
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			stop := background(t, cmd)
			var proxy string
			for lines := bufio.NewScanner(stderr); proxy == "" && lines.Scan(); {
				if m := regexp.MustCompile(`Allocated port (\d+)`).FindStringSubmatch(lines.Text()); m != nil {
					proxy = m[1]
				}
			}
			go io.Copy(io.Discard, stderr)
			eventually(t, "the socket is there", func() bool { _, err := os.Lstat(seen + "/web"); return err == nil })
			awaitSocket(t, dir+"/unix")

			held, socks, err := port.Hold("127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer held.Close()
			if _, errs, code := run(t, j.tool("ssh", "-S", dir+"/master", "-O", "forward", "-D", socks.String(), host)); code != 0 {
				t.Fatal(errs)
			}

			curl := func(args ...string) string {
				out, errs, code := run(t, exec.Command("curl", append([]string{"-sS", "--max-time", "30"}, args...)...))
				if code != 0 {
					return fmt.Sprintf("%d %s", code, errs)
				}
				return out
			}
			for what, got := range map[string]string{
				"-L":              curl("--unix-socket", dir+"/tcp", "http://a.test/x"),
				"-D":              curl("--socks5-hostname", socks.String(), "http://"+webAddr+"/x", "-H", "Host: a.test"),
				"-L, Unix socket": curl("--unix-socket", dir+"/unix", "http://a.test/x"),
			} {
				if got != "/x of a.test" {
					t.Errorf("%s: %q", what, got)
				}
			}
			// Sessions on the same connection: a proxy for the package manager, a socket, the agent.
			for _, tt := range []struct{ command, want string }{
				{"curl -sS --max-time 30 -x http://127.0.0.1:" + proxy + " http://packages.invalid/x", "/x of packages.invalid"},
				{"curl -sS --max-time 30 --unix-socket " + inside + "/web http://a.test/x", "/x of a.test"},
				{"ssh-add -l", j.key.fingerprint()},
				{"echo $SSH_AUTH_SOCK", "/tmp/ssh-"},
			} {
				cmd := j.withAgent(agent, "-S", dir+"/master", host, tt.command)
				if out, errs, code := run(t, cmd); code != 0 || !strings.Contains(out, tt.want) {
					t.Errorf("%s: %q, %q, %d", tt.command, out, errs, code)
				}
			}
			if st, err := os.Lstat(seen + "/web"); err != nil || st.Mode() != os.ModeSocket|0o600 {
				t.Errorf("the socket: %v, %v", st.Mode(), err)
			}

			// A path that is in use is refused, unless the server may remove what is there.
			_, errs, code := run(t, j.tool("ssh", "-o", "ExitOnForwardFailure=yes", "-R", inside+"/web:"+webAddr, host, "true"))
			if code == 0 || !strings.Contains(errs, "remote port forwarding failed for listen path") {
				t.Errorf("the same path again: %d, %s", code, errs)
			}

			// The client vanishes, and with it all it left.
			stop()
			eventually(t, "the sockets are gone and the tree is as before", func() bool {
				after, err := tree.Take(root)
				_, there := os.Lstat(seen + "/web")
				return err == nil && len(before.Diff(after, tree.NoMtime)) == 0 && there != nil
			})
			j.awaitLog("forward ended")
		})
	}
}

// TestForwardingAtShutdown promises that no socket is in the tree that is packed.
func TestForwardingAtShutdown(t *testing.T) {
	o := options{root: imageRoot(t)}
	before, err := tree.Take(o.root)
	if err != nil {
		t.Fatal(err)
	}
	j := start(t, o)
	root := filepath.Join(j.parent, "image-root")
	agent := agentWith(t, j)
	background(t, j.withAgent(agent, "-R", "/root/a.sock:/nothing", host, "sleep 1000"))
	j.awaitLog("session started")
	for _, path := range []string{"/root/a.sock", "/tmp/ssh-*/agent.*"} {
		if found, err := filepath.Glob(root + path); err != nil || len(found) != 1 {
			t.Errorf("%s: %v, %v", path, found, err)
		}
	}
	if out, code := execute(t, j.dial(), "touch /tmp/complete"); code != 0 {
		t.Fatal(out)
	}
	if err := j.await(); err != nil {
		t.Fatal(err)
	}
	after, err := tree.Take(root)
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(after, tree.NoMtime); len(d) > 0 {
		t.Errorf("the tree changed: %v", d)
	}
}

// TestForwardingInChroot is TestForwarding with the pod's default capabilities, as far as the level of the jail asks.
func TestForwardingInChroot(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "capsh")
	cmd := exec.Command("capsh", "--drop=cap_sys_admin", "--", "-c", `exec "$0" "$@"`,
		os.Args[0], "-test.v", "-test.run", "^TestForwarding$/^jailed$|^TestForwardingAtShutdown$")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "level=chroot") {
		t.Errorf("%v, %s", err, out)
	}
}

// TestJump goes through the gateway to itself, with -J and with -W, and to where nobody listens.
func TestJump(t *testing.T) {
	j := start(t, options{})
	_, port, _ := net.SplitHostPort(j.addr)
	conf := filepath.Join(t.TempDir(), "config")
	j.write(conf, fmt.Sprintf("Host *\nUser root\nPort %s\nIdentityFile %s\nIdentitiesOnly yes\nIdentityAgent none\n"+
		"StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nBatchMode yes\n", port, j.key.path))
	if out, errs, code := run(t, exec.Command("ssh", "-F", conf, "-J", "127.0.0.1", "localhost", "echo $SSH_CONNECTION")); code != 0 ||
		!strings.HasSuffix(out, " "+port+"\n") {
		t.Errorf("-J: %q, %s, %d", out, errs, code)
	}
	l := answering(t, "tcp", "127.0.0.1:0")
	cmd := j.tool("ssh", "-W", l.Addr().String(), host)
	cmd.Stdin = strings.NewReader("through")
	if out, errs, code := run(t, cmd); out != "THROUGH" || code != 0 {
		t.Errorf("-W: %q, %s, %d", out, errs, code)
	}
	for to, want := range map[string]string{
		"127.0.0.1:1":    "open failed: connect failed: Connection refused",
		"name.invalid:1": "open failed: connect failed: ",
	} {
		if _, errs, code := run(t, j.tool("ssh", "-W", to, host)); code == 0 || !strings.Contains(errs, want) {
			t.Errorf("-W %s: %s, %d", to, errs, code)
		}
	}
}

func TestBindAddresses(t *testing.T) {
	for _, tt := range []struct{ gatewayPorts, host, want string }{
		{"no", "", "127.0.0.1 ::1"}, {"no", "*", "127.0.0.1 ::1"}, {"no", "0.0.0.0", "127.0.0.1 ::1"},
		{"no", "localhost", "127.0.0.1 ::1"}, {"no", "127.0.0.1", "127.0.0.1"}, {"no", "::1", "::1"}, {"no", "name", "127.0.0.1 ::1"},
		{"yes", "localhost", "0.0.0.0 ::"}, {"yes", "127.0.0.1", "0.0.0.0 ::"}, {"yes", "", "0.0.0.0 ::"},
		{"clientspecified", "", "0.0.0.0 ::"}, {"clientspecified", "*", "0.0.0.0 ::"}, {"clientspecified", "localhost", "127.0.0.1 ::1"},
		{"clientspecified", "0.0.0.0", "0.0.0.0"}, {"clientspecified", "127.0.0.1", "127.0.0.1"}, {"clientspecified", "name", "name"},
	} {
		if got := strings.Join(bindAddresses(tt.gatewayPorts, tt.host), " "); got != tt.want {
			t.Errorf("GatewayPorts %s, %q: %s, want %s", tt.gatewayPorts, tt.host, got, tt.want)
		}
	}
}

// TestRemoteForward looks at what the client is told, and at the cancellation.
func TestRemoteForward(t *testing.T) {
	j := start(t, options{config: "GatewayPorts clientspecified\nStreamLocalBindUnlink yes\nStreamLocalBindMask 0111"})
	c := j.dial()
	type listen struct {
		Host string
		Port uint32
	}
	request := func(typ string, l listen) (bool, []byte) {
		ok, answer, err := c.SendRequest(typ, true, ssh.Marshal(l))
		if err != nil {
			t.Fatal(err)
		}
		return ok, answer
	}
	channels := c.HandleChannelOpen("forwarded-tcpip")
	for _, host := range []string{"", "localhost", "127.0.0.1"} {
		ok, answer := request("tcpip-forward", listen{host, 0})
		var got struct{ Port uint32 }
		if err := ssh.Unmarshal(answer, &got); !ok || err != nil || got.Port == 0 {
			t.Fatalf("%q: %v, %x", host, ok, answer)
		}
		addr := fmt.Sprintf("127.0.0.1:%d", got.Port)
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		nch := <-channels
		var m struct {
			Host       string
			Port       uint32
			Originator string
			From       uint32
		}
		from := nc.LocalAddr().(*net.TCPAddr)
		if err := ssh.Unmarshal(nch.ExtraData(), &m); err != nil || m.Host != host || m.Port != got.Port ||
			m.Originator != "127.0.0.1" || int(m.From) != from.Port {
			t.Errorf("%q: the client is told %+v, %v", host, m, err)
		}
		ch, reqs, err := nch.Accept()
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		if ok, answer := request("cancel-tcpip-forward", listen{host, got.Port}); !ok || len(answer) != 0 {
			t.Errorf("%q: cancel: %v, %x", host, ok, answer)
		}
		if _, err := net.Dial("tcp", addr); err == nil {
			t.Errorf("%q: still listens", host)
		}
		// What is connected stays connected.
		go func() {
			b, _ := io.ReadAll(ch)
			ch.Write([]byte(strings.ToUpper(string(b))))
			ch.Close()
		}()
		if got := asks(nc, "after"); got != "AFTER" {
			t.Errorf("%q: %q", host, got)
		}
		if ok, _ := request("cancel-tcpip-forward", listen{host, got.Port}); ok {
			t.Errorf("%q: cancelled twice", host)
		}
	}
	j.awaitLog(`on="0.0.0.0:`)
	// A socket in the place of another, with the mode that sshd_config asks for.
	path := filepath.Join(t.TempDir(), "sock")
	for range 2 {
		if _, err := c.ListenUnix(path); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode() != os.ModeSocket|0o666 {
			t.Errorf("socket: %v, %v", st, err)
		}
	}
	if ok, _ := request("tcpip-forward", listen{"localhost", 1 << 16}); ok {
		t.Error("port 65536")
	}
	if ok, _, err := c.SendRequest("tcpip-forward", true, []byte("junk")); ok || err != nil {
		t.Errorf("junk: %v, %v", ok, err)
	}
}

// TestForwardingLimits: the connection that asks for too much is told so, and the others do not notice.
func TestForwardingLimits(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for i := range maxForwarded + 1 {
		_, err := c.Dial("tcp", silent.Addr().String())
		if i < maxForwarded && err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i == maxForwarded && (err == nil || !strings.Contains(err.Error(), errForwarded.Error())) {
			t.Errorf("one connection too many: %v", err)
		}
	}
	for i := range maxListeners + 1 {
		_, err := c.Listen("tcp", "127.0.0.1:0")
		if (err == nil) != (i < maxListeners) {
			t.Fatalf("listener %d: %v", i, err)
		}
	}
	j.awaitLog(errListeners.Error())
	l := answering(t, "tcp", "127.0.0.1:0")
	nc, err := j.dial().Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if got := asks(nc, "x"); got != "X" {
		t.Errorf("%q", got)
	}
}

// TestForwardingLeaksNothing: whoever ends a forwarding, and however.
func TestForwardingLeaksNothing(t *testing.T) {
	j := start(t, options{})
	answer := answering(t, "tcp", "127.0.0.1:0")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	dir := t.TempDir()
	rounds := 0
	round := func() {
		c, err := j.dialAs("root", j.key)
		if err != nil {
			t.Fatal(err)
		}
		nc, err := c.Dial("tcp", answer.Addr().String())
		if err != nil || asks(nc, "x") != "X" {
			t.Fatal(err)
		}
		if nc, err = c.Dial("tcp", silent.Addr().String()); err != nil { // the target ends it
			t.Fatal(err)
		}
		theirs, err := silent.Accept()
		if err != nil {
			t.Fatal(err)
		}
		theirs.(*net.TCPConn).SetLinger(0)
		theirs.Close()
		io.ReadAll(nc)
		if nc, err = c.Dial("tcp", silent.Addr().String()); err != nil { // the client closes the channel at once
			t.Fatal(err)
		}
		nc.Write(make([]byte, 1<<16))
		nc.Close()
		if theirs, err = silent.Accept(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(theirs); err != nil || len(b) != 1<<16 {
			t.Errorf("%d bytes of what was sent before the close, %v", len(b), err)
		}
		theirs.Close()
		if _, err = c.Dial("tcp", silent.Addr().String()); err != nil { // the connection is lost
			t.Fatal(err)
		}
		if theirs, err = silent.Accept(); err != nil {
			t.Fatal(err)
		}
		for _, l := range []struct{ network, addr string }{{"tcp", "127.0.0.1:0"}, {"unix", filepath.Join(dir, "sock")}} {
			if _, err := c.Listen(l.network, l.addr); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
		io.ReadAll(theirs)
		rounds++ // of four forwardings; this target neither writes nor hangs up
		eventually(t, "all have ended", func() bool { return strings.Count(j.log.String(), "forward ended") == 4*rounds })
		theirs.Close()
		eventually(t, "the socket is gone", func() bool { _, err := os.Lstat(filepath.Join(dir, "sock")); return err != nil })
	}
	count := func() (fds, goroutines int) {
		ents, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(ents), runtime.NumGoroutine()
	}
	round()
	fds, goroutines := count()
	for range 20 {
		round()
	}
	eventually(t, "nothing is left", func() bool {
		f, g := count()
		return f <= fds && g <= goroutines
	})
}

// panicking is a connection whose reader panics.
type panicking struct{ duplex }

func (panicking) Read([]byte) (int, error) { panic("for the test") }

// TestForwardingPanic: it ends its own forwarding and nothing else.
func TestForwardingPanic(t *testing.T) {
	l := answering(t, "tcp", "127.0.0.1:0")
	j := start(t, options{})
	client := j.dial()
	good, err := client.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	f := &forwards{c: &conn{log: slog.New(slog.NewTextHandler(log, nil)), gone: make(chan struct{})}}
	ch, reqs, err := client.OpenChannel("direct-tcpip", ssh.Marshal(struct {
		Host string
		Port uint32
		From string
		P    uint32
	}{"127.0.0.1", uint32(l.Addr().(*net.TCPAddr).Port), "", 0}))
	if err != nil {
		t.Fatal(err)
	}
	f.relay(f.c.log, ch, reqs, panicking{nc.(duplex)})
	if !strings.Contains(log.String(), "panic in forward") || !strings.Contains(log.String(), "forward ended") {
		t.Errorf("log: %s", log)
	}
	if got := asks(good, "still"); got != "STILL" {
		t.Errorf("the other forwarding: %q", got)
	}
}

// TestHalfClose keeps each direction open long after the other has ended.
func TestHalfClose(t *testing.T) {
	j := start(t, options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := j.dial()
	nc, err := c.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	theirs.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(theirs, "first")
	theirs.(*net.TCPConn).CloseWrite() // the target's EOF reaches the client
	if b, err := io.ReadAll(nc); err != nil || string(b) != "first" {
		t.Errorf("%q, %v", b, err)
	}
	big := strings.Repeat("x", 3<<20) // more than a window
	go func() {
		io.WriteString(nc, big)
		nc.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if b, err := io.ReadAll(theirs); err != nil || string(b) != big {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
