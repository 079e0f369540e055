// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// level is how far sessions are confined: by SSH_JAIL and by what the container may do.
type level string

const (
	plain      level = "plain"
	chroot     level = "chroot"     // a pod's default capabilities
	namespaces level = "namespaces" // CAP_SYS_ADMIN
)

// podCaps are the capabilities container runtimes give by default.
const podCaps = "--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap"

// gateway is a running sshd and a user with a key to it.
type gateway struct {
	level    level
	dir      string // everything of it
	root     string // the image root as the test sees it
	prefix   string // what stands before paths of the image root in a session
	port     string
	identity string // the user's private key; .pub is beside it
	config   string // for OpenSSH's clients, who know this gateway as "job"
	cmd      *exec.Cmd
	ended    chan struct{}
	err      error // of cmd, after ended
}

// settings of a gateway before it starts.
type settings struct {
	level   level
	options string // more lines of sshd_config
	root    func(dir string)
}

// shared is what most tests use: one gateway of each level.
var shared struct {
	gateways
	mu       sync.Mutex
	dir      string
	template string
	byLevel  map[level]*gateway
}

// gateways ends what was started.
type gateways struct{ all []*gateway }

func (g *gateways) end() error {
	var errs []error
	for _, one := range g.all {
		errs = append(errs, one.stop())
	}
	if shared.dir != "" {
		errs = append(errs, os.RemoveAll(shared.dir))
	}
	return errors.Join(errs...)
}

// each runs a test against the shared gateway of each level.
func each(t *testing.T, test func(t *testing.T, g *gateway)) {
	t.Helper()
	for _, l := range []level{plain, chroot, namespaces} {
		t.Run(string(l), func(t *testing.T) { test(t, common(t, l)) })
	}
}

// common is the shared gateway of a level.
func common(t *testing.T, l level) *gateway {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	g := shared.byLevel[l]
	if g == nil {
		g = launch(t, settings{level: l}, filepath.Join(commonDir(t), string(l)))
		shared.all = append(shared.all, g)
		if shared.byLevel == nil {
			shared.byLevel = map[level]*gateway{}
		}
		shared.byLevel[l] = g
	}
	began := g.logSize()
	t.Cleanup(func() { g.explain(t, began) })
	return g
}

// commonDir holds what outlives a single test; the caller holds shared.mu.
func commonDir(t *testing.T) string {
	t.Helper()
	program(t) // skips before anything is made
	if shared.dir == "" {
		dir, err := os.MkdirTemp("", "ims-buildenv-clients-")
		if err != nil {
			t.Fatal(err)
		}
		shared.dir = dir
	}
	return shared.dir
}

// own starts a gateway for one test.
func own(t *testing.T, s settings) *gateway {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	commonDir(t)
	g := launch(t, s, t.TempDir())
	t.Cleanup(func() {
		g.explain(t, 0)
		if err := g.stop(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// nextPort counts up; the network namespace is ours.
var nextPort = 2200

// launch starts an sshd and waits until it listens; the caller holds shared.mu.
func launch(t *testing.T, s settings, dir string) *gateway {
	t.Helper()
	binary := program(t)
	testkit.NeedTool(t, "ssh", "ssh-keygen", "setpriv")
	nextPort++
	g := &gateway{level: s.level, dir: dir, root: filepath.Join(dir, "job/image-root"), port: fmt.Sprint(nextPort),
		identity: filepath.Join(dir, "id"), config: filepath.Join(dir, "ssh_config"), ended: make(chan struct{})}
	if err := os.MkdirAll(filepath.Join(dir, "job"), 0o755); err != nil {
		t.Fatal(err)
	}
	if s.level == plain {
		g.prefix = g.root
		if err := os.MkdirAll(filepath.Join(g.root, "tmp"), 0o755); err != nil {
			t.Fatal(err)
		}
	} else {
		must(t, exec.Command("cp", "-al", imageRoot(t), g.root))
	}
	if s.root != nil {
		s.root(g.root)
	}
	for _, name := range []string{"id", "host"} {
		must(t, exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", filepath.Join(dir, name)))
	}
	g.write(t, "job/ready", "")
	// Known to the clients beforehand, so that each of them checks the host key.
	g.write(t, "known_hosts", fmt.Sprintf("[127.0.0.1]:%s %s", g.port, g.read(t, "host.pub")))
	// SHLVL keeps bash from reading the tester's ~/.bashrc for every command.
	g.write(t, "sshd_config", s.options+fmt.Sprintf(`
ListenAddress 127.0.0.1
AuthorizedKeysFile %[1]s/id.pub
HostKey %[1]s/host
Subsystem sftp internal-sftp
SetEnv SHLVL=2
`, dir))
	g.write(t, "ssh_config", fmt.Sprintf(`Host job
HostName 127.0.0.1
Port %[2]s
User root
IdentityFile %[1]s/id
IdentitiesOnly yes
IdentityAgent none
BatchMode yes
StrictHostKeyChecking yes
UserKnownHostsFile %[1]s/known_hosts
GlobalKnownHostsFile /dev/null
LogLevel ERROR
`, dir, g.port))
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	args := []string{binary, "-f", filepath.Join(dir, "sshd_config"), "-p", g.port, filepath.Join(dir, "job")}
	if s.level == chroot {
		args = append([]string{"setpriv", podCaps}, args...)
	}
	g.cmd = exec.Command(args[0], args[1:]...)
	g.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "IMS_ACTION=customize", "SSH_JAIL=" + map[bool]string{true: "False", false: "True"}[s.level == plain], "LC_ALL=C.UTF-8"}
	g.cmd.Stdout, g.cmd.Stderr = log, log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		g.err = g.cmd.Wait()
		close(g.ended)
	}()
	eventually(t, "sshd listens", func() bool {
		select {
		case <-g.ended:
			t.Fatalf("sshd: %v\n%s", g.err, g.read(t, "log"))
		default:
		}
		return strings.Contains(g.read(t, "log"), "msg=listening")
	})
	if s.level != plain && !strings.Contains(g.read(t, "log"), "msg=jail level="+string(s.level)) {
		g.stop()
		t.Fatalf("not at level %s:\n%s", s.level, g.read(t, "log"))
	}
	return g
}

// stop ends the gateway as Kubernetes does.
func (g *gateway) stop() error {
	g.cmd.Process.Signal(syscall.SIGTERM)
	<-g.ended
	if g.cmd.ProcessState.ExitCode() != 1 && g.cmd.ProcessState.ExitCode() != 0 {
		return fmt.Errorf("sshd at level %s: %w", g.level, g.err)
	}
	return nil
}

// explain shows what the gateway has logged since its log had size began, if the test failed.
func (g *gateway) explain(t *testing.T, began int64) {
	if !t.Failed() {
		return
	}
	text := g.read(t, "log")[began:]
	if most := 2000; len(text) > most {
		text = "...\n" + text[len(text)-most:]
	}
	t.Logf("log of sshd:\n%s", text)
}

func (g *gateway) logSize() int64 {
	st, err := os.Stat(filepath.Join(g.dir, "log"))
	if err != nil {
		return 0
	}
	return st.Size()
}

func (g *gateway) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(g.dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (g *gateway) read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(g.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// space makes an empty directory in the image root for this test, and returns its path as
// the test and as a session see it.
func (g *gateway) space(t *testing.T) (here, there string) {
	t.Helper()
	here, err := os.MkdirTemp(filepath.Join(g.root, "tmp"), "t-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(here) })
	return here, g.prefix + strings.TrimPrefix(here, g.root)
}

// tool is a command line of one of OpenSSH's clients, or of one that takes -F as they do.
func (g *gateway) tool(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	testkit.NeedTool(t, name)
	return client(name, append([]string{"-F", g.config}, args...)...)
}

// client is a command without the tester's home.
func client(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "LC_ALL=C.UTF-8", "TERM=xterm"}
	cmd.WaitDelay = patience
	return cmd
}

// run runs cmd and returns its two outputs and exit code. A client that hangs is killed, and fails the test.
func run(t testing.TB, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	stdout, stderr, code, ended := runWithin(t, patience, cmd)
	if !ended {
		t.Fatalf("%s: not done within %s\n%s%s", cmd, patience, stdout, stderr)
	}
	return stdout, stderr, code
}

// runWithin is run for a client that may hang: it is killed at the limit and has not ended then.
func runWithin(t testing.TB, limit time.Duration, cmd *exec.Cmd) (stdout, stderr string, code int, ended bool) {
	t.Helper()
	var out, errs bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			cmd.Process.Kill()
		}
	})()
	defer cancel()
	err := cmd.Wait()
	ended = ctx.Err() == nil
	var exit *exec.ExitError
	if ended && err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", cmd, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode(), ended
}

// must runs cmd, which has to end well, and returns its standard output.
func must(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, errs, code := run(t, cmd)
	if code != 0 {
		t.Fatalf("%s: exit %d\n%s%s", cmd, code, out, errs)
	}
	return out
}

// dial logs in with Go's client.
func (g *gateway) dial(t testing.TB) *ssh.Client {
	t.Helper()
	c, err := g.tryDial(ssh.ClientConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (g *gateway) tryDial(config ssh.ClientConfig) (*ssh.Client, error) {
	text, err := os.ReadFile(g.identity)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, err
	}
	text, err = os.ReadFile(filepath.Join(g.dir, "host.pub"))
	if err != nil {
		return nil, err
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, err
	}
	config.User, config.Auth, config.HostKeyCallback = "root", []ssh.AuthMethod{ssh.PublicKeys(key)}, ssh.FixedHostKey(host)
	config.Timeout = patience
	return ssh.Dial("tcp", g.address(), &config)
}

func (g *gateway) address() string { return net.JoinHostPort("127.0.0.1", g.port) }
