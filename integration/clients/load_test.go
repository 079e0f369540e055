// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// soak reports whether the long form of the tests that have one is wanted.
func soak() bool { return os.Getenv("IMS_BUILDENV_SOAK") == "1" }

// New keys again and again in the middle of transfers both ways at once, whoever asks for them.
func TestRekey(t *testing.T) {
	size := 24 << 20
	if soak() {
		size = 200 << 20
	}
	for name, tt := range map[string]struct{ server, client string }{
		"client": {"", "RekeyLimit=1M"}, "server": {"RekeyLimit 1M\n", "RekeyLimit=default"}, "both": {"RekeyLimit 1M 1h\n", "RekeyLimit=700K"},
	} {
		t.Run(name, func(t *testing.T) {
			g := own(t, settings{level: plain, options: tt.server})
			data := noise(size)
			cmd := g.tool(t, "ssh", "-v", "-o", tt.client, "-o", "LogLevel=DEBUG1", "job", "cat")
			cmd.Stdin = bytes.NewReader(data)
			sum := sha256.New()
			cmd.Stdout = sum
			_, errs, code := run(t, cmd)
			if want := sha256.Sum256(data); code != 0 || !bytes.Equal(sum.Sum(nil), want[:]) {
				t.Errorf("other bytes came back, or %d: %s", code, errs[max(0, len(errs)-2000):])
			}
			if n := strings.Count(errs, "SSH2_MSG_NEWKEYS received"); n < size>>21 {
				t.Errorf("only %d key exchanges", n)
			}
		})
	}
}

// A command that says nothing for many intervals of both sides' keepalives.
func TestKeepalives(t *testing.T) {
	g := own(t, settings{level: plain, options: "ClientAliveInterval 1\nClientAliveCountMax 2"})
	if err := g.cmd.Process.Signal(syscall.SIGHUP); err != nil { // has OpenSSH's sshd read its file again; the job goes on
		t.Fatal(err)
	}
	out, errs, code := run(t, g.tool(t, "ssh", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2", "job", "sleep 5; echo still here"))
	if out != "still here\n" || code != 0 {
		t.Errorf("%q, %q, %d", out, errs, code)
	}
}

// Fifty connections at once, and one that breaks off in the middle of each of its steps.
func TestConcurrentConnections(t *testing.T) {
	g := common(t, namespaces)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			out, errs, code := run(t, g.tool(t, "ssh", "job", fmt.Sprintf("head -c 100000 /dev/zero | wc -c; exit %d", i)))
			if out != "100000\n" || code != i {
				t.Errorf("connection %d: %q, %q, %d", i, out, errs, code)
			}
		})
	}
	for _, s := range stages {
		wg.Go(func() { g.abort(t, s) })
	}
	wg.Wait()
}

// Strangers who fill every place there is do not keep the user with a key out.
func TestFlood(t *testing.T) {
	g := own(t, settings{level: chroot, options: "MaxStartups 50\nMaxSessions 2"})
	c := g.dial(t)
	for range 2 { // the connection the user has is full
		s, err := c.NewSession()
		if err == nil {
			_, err = s.StdinPipe()
		}
		if err == nil {
			err = s.Start("cat")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.NewSession(); err == nil {
		t.Error("a session beyond MaxSessions")
	}
	stop := make(chan struct{})
	var over atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	const strangers = 150 // three for each place
	opened := make(chan struct{}, strangers)
	for range strangers {
		wg.Go(func() {
			for first := true; ; first = false {
				nc, err := net.Dial("tcp", g.address())
				if first {
					opened <- struct{}{}
				}
				if err != nil {
					if !over.Load() {
						t.Errorf("the port does not answer: %v", err)
					}
					return
				}
				// Closed when it is the oldest; then the next one comes.
				done := make(chan struct{})
				go func() { io.Copy(io.Discard, nc); close(done) }()
				select {
				case <-done:
					nc.Close()
					time.Sleep(200 * time.Millisecond) // bounds the flood, waits for nothing
				case <-stop:
					nc.Close()
					<-done
					return
				}
			}
		})
	}
	for range strangers {
		<-opened
	}
	for range 5 {
		if out := must(t, g.tool(t, "ssh", "job", "echo in")); out != "in\n" {
			t.Errorf("%q", out)
		}
	}
	over.Store(true)
	must(t, g.tool(t, "ssh", "job", "touch /tmp/complete"))
	eventually(t, "the job ends", func() bool {
		_, err := os.Stat(filepath.Join(g.dir, "job/exiting"))
		return err == nil
	})
}

// stages are where a client may break off.
var stages = []string{"connect", "version", "kex", "auth", "exec", "sftp"}

// abort connects, gets to the stage, and closes the connection with a reset.
func (g *gateway) abort(t *testing.T, stage string) {
	nc, err := net.Dial("tcp", g.address())
	if err != nil {
		t.Error(err)
		return
	}
	nc.(*net.TCPConn).SetLinger(0)
	defer nc.Close()
	switch stage {
	case "connect":
		return
	case "version":
		io.WriteString(nc, "SSH-2.0-Bro")
		return
	case "kex":
		io.WriteString(nc, "SSH-2.0-OpenSSH_9.2\r\n\x00\x00\x04\x00\x06\x14half a packet")
		io.ReadFull(nc, make([]byte, 40))
		return
	}
	key, err := os.ReadFile(g.identity)
	if err != nil {
		t.Error(err)
		return
	}
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		t.Error(err)
		return
	}
	sc, chans, reqs, err := ssh.NewClientConn(nc, g.address(), &ssh.ClientConfig{User: "root",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey()})
	if err != nil {
		t.Error(err)
		return
	}
	c := ssh.NewClient(sc, chans, reqs)
	if stage == "auth" {
		return
	}
	s, err := c.NewSession()
	if err == nil && stage == "exec" {
		err = s.Start("cat; head -c 100000 /dev/zero")
	} else if err == nil {
		err = s.RequestSubsystem("sftp")
	}
	if err != nil {
		t.Error(err)
	}
}

// use is what a gateway holds: memory of its two processes in KiB, descriptors, threads.
type use struct{ rss, initRSS, files, initFiles, threads, processes int }

func (g *gateway) use(t *testing.T) use {
	t.Helper()
	pid := g.cmd.Process.Pid
	below := descendants(t, pid)
	if len(below) == 0 {
		t.Fatal("the jail's init is gone")
	}
	files := func(pid int) int {
		found, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	return use{rss: memory(t, pid, "VmRSS"), initRSS: memory(t, below[0], "VmRSS"), files: files(pid), initFiles: files(below[0]),
		threads: memory(t, pid, "Threads"), processes: len(below)}
}

// Nothing is left of commands that ran and of clients that went away.
func TestSoak(t *testing.T) {
	execs, aborts := 2000, 500
	if soak() {
		execs, aborts = 20000, 5000
	}
	g := own(t, settings{level: chroot, options: "LogLevel ERROR"})
	many := func(n int, f func(i int)) {
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := w; i < n; i += 8 {
					f(i)
				}
			})
		}
		wg.Wait()
	}
	round := func(execs, aborts int) use {
		c, err := g.tryDial(ssh.ClientConfig{})
		if err != nil {
			t.Fatal(err)
		}
		many(execs, func(i int) {
			s, err := c.NewSession()
			if err != nil {
				t.Error(err)
				return
			}
			if out, err := s.Output("echo $((1+1))"); string(out) != "2\n" || err != nil {
				t.Errorf("exec: %q, %v", out, err)
			}
		})
		many(aborts, func(i int) { g.abort(t, stages[i%len(stages)]) })
		c.Close()
		// Quiet again: descriptors and processes as at the start, whatever memory is held.
		var u use
		eventually(t, "all sessions have ended", func() bool { u = g.use(t); return u.processes == 1 })
		return u
	}
	before := round(execs/10, aborts/10)
	t.Logf("warm: %+v", before)
	after := round(execs, aborts)
	eventually(t, "descriptors are back", func() bool {
		after = g.use(t)
		return after.files <= before.files && after.initFiles <= before.initFiles
	})
	t.Logf("after %d execs and %d aborted connections: %+v", execs, aborts, after)
	if after.rss > before.rss+16<<10 || after.initRSS > before.initRSS+8<<10 {
		t.Errorf("memory grew from %d and %d KiB to %d and %d", before.rss, before.initRSS, after.rss, after.initRSS)
	}
}

// What ends well once in a hundred times too early shows in a loop only: a transfer whose channel closes before its exit
// status, a burst of output whose tail is lost.
func TestRepeated(t *testing.T) {
	loops := 15
	if soak() {
		loops = 500
	}
	g := common(t, chroot)
	here, there := g.space(t)
	local := t.TempDir()
	const workers = 3
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			c := g.dial(t)
			for i := w; i < loops; i += workers {
				from, to, back := fmt.Sprintf("%s/from-%d", local, w), fmt.Sprintf("to-%d", w), fmt.Sprintf("%s/back-%d", local, w)
				data := noise(i * 7919) // around the sizes of packets and windows, from nothing to megabytes
				save(t, from, data)
				batch := fmt.Sprintf("%s/batch-%d", local, w)
				save(t, batch, fmt.Appendf(nil, "put %s %s/%s\nget %[2]s/%[3]s %[4]s\n", from, there, to, back))
				for _, cmd := range []*exec.Cmd{
					g.tool(t, "sftp", "-q", "-b", batch, "job"),
					g.tool(t, "scp", "-q", "-s", from, "job:"+there+"/"+to+".s"),
					g.tool(t, "scp", "-q", "-O", "job:"+there+"/"+to, back+".O"),
				} {
					if out, errs, code := run(t, cmd); code != 0 {
						t.Errorf("loop %d: %s: exit %d\n%s%s", i, cmd, code, out, errs)
					}
				}
				for _, copied := range []string{back, back + ".O", filepath.Join(here, to), filepath.Join(here, to+".s")} {
					same(t, copied, data)
				}
				burst := 10 << 20
				s, err := c.NewSession()
				if err != nil {
					t.Error(err)
					return
				}
				var got counter
				s.Stdout = &got
				var exit *ssh.ExitError
				if err := s.Run(fmt.Sprintf("head -c %d /dev/zero; exit 3", burst)); !errors.As(err, &exit) || exit.ExitStatus() != 3 || int(got) != burst {
					t.Errorf("burst %d: %d bytes of %d, %v", i, got, burst, err)
				}
			}
		})
	}
	wg.Wait()
}
