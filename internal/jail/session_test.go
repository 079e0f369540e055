// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestExitStatus(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		for _, c := range []struct {
			command string
			want    Exit
		}{
			{"true", Exit{}},
			{"exit 1", Exit{Code: 1}},
			{"exit 42", Exit{Code: 42}},
			{"exit 255", Exit{Code: 255}},
			{"no-such-program", Exit{Code: 127}},
			{"/etc/passwd", Exit{Code: 126}},
			{"kill -KILL $$", Exit{Signal: unix.SIGKILL}},
			{"kill -TERM $$", Exit{Signal: unix.SIGTERM}},
			{"ulimit -c 0; kill -SEGV $$", Exit{Signal: unix.SIGSEGV}},
			{"printf '%s' \"a  b\"; exit 3", Exit{Code: 3}},
		} {
			if _, stderr, got := run(t, j, c.command); got != c.want {
				t.Errorf("%s: %+v, want %+v (%s)", c.command, got, c.want, stderr)
			}
		}
	})
}

func TestEnvironment(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		os.Setenv("JAIL_TEST_SECRET", "must not be seen")
		defer os.Unsetenv("JAIL_TEST_SECRET")
		if level != Plain {
			writeFile(t, filepath.Join(root, "etc/environment"), "# comment\nexport FROM_IMAGE=\"yes it is\"\nIMS_ARCH=image\nbad line\n")
		}
		j := startJail(t, Config{Root: root, Level: level, Env: []string{"IMS_JOB_ID=job", "IMS_ARCH=x86_64"}})
		got := strings.Split(output(t, j, "env -u _ -u SHLVL -u PWD", "LANG=C.UTF-8", "IMS_JOB_ID=forged", "HOME=/forged"), "\n")
		slices.Sort(got)
		want := []string{
			"HOME=/root", "IMS_ARCH=x86_64", "IMS_JOB_ID=job", "LANG=C.UTF-8", "LOGNAME=root", "MAIL=/var/mail/root",
			"PATH=" + defaultPath, "SHELL=/bin/bash", "USER=root",
		}
		if level != Plain {
			want = append(want, "FROM_IMAGE=yes it is", "SYSTEMD_OFFLINE=1")
			slices.Sort(want)
			if id := output(t, j, "id"); id != "uid=0(root) gid=0(root) groups=0(root),10(wheel)" {
				t.Errorf("id: %s", id)
			}
			if pwd := output(t, j, "pwd; echo ~root"); pwd != "/root\n/root" {
				t.Errorf("home: %s", pwd)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("environment\n got %q\nwant %q", got, want)
		}
		if mask := output(t, j, "umask"); mask != "0022" {
			t.Errorf("umask %s", mask)
		}
	})
}

func TestShellLookup(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		if level == Plain {
			t.Skip("the container's own files")
		}
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		passwd := filepath.Join(root, "etc/passwd")
		// The host has /bin/dash, the image does not: the lookup must not leave the image.
		writeFile(t, passwd, "root:x:0:0::/nonexistent:/bin/dash\n")
		if got := output(t, j, "echo $0 $SHELL $HOME; pwd"); got != "sh /bin/sh /nonexistent\n/" {
			t.Errorf("missing shell and home: %q", got)
		}
		// Whatever the file holds, a shell starts.
		for _, bad := range []string{"", "root", "root:::::::\n", "root:x:0:0:::\n", strings.Repeat("x", maxAccountFile+1), "root:x:a:-1::/etc/passwd:relative\n"} {
			writeFile(t, passwd, bad)
			if got := output(t, j, "echo works"); got != "works" {
				t.Errorf("passwd %.20q: %q", bad, got)
			}
		}
		for _, special := range []func() error{
			func() error { return unix.Mkfifo(passwd, 0o644) },
			func() error { return os.Symlink("/proc/self/fd/3", passwd) },
			func() error { return os.Symlink("passwd", passwd) },
			func() error { return os.Symlink("/dev/zero", passwd) },
			func() error { return os.Mkdir(passwd, 0o755) },
		} {
			if err := errors.Join(os.RemoveAll(passwd), special()); err != nil {
				t.Fatal(err)
			}
			if got := output(t, j, "echo works"); got != "works" {
				t.Errorf("%q", got)
			}
		}
		if err := os.RemoveAll(passwd); err != nil {
			t.Fatal(err)
		}
		// No shell at all: 127 and a message; one that cannot be executed: 126.
		sh := filepath.Join(root, "usr/bin/sh")
		if err := os.Chmod(sh, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, stderr, exit := run(t, j, "true"); exit.Code != 126 || !strings.Contains(stderr, "/bin/sh: permission denied") {
			t.Errorf("shell not executable: %+v %q", exit, stderr)
		}
		if err := os.Remove(sh); err != nil {
			t.Fatal(err)
		}
		if _, stderr, exit := run(t, j, "true"); exit.Code != 127 || !strings.Contains(stderr, "/bin/sh: no such file") {
			t.Errorf("shell missing: %+v %q", exit, stderr)
		}
		p, err := j.Spawn(Request{Kind: Shell, TTY: &TTY{Term: "xterm"}})
		if err != nil {
			t.Fatal(err)
		}
		if said := readPTY(p); !strings.Contains(said, "/bin/sh: no such file") || p.Wait().Code != 127 {
			t.Errorf("shell missing, on a terminal: %q", said)
		}
	})
}

// readPTY reads a terminal to its end and closes it.
func readPTY(p *Process) string {
	defer p.PTY().Close()
	var b bytes.Buffer
	io.Copy(&b, p.PTY()) // ends with EIO
	return b.String()
}

func TestStdinAndLongCommands(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		outR, outW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p, err := j.Spawn(Request{Kind: Exec, Command: "cat", Stdin: r, Stdout: outW})
		r.Close()
		outW.Close()
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte("0123456789\x00\xff\n"), 1<<17)
		go func() { w.Write(data); w.Close() }()
		got, err := io.ReadAll(outR)
		outR.Close()
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("cat returned %d of %d bytes: %v", len(got), len(data), err)
		}
		if e := p.Wait(); e != (Exit{}) {
			t.Errorf("cat: %+v", e)
		}
		// The command is bytes, not text, and as long as the kernel takes (MAX_ARG_STRLEN counts the final zero).
		odd := "printf '\xff\xfe' | wc -c; : '\xc3\x28'"
		if got := output(t, j, odd); got != "2" {
			t.Errorf("%q: %s", odd, got)
		}
		long := "echo ok #" + strings.Repeat("x", 128<<10)
		if got := output(t, j, long[:128<<10-1]); got != "ok" {
			t.Errorf("long command: %s", got)
		}
		if _, _, exit := run(t, j, long[:128<<10]); exit.Code != 126 {
			t.Errorf("too long command: %+v", exit)
		}
		if _, err := j.Spawn(Request{Kind: Exec, Command: strings.Repeat("x", maxPacket)}); !errors.Is(err, ErrTooLong) {
			t.Errorf("much too long command: %v", err)
		}
		if got := output(t, j, "echo still there"); got != "still there" {
			t.Error(got)
		}
	})
}

func TestTerminal(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		tty := &TTY{
			Term: "xterm-256color", Cols: 123, Rows: 45, XPixel: 7, YPixel: 1 << 20,
			Modes: map[uint8]uint32{1: 7, 3: 8, 8: 255, 35: 1, 50: 0, 53: 0, 72: 0, 128: 9600, 129: 38400, 91: 1, 200: 9},
		}
		script := "stty -a; stty size; echo TERM=$TERM; echo tty=$SSH_TTY; echo > /dev/tty; tty; : < /dev/tty && echo ctty"
		p, err := j.Spawn(Request{Kind: Exec, Command: script, TTY: tty})
		if err != nil {
			t.Fatal(err)
		}
		got := readPTY(p)
		if e := p.Wait(); e != (Exit{}) {
			t.Errorf("%+v", e)
		}
		for _, want := range []string{
			"intr = ^G;", "erase = ^H;", "start = <undef>;", " igncr ", " -isig ", " -echo ", " -onlcr ", " cs8 ",
			"speed 38400 baud;", " 45 123 ", " TERM=xterm-256color ", " tty=/dev/pts/", " ctty ",
		} {
			if !strings.Contains(" "+strings.ReplaceAll(got, "\n", " ")+" ", want) {
				t.Errorf("terminal lacks %q", want)
			}
		}
		if !(level == Chroot && inFilter()) && !strings.Contains(got, "\n/dev/pts/") {
			t.Error("tty(1) does not know the terminal")
		}
		if t.Failed() {
			t.Logf("%q", got)
		}
	})
}

func TestLoginShellAndResize(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		p, err := j.Spawn(Request{Kind: Shell, TTY: &TTY{Term: "dumb", Cols: 80, Rows: 24}})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Resize(132, 50, 0, 0); err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(p.PTY(), "stty -echo; echo argv0=$0; stty size; trap 'echo winch' WINCH; echo ready; read x; stty size; exit 42\n")
		var seen bytes.Buffer
		buf := make([]byte, 4096)
		until := func(want string) {
			t.Helper()
			p.PTY().SetReadDeadline(time.Now().Add(30 * time.Second))
			for !strings.Contains(seen.String(), want) {
				n, err := p.PTY().Read(buf)
				seen.Write(buf[:n])
				if err != nil {
					t.Fatalf("waiting for %q: %v after %q", want, err, seen.String())
				}
			}
		}
		until("\r\nready\r\n")
		if err := p.Resize(99, 11, 0, 0); err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(p.PTY(), "\n")
		until("11 99")
		readPTY(p)
		if e := p.Wait(); e != (Exit{Code: 42}) {
			t.Errorf("%+v", e)
		}
		for _, want := range []string{"argv0=-bash\r\n", "50 132\r\n"} {
			if !strings.Contains(seen.String(), want) {
				t.Errorf("lacks %q: %q", want, seen.String())
			}
		}
	})
}

func TestHangup(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		p, err := j.Spawn(Request{Kind: Exec, Command: "echo up; sleep 1000", TTY: &TTY{}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p.PTY(), make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		p.PTY().Close()
		if e := p.Wait(); e.Signal != unix.SIGHUP {
			t.Errorf("after hang-up: %+v", e)
		}
		if err := p.Resize(1, 1, 1, 1); err == nil {
			t.Error("resized a closed terminal")
		}
	})
}

func TestSignal(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		p, err := j.Spawn(Request{Kind: Exec, Command: "sleep 1000 & echo up; wait", Stdout: w})
		w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		if err := p.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if e := p.Wait(); e.Signal != unix.SIGTERM {
			t.Errorf("%+v", e)
		}
		if _, err := io.ReadAll(r); err != nil { // ends when the background sleep is gone too
			t.Error(err)
		}
		for range 1000 {
			if err := p.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Signal(0); !errors.Is(err, unix.EINVAL) {
			t.Errorf("signal 0: %v", err)
		}
	})
}

func TestExists(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		canary := plantCanary(t, root)
		j := startJail(t, Config{Root: root, Level: level})
		prefix := rootPrefix(level, root)
		writeFile(t, filepath.Join(root, "tmp/complete"), "")
		for name, link := range map[string]string{"link": prefix + "/tmp/complete", "rel": "complete", "loop": "loop"} {
			if err := os.Symlink(link, filepath.Join(root, "tmp", name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mkfifo(filepath.Join(root, "tmp/fifo"), 0o600); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]bool{
			"complete": true, "link": true, "rel": true, "missing": false, "fifo": false, "complete/x": false, "": false,
		} {
			if got, err := j.Exists(prefix + "/tmp/" + name); err != nil || got != want {
				t.Errorf("%s: %v, %v; want %v", name, got, err, want)
			}
		}
		if _, err := j.Exists(prefix + "/tmp/loop"); !errors.Is(err, unix.ELOOP) && err == nil {
			t.Errorf("loop: %v", err)
		}
		if level != Plain {
			if got, _ := j.Exists(canary); got {
				t.Error("a file outside is seen")
			}
			if got, _ := j.Exists("/../" + canary); got {
				t.Error("a file outside is seen")
			}
		}
	})
}

// TestManySpawns promises that sessions leave nothing behind in the gateway or in init.
func TestManySpawns(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		round := func() {
			var wg sync.WaitGroup
			for i := range 100 {
				wg.Go(func() {
					req := Request{Kind: Exec, Command: fmt.Sprintf("echo %d; exit %d", i, i%256)}
					if i%10 == 0 {
						req.TTY = &TTY{Term: "dumb"}
						p, err := j.Spawn(req)
						if err != nil {
							t.Error(err)
							return
						}
						if out := readPTY(p); out != fmt.Sprintf("%d\r\n", i) || p.Wait() != (Exit{Code: i % 256}) {
							t.Errorf("%d on a terminal: %q %+v", i, out, p.Wait())
						}
						return
					}
					out, _, exit, err := tryRun(j, req)
					if err != nil || out != fmt.Sprintf("%d\n", i) || exit != (Exit{Code: i % 256}) {
						t.Errorf("%d: %q %+v %v", i, out, exit, err)
					}
				})
			}
			wg.Wait()
		}
		initFDs := func() int { return countEntries(t, fmt.Sprintf("/proc/%d/fd", j.proc.Pid)) }
		round()
		fds, inits, gos := countEntries(t, "/proc/self/fd"), initFDs(), runtime.NumGoroutine()
		for range 3 {
			round()
		}
		eventually(t, "descriptors and goroutines as before", func() bool {
			return countEntries(t, "/proc/self/fd") <= fds && initFDs() <= inits && runtime.NumGoroutine() <= gos
		})
		j.mu.Lock()
		defer j.mu.Unlock()
		if len(j.pending)+len(j.running) != 0 {
			t.Errorf("%d requests and %d commands are still known", len(j.pending), len(j.running))
		}
	})
}

func countEntries(t testing.TB, dir string) int {
	ents, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(ents)
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkSpawn(b *testing.B) {
	for _, level := range []Level{Plain, Chroot, Namespaces} {
		b.Run(level.String(), func(b *testing.B) {
			j := startJail(b, Config{Root: newRoot(b), Level: level})
			for b.Loop() {
				p, err := j.Spawn(Request{Kind: Exec, Command: "exit 0"})
				if err != nil {
					b.Fatal(err)
				}
				p.Wait()
			}
		})
	}
}

// TestClosedTerminal promises that a command may close its terminal before it ends, as coreutils do on their way out.
func TestClosedTerminal(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		p, err := j.Spawn(Request{Kind: Exec, Command: "trap 'exit 9' HUP; exec <&- >&- 2>&-; sleep 0.2; exit 3", TTY: &TTY{}})
		if err != nil {
			t.Fatal(err)
		}
		readPTY(p)
		if e := p.Wait(); e != (Exit{Code: 3}) {
			t.Errorf("%+v, want 3", e)
		}
	})
}
