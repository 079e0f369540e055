// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// echo accepts connections and says what it hears.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// says sends text over c, half-closes it and returns the answer.
func says(t *testing.T, c *net.UnixConn, text string) string {
	t.Helper()
	defer c.Close()
	io.WriteString(c, text)
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	return string(got)
}

func TestSockets(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		before, err := tree.Take(root)
		if err != nil {
			t.Fatal(err)
		}
		j := startJail(t, Config{Root: root, Level: level})
		prefix := rootPrefix(level, root)
		outside := func(l *Listener) string { return filepath.Join(root, strings.TrimPrefix(l.Path(), prefix)) }

		l, err := j.Listen(prefix+"/tmp/a.sock", 0o177, false)
		if err != nil {
			t.Fatal(err)
		}
		go echo(l)
		if got := output(t, j, "stat -c '%a %F' "+l.Path()); got != "600 socket" {
			t.Errorf("in the jail: %s", got)
		}
		c, err := j.Dial(prefix + "/tmp/a.sock")
		if err != nil {
			t.Fatal(err)
		}
		if got := says(t, c, "through"); got != "through" {
			t.Errorf("echo %q", got)
		}
		if _, err := j.Listen(l.Path(), 0o177, false); err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("a second socket at the same path: %v", err)
		}
		if _, err := j.Dial(prefix + "/tmp/nothing"); err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("no socket: %v", err)
		}
		again, err := j.Listen(l.Path(), 0, true)
		if err != nil {
			t.Fatal(err)
		}
		if got := output(t, j, "stat -c %a "+l.Path()); got != "777" {
			t.Errorf("mode %s with umask 0", got)
		}
		if err := l.Close(); err != nil || !exists(outside(again)) {
			t.Errorf("closing the replaced listener: %v, its successor is there: %v", err, exists(outside(again)))
		}
		if err := again.Close(); err != nil || exists(outside(again)) {
			t.Errorf("closed, %v, and still there: %v", err, exists(outside(again)))
		}

		for _, name := range []string{strings.Repeat("x", 108), "/tmp/\x00", ""} {
			if _, err := j.Listen(name, 0, false); err == nil {
				t.Errorf("listens at %q", name)
			}
			if _, err := j.Dial(name); err == nil {
				t.Errorf("connects to %q", name)
			}
		}
		// A name of the abstract kind would be the pod's; it is taken for a relative path.
		if _, err := j.Dial("@abstract"); err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("abstract name: %v", err)
		}

		if level == Plain {
			j.Stop(context.Background(), 0)
			return // agents are in the container's own /tmp
		}
		agent, err := j.ListenAgent()
		if err != nil {
			t.Fatal(err)
		}
		dir := path.Dir(agent.Path())
		if ok, _ := path.Match("/tmp/ssh-??????????/agent.*", agent.Path()); !ok {
			t.Errorf("agent at %s", agent.Path())
		}
		if got := output(t, j, "stat -c '%a %u' "+dir+" "+agent.Path()); got != "700 0\n600 0" {
			t.Errorf("agent: %s", got)
		}
		if err := agent.Close(); err != nil || exists(filepath.Join(root, dir)) {
			t.Errorf("the agent's directory: %v", err)
		}

		// Root in the jail ends the child: what it made is still removed, and the next request works.
		if l, err = j.Listen("/tmp/b.sock", 0o177, false); err != nil {
			t.Fatal(err)
		}
		j.socks.proc.Signal(unix.SIGKILL)
		j.socks.proc.Wait()
		if err := l.Close(); err != nil || exists(outside(l)) {
			t.Errorf("closed after the child's end: %v", err)
		}
		// What the user put in a socket's place is the user's.
		if l, err = j.Listen("/tmp/c.sock", 0o177, false); err != nil {
			t.Fatal(err)
		}
		output(t, j, "rm /tmp/c.sock && echo mine > /tmp/c.sock")
		if err := l.Close(); err != nil || output(t, j, "cat /tmp/c.sock && rm /tmp/c.sock") != "mine" {
			t.Errorf("the user's file: %v", err)
		}

		// Stop leaves none, and nothing it has to kill for that.
		if _, err := j.Listen("/root/d.sock", 0o177, false); err != nil {
			t.Fatal(err)
		}
		if _, err := j.ListenAgent(); err != nil {
			t.Fatal(err)
		}
		killed, err := j.Stop(context.Background(), 0)
		if err != nil || len(killed) > 0 {
			t.Errorf("stop: killed %v, %v", killed, err)
		}
		after, err := tree.Take(root)
		if err != nil {
			t.Fatal(err)
		}
		if d := before.Diff(after, tree.NoMtime); len(d) > 0 {
			t.Errorf("the tree changed: %v", d)
		}
		if _, err := j.Listen("/tmp/e.sock", 0, false); err == nil {
			t.Error("listens after Stop")
		}
	})
}

// TestSocketsStayInside promises that a path that the image's links lead out of it leads nowhere.
// ATTACK: the image has links to the container's directories, where sockets of the container are.
func TestSocketsStayInside(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		if level == Plain {
			t.Skip("the container's own files")
		}
		root := newRoot(t)
		out := t.TempDir()
		secret, err := net.Listen("unix", filepath.Join(out, "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer secret.Close()
		go echo(secret)
		tree.Make(t, root, "symlink tmp/abs "+out, "symlink tmp/up ../../../../../../../.."+out, "symlink tmp/sock "+filepath.Join(out, "s"))
		j := startJail(t, Config{Root: root, Level: level})
		for _, name := range []string{"/tmp/abs/s", "/tmp/up/s", "/tmp/sock", filepath.Join(out, "s"), "../../../../.." + out + "/s",
			"/proc/1/root" + out + "/s", "/proc/self/root" + out + "/s", "/proc/self/cwd/../../.." + out + "/s"} {
			if c, err := j.Dial(name); err == nil {
				t.Errorf("connected to %s", name)
				c.Close()
			}
		}
		for _, name := range []string{"/tmp/abs/new", "/tmp/up/new", out + "/new", "/proc/1/root" + out + "/new"} {
			if l, err := j.Listen(name, 0, true); err == nil {
				t.Errorf("listens at %s", name)
				l.Close()
			}
		}
		if n := countEntries(t, out); n != 1 {
			t.Errorf("%d entries outside, want the one socket", n)
		}
	})
}

func TestSocketsLeakNothing(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		name := rootPrefix(level, root) + "/tmp/a.sock"
		round := func() {
			l, err := j.Listen(name, 0o177, false)
			if err != nil {
				t.Fatal(err)
			}
			c, err := j.Dial(name)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			j.Dial("/nothing")
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		round()
		before := countEntries(t, "/proc/self/fd")
		for range 50 {
			round()
		}
		if after := countEntries(t, "/proc/self/fd"); after > before {
			t.Errorf("%d descriptors leaked", after-before)
		}
		j.Stop(context.Background(), 0)
		if _, err := os.Lstat(filepath.Join(root, "tmp/a.sock")); err == nil {
			t.Error("the socket is left")
		}
	})
}
