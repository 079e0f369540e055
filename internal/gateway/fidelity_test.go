// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// stockServer logs in to the machine's own sshd, which serves one connection and ends with it.
func stockServer(t *testing.T, k key) *ssh.Client {
	t.Helper()
	testkit.NeedTool(t, "sshd", "ssh-keygen")
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/host").CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	if err := os.WriteFile(dir+"/keys", []byte(k.line("", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // what Debian's service makes
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	f, err := theirs.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(sshd, "-i", "-f", "/dev/null", "-h", filepath.Join(dir, "host"), "-o", "AuthorizedKeysFile="+dir+"/keys",
		"-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PermitRootLogin=yes", "-o", "SetEnv=SHLVL=2")
	cmd.Stdin, cmd.Stdout = f, f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); cmd.Wait() })
	sc, chans, reqs, err := ssh.NewClientConn(ours, "stock", &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(k)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return ssh.NewClient(sc, chans, reqs)
}

// told runs a command with an input that has ended, and returns its output and what the
// server tells of its end, byte for byte.
func told(t *testing.T, c *ssh.Client, command string) string {
	t.Helper()
	ch, reqs, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ C string }{command})); !ok || err != nil {
		t.Fatalf("exec: %v, %v", ok, err)
	}
	ch.CloseWrite()
	end := make(chan string)
	go func() {
		s := ""
		for r := range reqs {
			if r.WantReply {
				r.Reply(false, nil)
			}
			s += fmt.Sprintf(" %s %q", r.Type, r.Payload)
		}
		end <- s
	}()
	out, err := io.ReadAll(ch)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%q", out) + <-end
}

// What clients are told of a command's end is what the machine's own sshd tells them.
func TestEndsLikeOpenSSH(t *testing.T) {
	j := start(t, options{})
	ours, stock := j.dial(), stockServer(t, j.key)
	commands := []string{
		"exit 0", "exit 1", "exit 2", "exit 126", "exit 127", "exit 128", "exit 255", "exit 256", "exit 300",
		"no-such-command", "/etc/passwd", "/", "cat; exit 3", "echo out; echo err >&2; exit 4", "sleep 0 & exit 5", "(exit 6)", "",
		"ulimit -c 0; kill -SEGV $$", "trap '' TERM; kill -TERM $$; exit 7", "sh -c 'kill -KILL $$'",
	}
	// Those that RFC 4254 names; for others sshd sends "SIG@openssh.com", whichever it was.
	for _, sig := range []string{"HUP", "INT", "QUIT", "ILL", "ABRT", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM"} {
		commands = append(commands, "ulimit -c 0; kill -"+sig+" $$; sleep 9")
	}
	for _, command := range commands {
		if got, want := told(t, ours, command), told(t, stock, command); got != want {
			t.Errorf("%q:\n got %s\nwant %s", command, got, want)
		}
	}
}
