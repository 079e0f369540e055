// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func TestOpenSSHVersion(t *testing.T) {
	out, err := exec.Command("ssh", "-V").CombinedOutput()
	t.Logf("%s%v", out, err) // so that a log of the tests names the judge
}

// The codes ssh(1) returns for commands of every kind of end.
func TestOpenSSHExec(t *testing.T) {
	j := start(t, options{})
	for _, tt := range []struct {
		command, out string
		code         int
	}{
		{"echo hello", "hello\n", 0},
		{"exit 1", "", 1},
		{"exit 254", "", 254},
		{"exit 255", "", 255},
		{"/no/such/command", "", 127},
		{"/etc/passwd", "", 126},
		{"kill -9 $$", "", 255}, // how ssh shows exit-signal
		{"head -c 3000000 /dev/zero | wc -c; exit 7", "3000000\n", 7},
	} {
		if out, _, code := run(t, j.tool("ssh", host, tt.command)); out != tt.out || code != tt.code {
			t.Errorf("%s: %q, %d; want %q, %d", tt.command, out, code, tt.out, tt.code)
		}
	}
	out, errs, code := run(t, j.tool("ssh", "-v", host, "true"))
	if out != "" || code != 0 || !strings.Contains(errs, "remote software version OpenSSH_compatible ims-buildenv_") {
		t.Errorf("version string: %q %d %s", out, code, errs)
	}
}

func TestOpenSSHStdin(t *testing.T) {
	j := start(t, options{})
	data := make([]byte, 5<<20)
	rand.Read(data)
	cmd := j.tool("ssh", host, "cat")
	cmd.Stdin = bytes.NewReader(data)
	if out, _, code := run(t, cmd); out != string(data) || code != 0 {
		t.Errorf("%d bytes came back, %d", len(out), code)
	}
	cmd = j.tool("ssh", host, "sh -s") // as Ansible's pipelining does
	cmd.Stdin = strings.NewReader("echo from stdin\nexit 6\n")
	if out, _, code := run(t, cmd); out != "from stdin\n" || code != 6 {
		t.Errorf("%q, %d", out, code)
	}
}

// REGRESSION: `ssh job yes | head -1` ran until interrupted. The client says that its output
// is closed only to a server that it takes for OpenSSH's.
func TestOpenSSHOutputClosed(t *testing.T) {
	j := start(t, options{})
	cmd := j.tool("ssh", host, "yes")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "y\n" {
		t.Errorf("%q, %v", line, err)
	}
	out.Close()
	cmd.Wait()
	j.awaitLog("signal=PIPE")
}

// A command that ends before its input does: `cat big | ssh job head -c 1`.
func TestOpenSSHInputLeft(t *testing.T) {
	j := start(t, options{})
	cmd := j.tool("ssh", host, "head -c 1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		chunk := make([]byte, 1<<16)
		for {
			if _, err := in.Write(chunk); err != nil {
				return // ssh is gone
			}
		}
	}()
	if out, _, code := run(t, cmd); out != "\x00" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
}

// An interactive shell, typed into.
func TestOpenSSHTerminal(t *testing.T) {
	j := start(t, options{})
	cmd := j.tool("ssh", "-tt", "-E", "/dev/null", host)
	cmd.Stdin = strings.NewReader("stty -echo; PS1=\nprintf 'a\\tb\\n'; stty size; exit 42\n")
	out, _, code := run(t, cmd)
	if code != 42 || !strings.Contains(out, "a\tb\r\n") {
		t.Errorf("%q, %d", out, code)
	}
}

// One hundred commands at a time over one master, as Ansible's forks do.
func TestOpenSSHMultiplexing(t *testing.T) {
	j := start(t, options{})
	control := filepath.Join(t.TempDir(), "s")
	master := j.tool("ssh", "-M", "-S", control, "-N", host)
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		run(t, exec.Command("ssh", "-S", control, "-O", "exit", host))
		master.Wait()
	})
	eventually(t, "the master listens", func() bool {
		return exec.Command("ssh", "-S", control, "-O", "check", host).Run() == nil
	})
	// All sessions wait for a lock that we hold until they are there.
	testkit.NeedTool(t, "flock")
	gate, err := os.Create(filepath.Join(t.TempDir(), "gate"))
	if err == nil {
		err = syscall.Flock(int(gate.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	const n = 100
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			cmd := exec.Command("ssh", "-S", control, host, fmt.Sprintf("flock -s %s true; echo %d; exit %d", gate.Name(), i, i))
			if out, errs, code := run(t, cmd); out != fmt.Sprintln(i) || code != i {
				t.Errorf("session %d: %q, %d, %s", i, out, code, errs)
			}
		})
	}
	eventually(t, "all sessions are open at once", func() bool {
		return strings.Count(j.log.String(), `msg="session started"`) == n
	})
	gate.Close()
	wg.Wait()
	if strings.Count(j.log.String(), "msg=login ") != 1 {
		t.Error("there was more than one connection")
	}
}

func TestOpenSSHSFTP(t *testing.T) {
	j := start(t, options{})
	dir := t.TempDir()
	data := make([]byte, 3<<20)
	rand.Read(data)
	j.write(filepath.Join(dir, "a b"), string(data))
	batch := filepath.Join(dir, "batch")
	remote := filepath.Join(j.parent, "image-root")
	j.write(batch, fmt.Sprintf(`
mkdir "%[2]s/d"
put -p "%[1]s/a b" "%[2]s/d/c"
symlink c "%[2]s/d/link"
rename "%[2]s/d/c" "%[2]s/d/e"
chmod 4755 "%[2]s/d/e"
get "%[2]s/d/e" "%[1]s/back"
ls -l "%[2]s/d"
`, dir, remote))
	out, errs, code := run(t, j.tool("sftp", "-b", batch, host))
	if code != 0 {
		t.Fatalf("sftp: %d\n%s%s", code, out, errs)
	}
	for _, p := range []string{filepath.Join(dir, "back"), filepath.Join(remote, "d", "e")} {
		if got, err := os.ReadFile(p); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", p, len(got), err)
		}
	}
	if st, err := os.Stat(filepath.Join(remote, "d", "e")); err != nil || st.Mode()&os.ModeSetuid == 0 {
		t.Errorf("chmod lost the mode: %v, %v", st, err)
	}
	if l, err := os.Readlink(filepath.Join(remote, "d", "link")); l != "c" {
		t.Errorf("link to %q, %v", l, err)
	}
}

func TestOpenSSHSCP(t *testing.T) {
	j := start(t, options{})
	dir := t.TempDir()
	data := make([]byte, 3<<20)
	rand.Read(data)
	j.write(filepath.Join(dir, "from"), string(data))
	for _, mode := range []string{"-O", "-s"} { // the old protocol, and SFTP
		remote := filepath.Join(dir, "remote"+mode)
		back := filepath.Join(dir, "back"+mode)
		if out, errs, code := run(t, j.tool("scp", mode, filepath.Join(dir, "from"), host+":"+remote)); code != 0 {
			t.Errorf("scp %s to: %d %s%s", mode, code, out, errs)
		}
		if out, errs, code := run(t, j.tool("scp", mode, host+":"+remote, back)); code != 0 {
			t.Errorf("scp %s from: %d %s%s", mode, code, out, errs)
		}
		if got, _ := os.ReadFile(back); !bytes.Equal(got, data) {
			t.Errorf("scp %s: %d bytes came back", mode, len(got))
		}
	}
	if _, _, code := run(t, j.tool("scp", host+":/no/such/file", dir)); code != 1 {
		t.Errorf("scp of a missing file: %d, want 1", code)
	}
}

// The banner of sshd_config, and nothing else, comes before a login.
func TestOpenSSHBanner(t *testing.T) {
	banner := filepath.Join(t.TempDir(), "banner")
	os.WriteFile(banner, []byte("Authorised use only.\n"), 0o600)
	j := start(t, options{config: "Banner " + banner})
	out, errs, code := run(t, j.tool("ssh", host, "true"))
	if out != "" || code != 0 || !strings.Contains(errs, "Authorised use only.") {
		t.Errorf("%q %q %d", out, errs, code)
	}
}
