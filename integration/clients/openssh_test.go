// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// noise is data that nothing on the way can shorten.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// save writes a file for the test.
func save(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// same fails unless the file holds data.
func same(t testing.TB, path string, data []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%s: %d bytes of %d, or others (%v)", path, len(got), len(data), err)
	}
}

// checkExecs runs the commands that every client has to run alike.
func checkExecs(t *testing.T, exec func(command string) *exec.Cmd) {
	t.Helper()
	for _, tt := range []struct {
		command, out, errs string
		code               int
	}{
		{"echo out; echo err >&2", "out\n", "err\n", 0},
		{"exit 42", "", "", 42},
		{"echo ~root && sleep 0", "/root\n", "", 0},
		{"head -c 300000 /dev/zero | wc -c; exit 7", "300000\n", "", 7},
	} {
		out, errs, code := run(t, exec(tt.command))
		if out != tt.out || !strings.HasSuffix(errs, tt.errs) || code != tt.code {
			t.Errorf("%s: %q, %q, %d; want %q, %q, %d", tt.command, out, errs, code, tt.out, tt.errs, tt.code)
		}
	}
}

// checkCat has a client send and receive at once. One that hangs at times, with any server, may try again.
func checkCat(t *testing.T, exec func(command string) *exec.Cmd, attempts int) {
	t.Helper()
	data := noise(1<<20 + 7)
	for left := attempts - 1; ; left-- {
		cmd := exec("cat")
		cmd.Stdin = bytes.NewReader(data)
		out, errs, code, ended := runWithin(t, patience/time.Duration(attempts), cmd)
		if !ended && left > 0 {
			t.Logf("%s hangs; %d bytes of %d came back", cmd, len(out), len(data))
			continue
		}
		if out != string(data) || code != 0 || !ended {
			t.Errorf("cat: %d bytes of %d came back, %q, %d, ended %t", len(out), len(data), errs, code, ended)
		}
		return
	}
}

func TestOpenSSH(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		ssh := func(command string) *exec.Cmd { return g.tool(t, "ssh", "job", command) }
		checkExecs(t, ssh)
		checkCat(t, ssh, 1)
		// Without a terminal the client must not invent one, nor read our input.
		cmd := g.tool(t, "ssh", "-n", "job", "cat; tty")
		cmd.Stdin = strings.NewReader("not for you\n")
		if out, errs, code := run(t, cmd); out != "not a tty\n" || code != 1 {
			t.Errorf("ssh -n: %q, %q, %d", out, errs, code)
		}
		// Goes to the background once it has logged in, and the command runs on.
		here, there := g.space(t)
		cmd = g.tool(t, "sh", "-f", "job", fmt.Sprintf("until [ -e %[1]s/go ]; do sleep 0.02; done; touch %[1]s/gone", there))
		cmd.Args = append([]string{"sh", "-c", `exec ssh "$@" >/dev/null 2>&1`}, cmd.Args...) // it would hold our pipes open
		must(t, cmd)
		save(t, filepath.Join(here, "go"), nil)
		eventually(t, "the command of ssh -f has run", func() bool { _, err := os.Stat(filepath.Join(here, "gone")); return err == nil })
	})
}

// Every byte arrives before the exit status does.
func TestLongOutputThenExit(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		const size = 100 << 20
		var got counter
		cmd := g.tool(t, "ssh", "job", fmt.Sprintf("head -c %d /dev/zero; exit 3", size))
		cmd.Stdout = &got
		if _, errs, code := run(t, cmd); got != size || code != 3 {
			t.Errorf("%d bytes of %d, %d, %s", got, size, code, errs)
		}
	})
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

// Ansible's last resort for files.
func TestPipedDD(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		data := noise(8<<20 + 123)
		cmd := g.tool(t, "ssh", "job", "dd of="+there+"/file bs=65536")
		cmd.Stdin = bytes.NewReader(data)
		must(t, cmd)
		same(t, filepath.Join(here, "file"), data)
		if out := must(t, g.tool(t, "ssh", "job", "dd if="+there+"/file bs=65536")); out != string(data) {
			t.Errorf("%d bytes of %d came back", len(out), len(data))
		}
	})
}

// terminal is a client on a terminal of its own, as a person's.
type terminal struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	mu     sync.Mutex
	seen   bytes.Buffer
	closed chan struct{}
}

func onTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	p := &terminal{t: t, master: master, cmd: cmd, closed: make(chan struct{})}
	var n int
	p.control(func(fd int) error {
		if n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN); err != nil {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	})
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	p.resize(24, 80)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.closed)
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			p.mu.Lock()
			p.seen.Write(b[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

func (p *terminal) resize(rows, cols uint16) {
	p.t.Helper()
	p.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// control does what only a descriptor can; File.Fd would make reads uninterruptible.
func (p *terminal) control(f func(fd int) error) {
	p.t.Helper()
	raw, err := p.master.SyscallConn()
	if err == nil {
		if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
			err = cerr
		}
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *terminal) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.String()
}

// await waits until text is on the terminal; type types.
func (p *terminal) await(text string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%q on the terminal", text), func() bool {
		select {
		case <-p.closed:
			if !strings.Contains(p.text(), text) {
				p.t.Fatalf("the client ended without %q:\n%s", text, p.text())
			}
		default:
		}
		return strings.Contains(p.text(), text)
	})
}

func (p *terminal) input(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.master, text); err != nil {
		p.t.Fatal(err)
	}
}

// end is the client's exit code.
func (p *terminal) end() int {
	p.t.Helper()
	eventually(p.t, "the client ends", func() bool {
		select {
		case <-p.closed:
			return true
		default:
			return false
		}
	})
	p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// A person's session: a login shell, resized while a program runs, interrupted, left.
func TestTerminal(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		p := onTerminal(t, g.tool(t, "ssh", "-t", "job", "bash --norc --noediting -i"))
		p.input("PS1='pro''mpt> '; stty -echo\n")
		p.await("prompt> ")
		p.input("stty size; tty; echo on $TERM; echo to the tty >/dev/tty\n")
		p.await("24 80\r\n")
		p.await("on xterm\r\n")
		p.await("to the tty\r\n")
		p.resize(50, 132)
		// The new size overtakes or follows what is typed.
		p.input("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.02; done; echo resi''zed\n")
		p.await("resized\r\n")
		p.input("(trap 'echo inter''rupted' INT; echo wait''ing; sleep 1000; echo sle''pt)\n")
		p.await("waiting\r\n")
		p.input("\x03")
		p.await("interrupted\r\nslept\r\n")
		p.input("exit 42\n")
		if code := p.end(); code != 42 {
			t.Errorf("exit %d after\n%s", code, p.text())
		}
	})
}

// What was started to stay does so, whatever becomes of its session and connection.
func TestDetached(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		for name, how := range map[string]string{"nohup": "nohup %s >/dev/null 2>&1 </dev/null &", "setsid": "setsid %s >/dev/null 2>&1 </dev/null &",
			"terminal": "nohup setsid %s >/dev/null 2>&1 </dev/null &", "held": "nohup %s </dev/null &"} {
			job := fmt.Sprintf("sh -c 'touch %[1]s/%[2]s.began; until [ -e %[1]s/%[2]s.go ]; do sleep 0.05; done; touch %[1]s/%[2]s.done'", there, name)
			command := fmt.Sprintf(how, job) + fmt.Sprintf(" until [ -e %s/%s.began ]; do sleep 0.02; done", there, name)
			switch name {
			case "terminal":
				if code := onTerminal(t, g.tool(t, "ssh", "-t", "job", command)).end(); code != 0 {
					t.Errorf("%s: exit %d", name, code)
				}
			case "held": // keeps the output of its session: the client would wait, and is killed
				cmd := g.tool(t, "ssh", "job", command)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the command has begun", func() bool { _, err := os.Stat(filepath.Join(here, name+".began")); return err == nil })
				cmd.Process.Kill()
				cmd.Wait()
			default:
				must(t, g.tool(t, "ssh", "job", command))
			}
			save(t, filepath.Join(here, name+".go"), nil)
			eventually(t, name+": the process has outlived its connection", func() bool {
				_, err := os.Stat(filepath.Join(here, name+".done"))
				return err == nil
			})
		}
	})
}

// One hundred sessions on one connection, and the next one is refused at once, not queued.
func TestMultiplexing(t *testing.T) {
	const most = 100
	g := own(t, settings{level: chroot, options: fmt.Sprintf("MaxSessions %d", most)})
	here, there := g.space(t)
	control := filepath.Join(g.dir, "control")
	master := g.tool(t, "ssh", "-M", "-S", control, "-N", "job")
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		run(t, g.tool(t, "ssh", "-S", control, "-O", "exit", "job"))
		master.Wait()
	})
	eventually(t, "the master listens", func() bool {
		_, _, code := run(t, g.tool(t, "ssh", "-S", control, "-O", "check", "job"))
		return code == 0
	})
	// ssh would open a connection of its own where the master cannot.
	over := func(command string) *exec.Cmd {
		return g.tool(t, "ssh", "-S", control, "-o", "ProxyCommand=false", "job", command)
	}
	// All sessions wait for a lock that we hold until they are there.
	gate, err := os.Create(filepath.Join(here, "gate"))
	if err == nil {
		err = unix.Flock(int(gate.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	var wg sync.WaitGroup
	for i := range most {
		wg.Go(func() {
			out, errs, code := run(t, over(fmt.Sprintf("touch %[1]s/%[2]d; flock -s %[1]s/gate true; echo %[2]d; exit %[2]d", there, i)))
			if out != fmt.Sprintln(i) || code != i {
				t.Errorf("session %d: %q, %d, %s", i, out, code, errs)
			}
		})
	}
	eventually(t, "all sessions are open at once", func() bool {
		found, _ := os.ReadDir(here)
		return len(found) == most+1
	})
	if out, errs, code := run(t, over("true")); code != 255 || !strings.Contains(errs, "Session open refused by peer") {
		t.Errorf("session %d: %q, %q, %d", most+1, out, errs, code)
	}
	if out := must(t, g.tool(t, "ssh", "job", "echo another connection")); out != "another connection\n" {
		t.Errorf("another connection: %q", out)
	}
	gate.Close()
	wg.Wait()
	if out := must(t, over("echo a free slot")); out != "a free slot\n" {
		t.Errorf("after the sessions: %q", out)
	}
}

// scp in all its forms; -3 takes files from one gateway to another through this machine.
func TestSCP(t *testing.T) {
	local := t.TempDir()
	data := noise(2<<20 + 5)
	save(t, filepath.Join(local, "from"), data)
	tree.Make(t, local, "file tree/a 0600 text", "file tree/sub/b 0755 more", "dir tree/empty 0700", "mtime tree/sub/b 1000000001")
	each(t, func(t *testing.T, g *gateway) {
		for _, mode := range []string{"-O", "-s"} { // the old protocol, and SFTP
			here, there := g.space(t)
			must(t, g.tool(t, "scp", mode, "-p", filepath.Join(local, "from"), "job:"+there+"/to"))
			must(t, g.tool(t, "scp", mode, "-pr", filepath.Join(local, "tree"), "job:"+there+"/"))
			back := t.TempDir()
			must(t, g.tool(t, "scp", mode, "-p", "job:"+there+"/to", filepath.Join(back, "from")))
			must(t, g.tool(t, "scp", mode, "-pr", "job:"+there+"/tree", back))
			for _, copied := range []string{filepath.Join(here, "tree"), filepath.Join(back, "tree")} {
				tree.Equal(t, filepath.Join(local, "tree"), copied, tree.Seconds)
			}
			same(t, filepath.Join(here, "to"), data)
			same(t, filepath.Join(back, "from"), data)
			if _, errs, code := run(t, g.tool(t, "scp", mode, "job:"+there+"/missing", back)); code != 1 || !strings.Contains(errs, "No such file") {
				t.Errorf("scp %s of a missing file: %d, %q", mode, code, errs)
			}
		}
		other := common(t, plain)
		here, _ := other.space(t)
		_, there := g.space(t)
		must(t, g.tool(t, "scp", filepath.Join(local, "from"), "job:"+there+"/from"))
		both := client("scp", "-3", "-F", "/dev/null", "-i", g.identity, "-i", other.identity, "-o", "BatchMode=yes",
			"-o", "UserKnownHostsFile="+filepath.Join(g.dir, "known_hosts")+" "+filepath.Join(other.dir, "known_hosts"),
			"scp://root@127.0.0.1:"+g.port+"/"+there+"/from", "scp://root@127.0.0.1:"+other.port+"/"+here+"/to")
		must(t, both)
		same(t, filepath.Join(here, "to"), data)
	})
}
