// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func TestMain(m *testing.M) {
	jail.ChildMain()
	if len(os.Args) == 3 && os.Args[1] == dialArg {
		dialStatus(os.Args[2])
		return
	}
	testkit.HideProfile()
	os.Exit(m.Run())
}

// key is a user's key pair; path is the private half as a file for ssh(1).
type key struct {
	ssh.Signer
	path string
}

func newKey(t testing.TB) key {
	t.Helper()
	_, raw, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(raw, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "id")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return key{s, path}
}

// line is the key's line of authorized_keys.
func (k key) line(options, comment string) string {
	l := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.PublicKey()))) + " " + comment + "\n"
	if options != "" {
		l = options + " " + l
	}
	return l
}

func (k key) fingerprint() string { return ssh.FingerprintSHA256(k.PublicKey()) }

// logBuffer is a log that a test can read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// job is a running gateway in this process.
type job struct {
	t      testing.TB
	parent string // IMAGE_ROOT_PARENT
	keys   string // the authorized_keys file
	key    key    // a key that is in it
	addr   string
	log    *logBuffer
	cancel context.CancelFunc
	ended  chan struct{} // Run has returned
	err    error         // what, after ended
}

// options changes a job before it starts.
type options struct {
	config string // more lines of sshd_config
	keys   string // authorized_keys; empty: the job's key
	root   string // a jailed job in this image root
	change func(*Config)
}

// start runs a job until its port listens; it ends with the test.
func start(t testing.TB, o options) *job {
	t.Helper()
	j := launch(t, o)
	j.awaitLog("msg=listening")
	return j
}

// startError is the error of a job that does not start.
func startError(t testing.TB, o options) error {
	t.Helper()
	j := launch(t, o)
	eventually(t, "Run ends or listens", func() bool {
		select {
		case <-j.ended:
			return true
		default:
			return strings.Contains(j.log.String(), "msg=listening")
		}
	})
	j.cancel()
	<-j.ended
	if strings.Contains(j.log.String(), "msg=listening") {
		return nil
	}
	if _, err := os.Stat(filepath.Join(j.parent, "pod_error")); err != nil {
		t.Errorf("the sidecar is not told: %v", err)
	}
	return j.err
}

func launch(t testing.TB, o options) *job {
	t.Helper()
	testkit.NeedRoot(t)
	j := &job{t: t, parent: t.TempDir(), key: newKey(t), log: &logBuffer{}, ended: make(chan struct{})}
	dir := t.TempDir()
	j.keys = filepath.Join(dir, "authorized_keys")
	if o.keys == "" {
		o.keys = j.key.line("", "the user")
	}
	j.write(j.keys, o.keys)
	conf := filepath.Join(dir, "sshd_config")
	// SHLVL keeps bash from reading the tester's ~/.bashrc for every command.
	j.write(conf, o.config+"\nAuthorizedKeysFile "+j.keys+"\nSubsystem sftp internal-sftp\nSetEnv SHLVL=2\n")
	root := filepath.Join(j.parent, "image-root")
	if o.root != "" {
		if err := os.Rename(o.root, root); err != nil {
			t.Fatal(err)
		}
	} else if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	j.addr = l.Addr().String()
	cfg := Config{
		SSHD: config.SSHD{Common: config.Common{
			JobID: "11111111-2222-3333-4444-555555555555", Action: config.ActionCustomize, Parent: j.parent,
			Arch: "x86_64", Jailed: o.root != "",
		}},
		ConfigFile: conf,
		StateDir:   filepath.Join(dir, "state"),
		RunDir:     filepath.Join(dir, "run"),
		Listener:   l,
		Log:        slog.New(slog.NewTextHandler(j.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if o.change != nil {
		o.change(&cfg)
	}
	var ctx context.Context
	ctx, j.cancel = context.WithCancel(context.Background())
	j.flag("ready")
	go func() {
		j.err = Run(ctx, cfg)
		l.Close()
		close(j.ended)
	}()
	t.Cleanup(func() {
		j.cancel()
		<-j.ended
		if t.Failed() {
			t.Logf("log of the gateway:\n%s", j.log)
		}
	})
	return j
}

func (j *job) write(path, text string) {
	j.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		j.t.Fatal(err)
	}
}

// flag creates a signal file in the parent.
func (j *job) flag(name string) { j.t.Helper(); j.write(filepath.Join(j.parent, name), "") }

// awaitLog waits until the log holds text.
func (j *job) awaitLog(text string) {
	j.t.Helper()
	eventually(j.t, "the log holds "+text, func() bool {
		select {
		case <-j.ended:
			if !strings.Contains(j.log.String(), text) {
				j.t.Fatalf("Run ended (%v) without logging %q:\n%s", j.err, text, j.log)
			}
		default:
		}
		return strings.Contains(j.log.String(), text)
	})
}

// eventually polls for a condition that another process brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// dialAs logs in as user with the keys, offered in order.
func (j *job) dialAs(user string, keys ...ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", j.addr, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(keys...)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
}

func (j *job) dial() *ssh.Client {
	j.t.Helper()
	c, err := j.dialAs("root", j.key)
	if err != nil {
		j.t.Fatal(err)
	}
	j.t.Cleanup(func() { c.Close() })
	return c
}

func newSession(t testing.TB, c *ssh.Client) *ssh.Session {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// exec runs a command over c and returns its output, both streams, and exit code.
func execute(t testing.TB, c *ssh.Client, command string) (string, int) {
	t.Helper()
	out, err := newSession(t, c).CombinedOutput(command)
	var exit *ssh.ExitError
	switch {
	case errors.As(err, &exit):
		return string(out), exit.ExitStatus()
	case err != nil:
		t.Fatalf("%s: %v", command, err)
	}
	return string(out), 0
}

// tool is a command line of ssh, scp or sftp against the job, without the user's own
// configuration, agent and known hosts.
func (j *job) tool(name string, args ...string) *exec.Cmd {
	j.t.Helper()
	testkit.NeedTool(j.t, name)
	_, port, _ := net.SplitHostPort(j.addr)
	portFlag := map[string]string{"ssh": "-p"}[name]
	if portFlag == "" {
		portFlag = "-P"
	}
	base := []string{
		"-F", "none", portFlag, port, "-i", j.key.path, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes",
	}
	// A client that hangs is this test's failure, not the end of all tests by their timeout.
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	j.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, append(base, args...)...)
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// run runs cmd and returns its two outputs and exit code.
func run(t testing.TB, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", cmd, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

const host = "root@127.0.0.1"
