// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// runDir is where a test's job has its status socket.
func (j *job) runDir() string { return filepath.Join(filepath.Dir(j.keys), "run") }

func (j *job) status() *status {
	j.t.Helper()
	st, err := ask(j.runDir(), statusRequest{})
	if err != nil {
		j.t.Fatal(err)
	}
	return st
}

// session waits for a session of the kind and returns it with its connection.
func (j *job) session(kind string) (found sessionStatus, of connStatus) {
	j.t.Helper()
	eventually(j.t, "status lists a session of kind "+kind, func() bool {
		for _, c := range j.status().Connections {
			for _, s := range c.Sessions {
				if s.Kind == kind {
					found, of = s, c
					return true
				}
			}
		}
		return false
	})
	return found, of
}

func TestStatus(t *testing.T) {
	j := start(t, options{})
	tool := func(name string, args ...string) (io.Writer, func() int) {
		cmd := j.tool(name, args...)
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
		return in, func() int { cmd.Wait(); return cmd.ProcessState.ExitCode() }
	}
	_, shellEnds := tool("ssh", "-tt", host)
	_, execEnds := tool("ssh", host, "echo out; sleep 1000; # \x1b[31mhostile\n")
	sftpCommands, sftpEnds := tool("sftp", host)

	shell, of := j.session("shell")
	if !shell.TTY || shell.PID == 0 || shell.Command != "" || of.Key != j.key.fingerprint() || of.Comment != "the user" ||
		!of.Authenticated || !strings.Contains(of.Client, "OpenSSH") || shell.ID != of.ID+".1" {
		t.Errorf("shell: %+v of %+v", shell, of)
	}
	command, execConn := j.session("exec")
	eventually(t, "the output is counted", func() bool { command, execConn = j.session("exec"); return command.Out == 4 })
	if command.TTY || !strings.HasPrefix(command.Command, "echo out; sleep") || execConn.In < 1000 || execConn.Out < 1000 {
		t.Errorf("exec: %+v of %+v", command, execConn)
	}
	sftp, sftpConn := j.session("sftp")
	if sftp.TTY || sftp.ID != sftpConn.ID+".1" {
		t.Errorf("sftp: %+v", sftp)
	}

	var out, errs bytes.Buffer
	if code := statusMain(nil, j.runDir(), &out, &errs); code != 0 {
		t.Errorf("status: %d, %s", code, &errs)
	}
	lines := strings.Split(out.String(), "\n")
	if len(lines) != 5 || !strings.HasPrefix(lines[0], "ID ") || strings.ContainsAny(out.String(), "\x1b\r") || !strings.Contains(out.String(), `\x1b[31mhostile\n`) {
		t.Errorf("table:\n%q", &out)
	}
	out.Reset()
	if code := statusMain([]string{"--json"}, j.runDir(), &out, &errs); code != 0 {
		t.Errorf("status: %d, %s", code, &errs)
	}
	var st status
	if err := json.Unmarshal(out.Bytes(), &st); err != nil || len(st.Connections) != 3 || st.Jail != "plain" || st.PID != os.Getpid() {
		t.Errorf("%v: %s", err, &out)
	}

	for _, id := range []string{shell.ID, command.ID, sftpConn.ID} {
		if code := statusMain([]string{"--close", id}, j.runDir(), &out, &errs); code != 0 {
			t.Errorf("close %s: %d, %s", id, code, &errs)
		}
	}
	if code := shellEnds(); code == 0 {
		t.Error("the shell ended as if nothing had happened")
	}
	if code := execEnds(); code == 0 {
		t.Error("the command ended as if nothing had happened")
	}
	// One that waits for a command does not notice before it has one.
	io.WriteString(sftpCommands, "ls\n")
	if code := sftpEnds(); code == 0 {
		t.Error("sftp ended as if nothing had happened")
	}
	eventually(t, "nobody is there", func() bool { return len(j.status().Connections) == 0 })
	j.awaitLog(`by=server why="sshd status --close" authenticated=true`)
	if code := statusMain([]string{"--close", "77"}, j.runDir(), &out, &errs); code != 1 || !strings.Contains(errs.String(), "no connection or session") {
		t.Errorf("close 77: %d, %s", code, &errs)
	}
	if code := statusMain([]string{"what"}, j.runDir(), &out, &errs); code != 2 {
		t.Errorf("status what: %d", code)
	}
	if strings.Contains(j.log.String(), "sleep 1000") {
		t.Error("the command is in the log")
	}
	j.cancel()
	<-j.ended
	errs.Reset()
	if code := statusMain(nil, j.runDir(), &out, &errs); code != 1 || !strings.Contains(errs.String(), "no gateway is running here") {
		t.Errorf("afterwards: %d, %s", code, &errs)
	}
}

// TestStatusSocket: the socket is root's alone; one that a killed gateway left is no obstacle, a live one is.
func TestStatusSocket(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	l, err := listenStatus(dir, "../a/job")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, ".._a_job.sock")
	for name, mode := range map[string]os.FileMode{dir: os.ModeDir | 0o700, path: os.ModeSocket | 0o600} {
		if st, err := os.Lstat(name); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, mode)
		}
	}
	if _, err := listenStatus(dir, "../a/job"); err == nil || !strings.Contains(err.Error(), "another gateway") {
		t.Errorf("a second one: %v", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := ask(dir, statusRequest{}); err == nil || !strings.Contains(err.Error(), "no gateway is running") {
		t.Errorf("a stale socket: %v", err)
	}
	if l, err = listenStatus(dir, "../a/job"); err != nil {
		t.Fatalf("in place of a stale socket: %v", err)
	}
	l.Close()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := listenStatus(dir, "job"); err == nil {
		t.Error("listens in a directory that is open to others")
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := listenStatus(dir, "job"); err == nil {
		t.Error("listens behind a link")
	}
}

// dialArg makes this test program, inside a jail, one that looks for the status socket.
const dialArg = "dial-status"

func dialStatus(path string) {
	for _, p := range []string{path, "/../../../../../../.." + path, "/proc/1/root" + path, "/proc/self/cwd/../../../.." + path} {
		if c, err := net.Dial("unix", p); err == nil {
			c.Close()
			fmt.Println("reached", p)
		}
	}
	// Sockets without a name are visible in every root of the network namespace.
	if b, err := os.ReadFile("/proc/net/unix"); err == nil && bytes.Contains(b, []byte("@"+path)) {
		fmt.Println("reached an abstract socket")
	}
	fmt.Println("looked")
}

// TestStatusOutOfReach: ATTACK: root in a jail looks for the gateway's socket. PROMISE: only where there is no jail
// the socket is found.
func TestStatusOutOfReach(t *testing.T) {
	for _, level := range []jail.Level{jail.Plain, jail.Chroot, jail.Auto} {
		t.Run(level.String(), func(t *testing.T) {
			root := imageRoot(t)
			program := filepath.Join(root, "usr/bin/dial")
			self, err := os.ReadFile("/proc/self/exe")
			if err == nil {
				err = os.WriteFile(program, self, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
			if level != jail.Plain {
				program = "/usr/bin/dial"
			}
			var j *jail.Jail
			eventually(t, "the jail holds: a process of another test may lead out for a moment", func() bool {
				j, err = jail.Start(t.Context(), jail.Config{Root: root, Level: level, Log: slog.New(slog.DiscardHandler)})
				if err != nil {
					t.Log(err)
				}
				return err == nil
			})
			t.Cleanup(func() { j.Stop(context.Background(), 0) })
			t.Log("level", j.Level()) // Auto: namespaces where this machine allows them
			l, err := listenStatus(filepath.Join(t.TempDir(), "run"), "job")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			child, ours, err := pipe(false)
			if err != nil {
				t.Fatal(err)
			}
			p, err := j.Spawn(jail.Request{Kind: jail.Exec, Command: program + " " + dialArg + " " + strconv.Quote(l.Addr().String()), Stdout: child, Stderr: child})
			child.Close()
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			out.ReadFrom(ours)
			p.Wait()
			if got := strings.Contains(out.String(), "reached"); got != (level == jail.Plain) || !strings.Contains(out.String(), "looked") {
				t.Errorf("in the jail: %q", &out)
			}
		})
	}
}

// heard is a connection whose other side has said everything already.
type heard struct {
	net.Conn
	io.Reader
	bytes.Buffer // what is said to it
}

func (h *heard) Read(b []byte) (int, error)  { return h.Reader.Read(b) }
func (h *heard) Write(b []byte) (int, error) { return h.Buffer.Write(b) }
func (h *heard) SetDeadline(time.Time) error { return nil }

// FuzzStatus asks with any bytes, and takes any bytes for an answer.
func FuzzStatus(f *testing.F) {
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"close":"1.1"}`))
	f.Add([]byte(`{"status":{"closing":"x","connections":[{"comment":"\u001b[2J\n","authenticated":true,"sessions":[{"command":"a\tb"}]}]}}`))
	s := quietServer()
	s.jail = &jail.Jail{}
	f.Fuzz(func(t *testing.T, sent []byte) {
		c := &heard{Reader: bytes.NewReader(sent)}
		s.answerStatus(c, "job")
		var reply statusReply
		if answer := c.Bytes(); len(answer) > 0 && (json.Unmarshal(answer, &reply) != nil || (reply.Error == "") == (reply.Status == nil)) {
			t.Errorf("%q was answered with %q", sent, answer)
		}
		st, err := exchange(&heard{Reader: bytes.NewReader(sent)}, statusRequest{})
		if err == nil && st != nil {
			st.print(io.Discard)
		}
	})
}
