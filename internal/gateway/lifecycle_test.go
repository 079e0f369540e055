// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func (j *job) exists(name string) bool {
	_, err := os.Lstat(filepath.Join(j.parent, name))
	return err == nil
}

// flags lists which of the signal files are there.
func (j *job) flags() string {
	var found []string
	for _, n := range []string{"ready", "complete", "failed", "exiting", "image-root/tmp/complete", "image-root/tmp/failed"} {
		if j.exists(n) {
			found = append(found, n)
		}
	}
	return strings.Join(found, " ")
}

func (j *job) await() error { <-j.ended; return j.err }

func TestComplete(t *testing.T) {
	for _, tt := range []struct{ touch, left string }{
		{"complete", "ready exiting"},
		{"failed", "ready failed exiting"},
		{"failed complete", "ready failed exiting"},
	} {
		t.Run(tt.touch, func(t *testing.T) {
			j := start(t, options{})
			c := j.dial()
			// The command that makes the flag must end well, and so must the next one that
			// belongs to it: Ansible removes its temporary directory right after the task.
			if out, code := execute(t, c, "cd "+j.parent+" && touch "+tt.touch+" && sleep 0.3 && echo done"); out != "done\n" || code != 0 {
				t.Errorf("%q, %d", out, code)
			}
			if out, code := execute(t, c, "echo cleaned up"); out != "cleaned up\n" || code != 0 {
				t.Errorf("%q, %d", out, code)
			}
			if err := j.await(); err != nil {
				t.Error(err)
			}
			if got := j.flags(); got != tt.left {
				t.Errorf("flags left: %q, want %q", got, tt.left)
			}
			if err := c.Wait(); err == nil {
				t.Error("the connection is still there")
			}
		})
	}
}

// A person at a terminal is told, and the shell is hung up.
func TestCompleteTellsTerminals(t *testing.T) {
	j := start(t, options{})
	s := newSession(t, j.dial())
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "touch "+j.parent+"/complete\n")
	text, _ := io.ReadAll(out)
	if !strings.Contains(string(text), "marked complete") {
		t.Errorf("no notice in %q", text)
	}
	if err := j.await(); err != nil || j.flags() != "ready exiting" {
		t.Errorf("%v, %q", err, j.flags())
	}
}

// After exiting nothing of a session writes any more, whatever it does against its end.
func TestNothingWritesAfterExiting(t *testing.T) {
	j := start(t, options{})
	out, code := execute(t, j.dial(), `cd `+j.parent+`/image-root
for i in 1 2 3; do setsid sh -c 'trap "" TERM HUP INT; while :; do date +%N > ticks.'$i'; done' </dev/null >/dev/null 2>&1 & done
until [ -s ticks.1 ] && [ -s ticks.2 ] && [ -s ticks.3 ]; do sleep 0.05; done; echo started`)
	if out != "started\n" || code != 0 {
		t.Fatalf("%q, %d", out, code)
	}
	j.flag("complete")
	eventually(t, "exiting is there", func() bool { return j.exists("exiting") })
	read := func() (all []byte) {
		for _, n := range []string{"ticks.1", "ticks.2", "ticks.3"} {
			b, _ := os.ReadFile(filepath.Join(j.parent, "image-root", n))
			all = append(all, b...)
		}
		return all
	}
	first := read()
	if err := j.await(); err != nil {
		t.Error(err)
	}
	for range 50 {
		if !bytes.Equal(first, read()) {
			t.Fatal("a file changed after exiting")
		}
	}
	if !strings.Contains(j.log.String(), "processes had to be killed") {
		t.Error("the processes are not named in the log")
	}
}

// Late comers learn the reason, on a new connection and on an old one.
func TestLateLogin(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	busy := newSession(t, c)
	in, _ := busy.StdinPipe()
	if err := busy.Start("cat"); err != nil { // keeps the end waiting
		t.Fatal(err)
	}
	j.flag("failed")
	j.awaitLog("flag found")
	var banner strings.Builder
	_, err := ssh.Dial("tcp", j.addr, &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(j.key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		BannerCallback: func(m string) error { banner.WriteString(m); return nil },
	})
	if err == nil || !strings.Contains(banner.String(), "marked failed") {
		t.Errorf("late login: %v, told %q", err, banner.String())
	}
	in.Close()
	if err := busy.Wait(); err != nil {
		t.Errorf("the busy session: %v", err)
	}
	if err := j.await(); err != nil {
		t.Error(err)
	}
}

func TestSignalEndsWithoutExiting(t *testing.T) {
	j := start(t, options{})
	s := newSession(t, j.dial())
	if err := s.Start("trap '' TERM; sleep 1000"); err != nil {
		t.Fatal(err)
	}
	j.cancel()
	if err := j.await(); err == nil || j.flags() != "ready" {
		t.Errorf("%v, %q", err, j.flags())
	}
}

func TestCustomizationScript(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "run_script.sh")
	testkit.NeedRoot(t)
	t.Setenv("MARK", dir) // the script has the container's environment
	j := launch(t, options{change: func(c *Config) {
		os.WriteFile(script, []byte("echo from the script\ntouch "+c.SSHD.Parent+"/complete\nsleep 0.2\ntouch $MARK/after\n"), 0o600)
		c.SSHD.CustomizationScript = script
	}})
	if err := j.await(); err != nil || j.flags() != "ready exiting" {
		t.Errorf("%v, %q", err, j.flags())
	}
	if _, err := os.Stat(filepath.Join(dir, "after")); err != nil {
		t.Error("the script was not waited for")
	}
	if !strings.Contains(j.log.String(), `output="from the script"`) {
		t.Error("the script's output is not in the log")
	}
}

// What the script leaves running writes nothing any more once exiting is there.
func TestScriptLeftovers(t *testing.T) {
	dir := t.TempDir()
	testkit.NeedRoot(t)
	t.Setenv("MARK", dir)
	j := launch(t, options{change: func(c *Config) {
		c.SSHD.CustomizationScript = filepath.Join(dir, "run_script.sh")
		os.WriteFile(c.SSHD.CustomizationScript, []byte(`for i in 1 2; do setsid sh -c 'trap "" TERM HUP; (while :; do date +%N > $MARK/ticks; done) & wait' & done
until [ -s $MARK/ticks ]; do sleep 0.05; done
touch `+c.SSHD.Parent+`/complete
`), 0o600)
	}})
	eventually(t, "exiting is there", func() bool { return j.exists("exiting") })
	ticks := filepath.Join(dir, "ticks")
	first, err := os.ReadFile(ticks)
	if err := errors.Join(err, j.await()); err != nil {
		t.Error(err)
	}
	for range 50 {
		if b, err := os.ReadFile(ticks); err != nil || !bytes.Equal(first, b) {
			t.Fatalf("the file changed after exiting: %q, %v", b, err)
		}
	}
}

// The end of the job waits a moment for a command whose client has gone, as for any other.
func TestClientGoneAtTheEnd(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	mark := filepath.Join(t.TempDir(), "mark")
	if err := newSession(t, c).Start(fmt.Sprintf("until [ -e %[1]s.go ]; do sleep 0.01; done; touch %[2]s/complete; sleep 0.3; echo done > %[1]s", mark, j.parent)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	eventually(t, "the connection is gone", func() bool { return len(j.status().Connections) == 0 })
	j.write(mark+".go", "")
	if err := j.await(); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(mark); string(b) != "done\n" {
		t.Errorf("the command was ended: %v", err)
	}
}

// Create jobs have a shell only after a failed build and with debugging on.
func TestCreateJob(t *testing.T) {
	for _, tt := range []struct {
		failed, debug, shell bool
	}{{false, false, false}, {false, true, false}, {true, false, false}, {true, true, true}} {
		j := launch(t, options{change: func(c *Config) {
			c.SSHD.Action, c.SSHD.Debug = config.ActionCreate, tt.debug
			if tt.failed {
				os.WriteFile(filepath.Join(c.SSHD.Parent, "build_failed"), nil, 0o600)
			}
		}})
		if tt.shell {
			j.awaitLog("msg=listening")
			j.flag("complete")
		}
		if err := j.await(); err != nil {
			t.Errorf("%+v: %v", tt, err)
		}
		if j.exists("exiting") != tt.shell {
			t.Errorf("%+v: flags %q", tt, j.flags())
		}
	}
}

// A remote build ends at once, with the flag that the sidecar waits for, instead of serving the empty root.
func TestRemoteBuild(t *testing.T) {
	err := startError(t, options{change: func(c *Config) { c.SSHD.RemoteBuildNode = "x3000c0" }})
	if err == nil || !strings.Contains(err.Error(), "x3000c0") {
		t.Errorf("got %v", err)
	}
}

func TestMainCommandLine(t *testing.T) {
	dir := t.TempDir()
	k := newKey(t)
	keys, conf := filepath.Join(dir, "keys"), filepath.Join(dir, "conf")
	os.WriteFile(keys, []byte(k.line("", "k")), 0o600)
	os.WriteFile(conf, []byte("AuthorizedKeysFile "+keys+"\n"), 0o600)
	for _, tt := range []struct {
		env, args string
		code      int
		want      string
	}{
		{"", "--help", 0, "Examples:"},
		{"", "--frobnicate", 2, "unknown flag"},
		{"", "a b", 2, "one IMAGE_ROOT_PARENT"},
		{"--frobnicate", "", 2, "SSHD_OPTIONS"},
		{"", "-t -f " + conf, 0, "configuration is usable"},
		{"-t -f " + conf, "", 0, "configuration is usable"},
		{"-t -f /no/such", "-f " + conf, 0, "configuration is usable"},
		{"", "-t -D -e -q -u0 -4 -p 2022 -o MaxSessions=5 -f " + conf, 0, "configuration is usable"},
		{"", "-t -f /no/such", 1, "/no/such"},
		{"", "-t -o Nonsense=1 -f " + conf, 1, "Nonsense"},
		{"", "-t -h /no/key -f " + conf, 1, "HostKey: open /no/key"},
		{"", "-t -h " + k.path + " -f " + conf, 0, "configuration is usable"},
		{"", "-t -h " + k.path + " -o HostCertificate=" + keys + " -f " + conf, 1, "not a host certificate"},
		{"", "-t -f " + conf + " -E " + dir + "/log", 0, "configuration is usable"},
	} {
		t.Setenv("SSHD_OPTIONS", tt.env)
		var out, errs bytes.Buffer
		code := Main(t.Context(), strings.Fields(tt.args), &out, &errs)
		if all := out.String() + errs.String(); code != tt.code || !strings.Contains(all, tt.want) {
			t.Errorf("%q %q: %d, %s", tt.env, tt.args, code, all)
		}
	}
	t.Setenv("SSHD_OPTIONS", "")
	t.Setenv("IMS_BUILDENV_LOG_FORMAT", "json")
	var errs bytes.Buffer
	if code := Main(t.Context(), []string{"-t", "-f", conf}, io.Discard, &errs); code != 0 || !strings.Contains(errs.String(), `"msg":"configuration is usable"`) {
		t.Errorf("JSON: %d, %s", code, &errs)
	}
	if st, err := os.Stat(dir + "/log"); err != nil || st.Mode() != 0o600 || st.Size() == 0 {
		t.Errorf("the log file: %v, %v", st, err)
	}
}

func TestListen(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	cfg := Config{Options: []string{"ListenAddress " + busy.Addr().String()}, Log: slog.New(slog.DiscardHandler)}
	set, err := LoadSettings(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(nil, set); err == nil || !strings.Contains(err.Error(), "choose another Port") {
		t.Errorf("got %v", err)
	}
}
