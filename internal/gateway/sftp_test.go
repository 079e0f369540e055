// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/time/rate"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// sftp runs a batch of OpenSSH's client.
func (j *job) sftp(commands string) (out string, code int) {
	j.t.Helper()
	batch := filepath.Join(j.t.TempDir(), "batch")
	j.write(batch, commands)
	stdout, stderr, code := run(j.t, j.tool("sftp", "-b", batch, host))
	return stdout + stderr, code
}

// TestFileLog: what is done to files over SFTP is in the log, from inside a jail as well.
func TestFileLog(t *testing.T) {
	for _, jailed := range []bool{false, true} {
		t.Run(fmt.Sprint("jailed ", jailed), func(t *testing.T) {
			o, dir := options{}, t.TempDir()
			if jailed {
				o.root, dir = imageRoot(t), "/tmp"
			}
			j := start(t, o)
			local := t.TempDir()
			j.write(filepath.Join(local, "five"), "12345")
			out, code := j.sftp(strings.NewReplacer("DIR", dir, "LOCAL", local).Replace(`put LOCAL/five DIR/a
get DIR/a LOCAL/b
rename DIR/a DIR/c
mkdir DIR/d
rmdir DIR/d
symlink c DIR/link
ln DIR/c DIR/hard
chmod 640 DIR/c
rm DIR/c
-get DIR/missing LOCAL/x
-rmdir DIR/missing
`))
			if code != 0 {
				t.Fatalf("sftp: %d %s", code, out)
			}
			for _, want := range []string{
				`op=open path=DIR/a flags=WRITE,CREATE,TRUNCATE mode=0600`, `op=close path=DIR/a bytes_read=0 bytes_written=5`,
				`op=open path=DIR/a flags=READ`, `op=close path=DIR/a bytes_read=5 bytes_written=0`,
				`op=posix-rename path=DIR/a target=DIR/c`, `op=mkdir path=DIR/d mode=0777`, `op=rmdir path=DIR/d`,
				`op=symlink path=DIR/link target=c`, `op=hardlink path=DIR/hard target=DIR/c`, `op=setstat path=DIR/c attrs="mode=0640"`,
				`op=remove path=DIR/c`, `op=rmdir path=DIR/missing err="No such file or directory"`,
			} {
				j.awaitLog("kind=sftp pty=false " + strings.ReplaceAll(want, "DIR", dir))
			}
		})
	}
}

// TestFileLogDiskFull: a full disk is named, with the space there is.
func TestFileLogDiskFull(t *testing.T) {
	j := start(t, options{})
	local := filepath.Join(t.TempDir(), "some")
	j.write(local, strings.Repeat("x", 200000))
	if out, code := j.sftp("put " + local + " /dev/full\n"); code == 0 {
		t.Errorf("%d %s", code, out)
	}
	j.awaitLog(`msg="disk full"`)
	if log := j.log.String(); strings.Count(log, "op=write") != 1 || !strings.Contains(log, "path=/dev/full volume_free_bytes=") {
		t.Error("not told once, with the free space")
	}
}

// TestSFTPArguments: those of sshd_config count, whichever way the server is started.
func TestSFTPArguments(t *testing.T) {
	start := func(t *testing.T, config string) *job {
		j := start(t, options{root: imageRoot(t), config: config})
		for _, name := range []string{"etc/umask", "tmp/file"} {
			j.write(filepath.Join(j.parent, "image-root", name), "content")
		}
		return j
	}
	t.Run("read-only", func(t *testing.T) {
		j := start(t, "ForceCommand internal-sftp -R -d /etc")
		local := filepath.Join(t.TempDir(), "hostname")
		if out, code := j.sftp("get hostname " + local); code != 0 {
			t.Errorf("get: %d %s", code, out)
		}
		if b, err := os.ReadFile(local); string(b) != "the-image\n" {
			t.Errorf("%q, %v", b, err)
		}
		for _, change := range []string{"put " + local + " /tmp/new", "rm /tmp/file", "mkdir /tmp/d", "rename /tmp/file /tmp/x", "chmod 600 /tmp/file", "ln /tmp/file /tmp/hard", "symlink x /tmp/y"} {
			if out, code := j.sftp(change); code == 0 {
				t.Errorf("%s was done: %s", change, out)
			}
		}
		j.awaitLog(`op=remove err="Not permitted`)
		if names, err := os.ReadDir(filepath.Join(j.parent, "image-root/tmp")); err != nil || len(names) != 1 {
			t.Errorf("%v, %v", names, err)
		}
	})
	t.Run("others", func(t *testing.T) {
		j := start(t, "Subsystem sftp /usr/lib/openssh/sftp-server -u 0077 -l ERROR -f AUTH -P remove,posix-rename")
		j.awaitLog(`arguments=[-f]`)
		local := filepath.Join(t.TempDir(), "local")
		j.write(local, "x")
		if out, code := j.sftp("put -p " + local + " /tmp/a\nmkdir /tmp/dir\nrename /tmp/a /tmp/b"); code != 0 {
			t.Errorf("%d %s", code, out) // by the protocol's own rename
		}
		if out, code := j.sftp("rm /tmp/b"); code == 0 || !strings.Contains(out, "ermission denied") {
			t.Errorf("rm: %d %s", code, out)
		}
		if st, err := os.Stat(filepath.Join(j.parent, "image-root/tmp/dir")); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("umask: %v, %v", st.Mode(), err)
		}
		if strings.Contains(j.log.String(), "msg=file") {
			t.Error("logged at level ERROR")
		}
	})
	for _, bad := range []string{"ForceCommand internal-sftp -u 9", "Subsystem sftp internal-sftp -x", "Subsystem sftp internal-sftp -P no-such", "ForceCommand internal-sftp -l LOUD"} {
		if _, err := LoadSettings(Config{Options: []string{bad}, Log: quietServer().log}); err == nil || !strings.Contains(err.Error(), "sftp-server(8)") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// TestFileLogHostile: ATTACK: root in the jail writes what he likes to the pipe. PROMISE: it stays one quoted line of
// bounded length each, bounded in number, and a line that is no record reaches the session's own client only.
func TestFileLogHostile(t *testing.T) {
	s := quietServer()
	text := &logBuffer{}
	rec := &recorder{added: make(chan struct{}, 1<<16)}
	ss := &session{c: testConn(s), ch: rec, log: slog.New(slog.NewTextHandler(text, nil))}
	l := &sftpLog{ss: ss, limit: rate.NewLimiter(1, 50)}
	var in bytes.Buffer
	in.WriteString("{\"op\":\"open\",\"path\":\"a\\u001b[31m\\nlevel=ERROR msg=forged\"}\n")
	in.WriteString("panic: \x1b[2J\r\n")
	in.WriteString(strings.Repeat("y", 1<<20) + "\n")
	in.WriteString(`{"op":7}` + "\n" + `{"op":"close","read":-9,"lost":-1}` + "\nno newline, level=ERROR")
	for i := range 100000 {
		in.WriteString("\n{\"op\":\"open\",\"path\":\"" + strconv.Itoa(i) + "\"}")
	}
	l.copy(&in)
	got := text.String()
	if n := strings.Count(got, "\n"); n != 51 || l.lost < 99900 {
		t.Errorf("%d lines, %d lost", n, l.lost)
	}
	for line := range strings.Lines(got) {
		if len(line) > 5000 || strings.ContainsAny(line, "\x1b\r") || !strings.HasPrefix(line, "time=") || strings.Contains(line, " level=ERROR") && !strings.Contains(line, `"`) {
			t.Errorf("line %.200q of %d bytes", line, len(line))
		}
	}
}

// TestFileLogHeldOpen: ATTACK: the server's log pipe outlives it. PROMISE: the session ends all the same.
func TestFileLogHeldOpen(t *testing.T) {
	testkit.NeedRoot(t)
	j := start(t, options{})
	cmd := j.tool("sftp", host)
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	s, _ := j.session("sftp")
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/2", s.PID), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	j.awaitLog("session ended")
}

// FuzzFileLog logs what anybody may write to the pipe: each line becomes whole lines of the log, quoted.
func FuzzFileLog(f *testing.F) {
	f.Add([]byte(`{"op":"open","path":"a\u001b[31m\nlevel=ERROR","flags":"READ","mode":"0644"}` + "\n"))
	f.Add([]byte(`{"op":"close","read":-9,"lost":3,"err":"x","full":true}` + "\nlast words"))
	control := func(r rune) bool { return unicode.IsControl(r) && r != 0x7f } // slog leaves DEL, which moves no cursor
	f.Fuzz(func(t *testing.T, sent []byte) {
		text := &logBuffer{}
		ss := &session{c: testConn(quietServer()), ch: &recorder{added: make(chan struct{}, 1<<10)}, log: slog.New(slog.NewTextHandler(text, nil))}
		l := &sftpLog{ss: ss, limit: rate.NewLimiter(1, 50)}
		l.copy(bytes.NewReader(sent))
		for line := range strings.Lines(text.String()) {
			if !strings.HasPrefix(line, "time=") || !strings.HasSuffix(line, "\n") || strings.ContainsFunc(strings.TrimSuffix(line, "\n"), control) {
				t.Fatalf("%q", line)
			}
		}
	})
}
