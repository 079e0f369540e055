// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// ATTACK: offer key B, which is in the file, then log in with key A. PROMISE: the session
// belongs to A, with A's options, and the log says A.
func TestIdentityIsOfTheProvenKey(t *testing.T) {
	a, b := newKey(t), newKey(t)
	j := start(t, options{keys: b.line("", "key B") + a.line(`command="echo forced A"`, "key A")})
	public := filepath.Join(t.TempDir(), "b.pub") // without its private half ssh can only offer it
	j.write(public, b.line("", ""))
	j.key = key{path: public}
	out, errs, code := run(t, j.tool("ssh", "-v", "-i", a.path, host, "echo free"))
	if out != "forced A\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
	// The test is void unless B was offered and accepted before A signed.
	if i, k := strings.Index(errs, "accepts key: "+public), strings.Index(errs, "Authenticated to"); i < 0 || k < i {
		t.Fatalf("ssh did not offer B before A:\n%s", errs)
	}
	log := j.log.String()
	if !strings.Contains(log, "key="+a.fingerprint()+` comment="key A"`) || strings.Contains(log, "key="+b.fingerprint()+` comment="key B"`) {
		t.Errorf("the log names the wrong key:\n%s", log)
	}
}

// unproven is a key whose holder signs with another one.
type unproven struct {
	ssh.Signer
	other ssh.Signer
}

func (u unproven) Sign(r io.Reader, data []byte) (*ssh.Signature, error) {
	return u.other.Sign(r, data)
}

func TestWhoIsRefused(t *testing.T) {
	j := start(t, options{})
	stranger := newKey(t)
	for _, tt := range []struct {
		name, user string
		auth       []ssh.AuthMethod
	}{
		{"none", "root", nil},
		{"password", "root", []ssh.AuthMethod{ssh.Password("root")}},
		{"another user with the right key", "admin", []ssh.AuthMethod{ssh.PublicKeys(j.key)}},
		{"unknown key", "root", []ssh.AuthMethod{ssh.PublicKeys(stranger)}},
		{"known key that does not sign", "root", []ssh.AuthMethod{ssh.PublicKeys(unproven{j.key, stranger})}},
		{"certificate over the right key", "root", []ssh.AuthMethod{ssh.PublicKeys(certified(t, j.key, stranger))}},
	} {
		c, err := ssh.Dial("tcp", j.addr, &ssh.ClientConfig{User: tt.user, Auth: tt.auth, HostKeyCallback: ssh.InsecureIgnoreHostKey()})
		if err == nil {
			c.Close()
			t.Errorf("%s: logged in", tt.name)
		}
	}
	if strings.Contains(j.log.String(), "msg=login ") {
		t.Errorf("a login was logged:\n%s", j.log)
	}
	if out, code := execute(t, j.dial(), "echo ok"); out != "ok\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
}

func certified(t *testing.T, k, ca key) ssh.Signer {
	t.Helper()
	cert := &ssh.Certificate{Key: k.PublicKey(), CertType: ssh.UserCert, ValidPrincipals: []string{"root"}, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(zeros{}, ca); err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewCertSigner(cert, k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// The user name that counts is the one of the attempt that succeeds: a client cannot start
// as root and finish as somebody else.
func TestUserOfTheSuccessfulAttempt(t *testing.T) {
	k := newKey(t)
	file := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(file, []byte(k.line("", "k")), 0o600)
	s := quietServer()
	s.set, _ = sshdconf.Load("", []string{"AuthorizedKeysFile " + file})
	s.algs, _ = chooseAlgorithms(s.set)
	s.conns = map[*conn]struct{}{}
	c := testConn(s)
	cfg := s.serverConfig(c)
	perms, err := cfg.PublicKeyCallback(attempt{user: "root"}, k.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	if perms, err := cfg.VerifiedPublicKeyCallback(attempt{user: "admin"}, k.PublicKey(), perms, ssh.KeyAlgoED25519); err == nil || perms != nil || c.login != nil {
		t.Errorf("admin got in with root's offer: %v, %v", perms, err)
	}
	if _, err := cfg.PublicKeyCallback(attempt{user: "admin"}, k.PublicKey()); err == nil {
		t.Error("admin's offer was accepted")
	}
	if _, err := cfg.NoClientAuthCallback(attempt{user: "root"}); err == nil {
		t.Error("no authentication at all was accepted")
	}
	perms, err = cfg.VerifiedPublicKeyCallback(attempt{user: "root"}, k.PublicKey(), perms, ssh.KeyAlgoED25519)
	if err != nil || perms.ExtraData[loginKey{}].(*login).key.Comment != "k" {
		t.Errorf("%v, %v", perms, err)
	}
}

// attempt is one authentication attempt.
type attempt struct {
	ssh.ConnMetadata
	user string
}

func (a attempt) User() string          { return a.user }
func (a attempt) RemoteAddr() net.Addr  { return addrConn{}.RemoteAddr() }
func (a attempt) ClientVersion() []byte { return []byte("SSH-2.0-test") }

func TestKeysAreReadForEachLogin(t *testing.T) {
	j := start(t, options{})
	second := newKey(t)
	if _, err := j.dialAs("root", second); err == nil {
		t.Fatal("a key that is not in the file was accepted")
	}
	j.write(j.keys, "garbage\n"+second.line("", "second"))
	c, err := j.dialAs("root", second)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := j.dialAs("root", j.key); err == nil {
		t.Error("a key that left the file was accepted")
	}
	os.Remove(j.keys)
	if _, err := j.dialAs("root", second); err == nil {
		t.Error("a key was accepted without a file")
	}
}

func TestKeyOptions(t *testing.T) {
	k := map[string]key{}
	var lines strings.Builder
	for name, opts := range map[string]string{
		"forced":   `command="echo forced: $SSH_ORIGINAL_COMMAND"`,
		"restrict": "restrict",
		"pty":      "restrict,pty",
		"sftp":     `command="internal-sftp"`,
		"env":      `environment="FROM_KEY=a b",environment="IMS_JOB_ID=forged"`,
		"far":      `from="192.0.2.0/24"`,
		"near":     `from="127.0.0.*,!127.0.0.2"`,
		"expired":  `expiry-time="20200101"`,
		"valid":    `expiry-time="29990101"`,
		"unknown":  "no-such-option",
	} {
		k[name] = newKey(t)
		lines.WriteString(k[name].line(opts, name))
	}
	j := start(t, options{keys: lines.String()})
	dial := func(name string) *ssh.Client {
		t.Helper()
		c, err := j.dialAs("root", k[name])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	for _, name := range []string{"far", "expired", "unknown"} {
		if _, err := j.dialAs("root", k[name]); err == nil {
			t.Errorf("%s: logged in", name)
		}
	}
	for _, name := range []string{"near", "valid"} {
		if out, _ := execute(t, dial(name), "echo in"); out != "in\n" {
			t.Errorf("%s: %q", name, out)
		}
	}
	if out, _ := execute(t, dial("forced"), "rm -rf /x"); out != "forced: rm -rf /x\n" {
		t.Errorf("command=: %q", out)
	}
	s := newSession(t, dial("forced"))
	if out, err := s.StdoutPipe(); err != nil || s.RequestSubsystem("sftp") != nil {
		t.Error("subsystem with command= was refused")
	} else if b := make([]byte, 7); true {
		if out.Read(b); string(b) != "forced:" {
			t.Errorf("subsystem with command=: %q", b)
		}
	}
	sftp := dial("sftp")
	var exit *ssh.ExitError
	if out, err := newSession(t, sftp).CombinedOutput("scp -t /tmp"); !errors.As(err, &exit) || exit.ExitStatus() != 1 || string(out) != "This service allows sftp connections only.\n" {
		t.Errorf("a command with internal-sftp forced: %q, %v", out, err)
	}
	s = newSession(t, sftp)
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	if err := s.RequestSubsystem("sftp"); err != nil {
		t.Errorf("sftp with internal-sftp forced: %v", err)
	}
	in.Write([]byte{0, 0, 0, 5, 1, 0, 0, 0, 3}) // SSH_FXP_INIT, version 3
	if b := make([]byte, 9); true {
		if _, err := io.ReadFull(out, b); err != nil || b[4] != 2 {
			t.Errorf("sftp with internal-sftp forced: %v, %v", b, err)
		}
	}
	if out, _ := execute(t, dial("env"), "echo $FROM_KEY $IMS_JOB_ID"); out != "a b 11111111-2222-3333-4444-555555555555\n" {
		t.Errorf("environment=: %q", out)
	}
	if err := newSession(t, dial("restrict")).RequestPty("xterm", 24, 80, nil); err == nil {
		t.Error("restrict: got a terminal")
	}
	if err := newSession(t, dial("pty")).RequestPty("xterm", 24, 80, nil); err != nil {
		t.Errorf("restrict,pty: %v", err)
	}
	if out, code := execute(t, dial("restrict"), "echo yes"); out != "yes\n" || code != 0 {
		t.Errorf("restrict: a command gave %q, %d", out, code)
	}
}

// TestPeersOfUsers: an address that would match nobody is told when the file is read.
func TestPeersOfUsers(t *testing.T) {
	for _, bad := range []string{"DenyUsers root@10.0.0.0/33", "AllowUsers root@10.0.0.1/8", "DenyUsers root@"} {
		if _, err := LoadSettings(Config{Options: []string{bad}, Log: quietServer().log}); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestConfigThatRefuses(t *testing.T) {
	for conf, ok := range map[string]bool{
		"DenyUsers root": false, "AllowUsers admin": false, "AllowUsers root@192.0.2.*": false, "AllowUsers root@127.*": true,
		"DenyUsers root@127.0.0.0/8": false, "DenyUsers root@192.0.2.0/24": true, "AllowUsers root@127.0.0.0/8": true, "AllowUsers root@!127.0.0.1,*": false,
		"PermitRootLogin forced-commands-only": false, "PermitRootLogin prohibit-password": true, "PubkeyAcceptedAlgorithms ecdsa*": false,
	} {
		t.Run(conf, func(t *testing.T) {
			j := start(t, options{config: conf})
			c, err := j.dialAs("root", j.key)
			if (err == nil) != ok {
				t.Errorf("login: %v, want success = %v", err, ok)
			}
			if err == nil {
				c.Close()
			}
		})
	}
}

func TestLoginGraceAndStartups(t *testing.T) {
	j := start(t, options{config: "MaxStartups 3\nLoginGraceTime 1"})
	c := j.dial() // authenticated connections do not count
	var idle []net.Conn
	for range 6 {
		nc, err := net.Dial("tcp", j.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		idle = append(idle, nc)
	}
	for i, nc := range idle {
		banner := make([]byte, 64)
		nc.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, _ := nc.Read(banner)
		if i >= 3 && !strings.HasPrefix(string(banner[:n]), "SSH-2.0-OpenSSH_compatible ims-buildenv_") {
			t.Errorf("connection %d: banner %q", i, banner[:n])
		}
	}
	j.awaitLog("MaxStartups: too many")
	// The newest stranger does not keep a client with a key out.
	if out, code := execute(t, j.dial(), "echo in"); out != "in\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
	for _, nc := range idle {
		if _, err := nc.Read(make([]byte, 1<<16)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a connection without login is still open")
		}
	}
	j.awaitLog("LoginGraceTime: no login within 1s")
	if out, code := execute(t, c, "echo still in"); out != "still in\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
}

// frozen is a client's connection that stops to read when told.
type frozen struct {
	net.Conn
	stop chan struct{}
}

func (f frozen) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	select {
	case <-f.stop:
		select {} // for ever, like a machine that was switched off
	default:
	}
	return n, err
}

func TestClientAlive(t *testing.T) {
	j := start(t, options{config: "ClientAliveInterval 1\nClientAliveCountMax 2"})
	living := j.dial()
	execute(t, living, "true")
	// Two peers that are switched off: one that ran a command, and one that logged in and did nothing, as ssh -N does.
	stop := make(chan struct{})
	for i := range 2 {
		nc, err := net.Dial("tcp", j.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		sc, chans, reqs, err := ssh.NewClientConn(frozen{nc, stop}, j.addr, &ssh.ClientConfig{
			User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(j.key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		})
		if err != nil {
			t.Fatal(err)
		}
		c := ssh.NewClient(sc, chans, reqs)
		if i == 0 {
			execute(t, c, "true")
		}
	}
	close(stop)
	eventually(t, "both are given up", func() bool {
		return strings.Count(j.log.String(), "ClientAliveCountMax: no sign of life for 3s") == 2
	})
	if out, code := execute(t, living, "echo alive"); out != "alive\n" || code != 0 {
		t.Errorf("a silent client that answers: %q, %d", out, code)
	}
}

func TestHostKeysAreKept(t *testing.T) {
	state := t.TempDir()
	var prints []string
	for range 2 {
		j := start(t, options{change: func(c *Config) { c.StateDir = state }})
		_, err := ssh.Dial("tcp", j.addr, &ssh.ClientConfig{User: "root", HostKeyCallback: func(_ string, _ net.Addr, k ssh.PublicKey) error {
			prints = append(prints, ssh.FingerprintSHA256(k))
			return errors.New("seen enough")
		}})
		if err == nil {
			t.Fatal("no error")
		}
		if !strings.Contains(j.log.String(), "fingerprint="+prints[len(prints)-1]) {
			t.Error("the fingerprint is not in the log")
		}
		j.cancel()
		<-j.ended
	}
	if prints[0] != prints[1] {
		t.Errorf("host keys %v differ", prints)
	}
	for _, name := range []string{"ssh_host_ed25519_key"} {
		if st, err := os.Stat(state + "/" + name); err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
}

// What cannot work must be said at start, in one line.
func TestStartFails(t *testing.T) {
	k := newKey(t)
	bad := t.TempDir() + "/bad"
	os.WriteFile(bad, []byte("no key"), 0o600)
	shared := t.TempDir() + "/shared"
	os.WriteFile(shared, []byte("x"), 0o640)
	for _, tt := range []struct {
		name, keys, conf, want string
	}{
		{"no usable key", "# nobody\nrubbish\n", "", "no usable key"},
		{"only an unknown option", k.line("frobnicate", "x"), "", "no usable key"},
		{"root may not log in", k.line("", "x"), "PermitRootLogin no", "PermitRootLogin no"},
		{"DenyGroups", k.line("", "x"), "DenyGroups root", "DenyGroups"},
		{"bad keyword", k.line("", "x"), "PermitRootLogni yes", "PermitRootLogni"},
		{"missing host key", k.line("", "x"), "HostKey /no/such/key", "/no/such/key"},
		{"malformed host key", k.line("", "x"), "HostKey " + bad, bad},
		{"host key for all to read", k.line("", "x"), "HostKey " + shared, "mode 0640"},
		{"foreign chroot", k.line("", "x"), "ChrootDirectory /srv", "ChrootDirectory /srv"},
		{"no cipher left", k.line("", "x"), "Ciphers rot13", "Ciphers rot13"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := startError(t, options{keys: tt.keys, config: tt.conf})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	err := startError(t, options{change: func(c *Config) { c.ConfigFile = "/no/such/config" }})
	if err == nil || !strings.Contains(err.Error(), "/no/such/config") {
		t.Errorf("missing configuration: %v", err)
	}
}
