// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// issue has ssh-keygen certify k and returns the certificate's file.
func (ca key) issue(t *testing.T, k key, args ...string) string {
	t.Helper()
	testkit.NeedTool(t, "ssh-keygen")
	pub := filepath.Join(t.TempDir(), "id.pub")
	if err := os.WriteFile(pub, []byte(k.line("", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	args = append([]string{"-q", "-s", ca.path, "-I", "the id", "-z", "42"}, append(args, pub)...)
	if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return strings.TrimSuffix(pub, ".pub") + "-cert.pub"
}

// login runs a command with k and its certificate through ssh(1).
func (j *job) login(k key, cert string, args ...string) (string, int) {
	j.t.Helper()
	j.key = k
	out, _, code := run(j.t, j.tool("ssh", append([]string{"-o", "CertificateFile=" + cert, host}, args...)...))
	return out, code
}

// Certificates of a CA with a cert-authority line.
func TestUserCertificates(t *testing.T) {
	k, ca, named, forced, stranger := newKey(t), newKey(t), newKey(t), newKey(t), newKey(t)
	rsaCA := key{path: filepath.Join(t.TempDir(), "ca")}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsaCA.path).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	rsaLine, err := os.ReadFile(rsaCA.path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	j := start(t, options{keys: ca.line("cert-authority", "the CA") +
		named.line(`cert-authority,principals="admin,deploy",no-pty`, "named") +
		forced.line(`cert-authority,command="echo by line"`, "forced") + "cert-authority " + string(rsaLine)})
	for _, tt := range []struct {
		name string
		ca   key
		args []string
		out  string // empty: refused
	}{
		{"good", ca, []string{"-n", "x,root"}, "run\n"},
		{"in its time", ca, []string{"-n", "root", "-V", "-1h:+1h"}, "run\n"},
		{"expired", ca, []string{"-n", "root", "-V", "-2h:-1h"}, ""},
		{"not yet valid", ca, []string{"-n", "root", "-V", "+1h:+2h"}, ""},
		{"wrong principal", ca, []string{"-n", "admin"}, ""},
		{"no principal", ca, nil, ""},
		{"wrong CA", stranger, []string{"-n", "root"}, ""},
		{"host certificate", ca, []string{"-h", "-n", "root"}, ""},
		{"unknown critical option", ca, []string{"-n", "root", "-O", "critical:frobnicate@example.com=1"}, ""},
		{"unknown extension", ca, []string{"-n", "root", "-O", "extension:frobnicate@example.com=1"}, "run\n"},
		{"verify-required", ca, []string{"-n", "root", "-O", "verify-required"}, ""},
		{"forced command", ca, []string{"-n", "root", "-O", "force-command=echo by cert"}, "by cert\n"},
		{"from here", ca, []string{"-n", "root", "-O", "source-address=192.0.2.0/24,127.0.0.0/8"}, "run\n"},
		{"from elsewhere", ca, []string{"-n", "root", "-O", "source-address=192.0.2.1"}, ""},
		{"a principal of the line", named, []string{"-n", "deploy"}, "run\n"},
		{"the user is no principal of the line", named, []string{"-n", "root"}, ""},
		{"the line's command", forced, []string{"-n", "root"}, "by line\n"},
		{"the same command", forced, []string{"-n", "root", "-O", "force-command=echo by line"}, "by line\n"},
		{"another command", forced, []string{"-n", "root", "-O", "force-command=echo by cert"}, ""},
		{"RSA CA", rsaCA, []string{"-n", "root"}, "run\n"},
		{"RSA CA with SHA-1", rsaCA, []string{"-n", "root", "-t", "ssh-rsa"}, ""},
	} {
		out, code := j.login(k, tt.ca.issue(t, k, tt.args...), "echo run")
		if out != tt.out || (code == 0) != (tt.out != "") {
			t.Errorf("%s: %q, %d; want %q", tt.name, out, code, tt.out)
		}
	}
	// A CA's own key does not log in, and neither does the certified key by itself.
	for _, plain := range []key{ca, k} {
		if c, err := j.dialAs("root", plain); err == nil {
			c.Close()
			t.Error("logged in without a certificate")
		}
	}
	if want := fmt.Sprintf(`key=%s comment="the CA" line=1 cert="the id" serial=42 ca=%s`, k.fingerprint(), ca.fingerprint()); !strings.Contains(j.log.String(), want) {
		t.Errorf("the log lacks %s", want)
	}
	for _, tt := range []struct {
		ca   key
		args []string
		code int
	}{
		{ca, []string{"-n", "root"}, 0}, {ca, []string{"-n", "root", "-O", "clear"}, 255},
		{ca, []string{"-n", "root", "-O", "no-pty"}, 255}, {named, []string{"-n", "admin"}, 255}, // no-pty in the line
	} {
		if _, code := j.login(k, tt.ca.issue(t, k, tt.args...), "-tt", "test -t 0"); code != tt.code {
			t.Errorf("terminal with %q: %d, want %d", tt.args, code, tt.code)
		}
	}
}

// TrustedUserCAKeys, AuthorizedPrincipalsFile and RevokedKeys.
func TestTrustedCA(t *testing.T) {
	k, other, ca, gone := newKey(t), newKey(t), newKey(t), newKey(t)
	dir := t.TempDir()
	cas, principals, revoked := dir+"/cas", dir+"/principals.%u", dir+"/revoked"
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(cas, "# ours\n"+ca.line("", "ca")+gone.line("", "gone"))
	write(dir+"/principals.root", "# who\nadmin\nrestrict,command=\"echo forced, really\" guest # comment\nfrom=\"192.0.2.1\" far\nno-such-option odd\n")
	write(revoked, gone.line("", "lost"))
	j := start(t, options{
		keys:   other.line("", "plain"),
		config: "TrustedUserCAKeys " + cas + "\nAuthorizedPrincipalsFile " + principals + "\nRevokedKeys " + revoked,
	})
	for _, tt := range []struct{ name, out string }{
		{"admin", "run\n"}, {"guest", "forced, really\n"}, {"far", ""}, {"odd", ""}, {"root", ""}, {"command", ""},
	} {
		if out, _ := j.login(k, ca.issue(t, k, "-n", tt.name), "echo run"); out != tt.out {
			t.Errorf("principal %s: %q, want %q", tt.name, out, tt.out)
		}
	}
	if _, code := j.login(k, gone.issue(t, k, "-n", "admin"), "true"); code == 0 {
		t.Error("the certificate of a revoked CA was accepted")
	}
	cert := ca.issue(t, k, "-n", "admin")
	text, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	write(revoked, string(text)) // a certificate in the list revokes its key
	if _, code := j.login(k, cert, "true"); code == 0 {
		t.Error("a revoked key was accepted with its certificate")
	}
	for _, list := range []string{"not a key\n", "SSHKRL\n\x00"} {
		write(revoked, list)
		if c, err := j.dialAs("root", other); err == nil {
			c.Close()
			t.Errorf("logged in with the unreadable list %q", list)
		}
	}
	write(revoked, "")
	if c, err := j.dialAs("root", other); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	err = startError(t, options{config: "RevokedKeys " + dir + "/nowhere"})
	if err == nil || !strings.Contains(err.Error(), "RevokedKeys") {
		t.Errorf("a missing list: %v", err)
	}
}

// TestRevocationList: RevokedKeys made by ssh-keygen -k, read anew at each login.
func TestRevocationList(t *testing.T) {
	k, ca := newKey(t), newKey(t)
	dir := t.TempDir()
	list, pub, spec := filepath.Join(dir, "krl"), filepath.Join(dir, "ca.pub"), filepath.Join(dir, "spec")
	revoke := func(text string) {
		t.Helper()
		for path, text := range map[string]string{pub: ca.line("", ""), spec: text} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if out, err := exec.Command("ssh-keygen", "-q", "-k", "-f", list, "-s", pub, spec).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	revoke("serial: 7\n")
	j := start(t, options{keys: ca.line("cert-authority", "the CA"), config: "RevokedKeys " + list})
	cert := ca.issue(t, k, "-n", "root") // with the serial number 42
	for _, tt := range []struct {
		spec string
		code int
	}{{"serial: 1-41\n", 0}, {"serial: 40-50\n", 255}, {"id: another\n", 0}, {"id: the id\n", 255}, {"sha256: " + ca.line("", ""), 255}} {
		revoke(tt.spec)
		if _, code := j.login(k, cert, "true"); code != tt.code {
			t.Errorf("%s: %d, want %d", tt.spec, code, tt.code)
		}
	}
}

// fidoKey is a FIDO key in software: what an authenticator would sign, with chosen flags.
type fidoKey struct {
	ssh.PublicKey
	flags byte
	sign  func(message []byte) []byte
}

func (f fidoKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	app, message := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	tail := []byte{f.flags, 0, 0, 0, 9} // and the counter
	signed := append(append(app[:], tail...), message[:]...)
	return &ssh.Signature{Format: f.Type(), Blob: f.sign(signed), Rest: tail}, nil
}

// fidoSigner makes it an ssh.Signer.
type fidoSigner struct{ fidoKey }

func (f fidoSigner) PublicKey() ssh.PublicKey { return f.fidoKey.PublicKey }

func newFIDO(t *testing.T, kind string, flags byte) fidoSigner {
	t.Helper()
	f := fidoKey{flags: flags}
	var blob []byte
	switch kind {
	case ssh.KeyAlgoSKED25519:
		pub, priv, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		blob = ssh.Marshal(struct{ Type, Key, App string }{kind, string(pub), "ssh:"})
		f.sign = func(m []byte) []byte { return ed25519.Sign(priv, m) }
	case ssh.KeyAlgoSKECDSA256:
		priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point, err := priv.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		blob = ssh.Marshal(struct{ Type, Curve, Key, App string }{kind, "nistp256", string(point), "ssh:"})
		f.sign = func(m []byte) []byte {
			sum := sha256.Sum256(m)
			r, s, err := ecdsa.Sign(rand.Reader, priv, sum[:])
			if err != nil {
				t.Error(err)
			}
			return ssh.Marshal(struct{ R, S *big.Int }{r, s})
		}
	}
	pub, err := ssh.ParsePublicKey(blob)
	if err != nil {
		t.Fatal(err)
	}
	f.PublicKey = pub
	return fidoSigner{f}
}

// Flags of an authenticator's signature (PROTOCOL.u2f).
const (
	touched  = 1
	verified = 4
)

func TestFIDOKeys(t *testing.T) {
	ca := newKey(t)
	j := start(t, options{})
	strict := start(t, options{config: "PubkeyAuthOptions touch-required"})
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		for _, tt := range []struct {
			flags         byte
			options       string
			cert          string // an extension of a certificate; empty: no certificate
			wants, strict bool
		}{
			{touched, "", "", true, true},
			{touched | verified, "", "", true, true},
			{0, "", "", false, false},
			{verified, "", "", false, false},
			{0, "no-touch-required", "", true, false},
			{touched | verified, "verify-required", "", false, false}, // not to be checked, so refused
			{touched, "cert-authority", "permit-pty", true, true},
			{0, "cert-authority", "permit-pty", false, false},
			{0, "cert-authority,no-touch-required", "permit-pty", false, false},
			{0, "cert-authority,no-touch-required", "no-touch-required", true, false},
			{0, "cert-authority", "no-touch-required", false, false},
			{touched, "cert-authority", "no-touch-required", false, false}, // the library would not look
		} {
			f := newFIDO(t, kind, tt.flags)
			var signer ssh.Signer = f
			line := key{Signer: f}.line(tt.options, "fido")
			if tt.cert != "" {
				cert := &ssh.Certificate{
					Key: f.PublicKey(), CertType: ssh.UserCert, ValidPrincipals: []string{"root"}, ValidBefore: ssh.CertTimeInfinity,
					Permissions: ssh.Permissions{Extensions: map[string]string{tt.cert: ""}},
				}
				if err := cert.SignCert(rand.Reader, ca); err != nil {
					t.Fatal(err)
				}
				var err error
				if signer, err = ssh.NewCertSigner(cert, f); err != nil {
					t.Fatal(err)
				}
				line = ca.line(tt.options, "ca")
			}
			for _, on := range []struct {
				*job
				want bool
			}{{j, tt.wants}, {strict, tt.strict}} {
				on.write(on.keys, line)
				c, err := on.dialAs("root", signer)
				if err == nil {
					c.Close()
				}
				if (err == nil) != on.want {
					t.Errorf("%s, flags %d, options %q, certificate %q: %v, want success = %v", kind, tt.flags, tt.options, tt.cert, err, on.want)
				}
			}
		}
	}
}

// Certificates only, or none of them.
func TestAcceptedAlgorithmsOfCertificates(t *testing.T) {
	k, ca := newKey(t), newKey(t)
	cert := ca.issue(t, k, "-n", "root")
	for conf, want := range map[string][2]bool{
		"ssh-ed25519-cert-v01@openssh.com": {true, false}, "ssh-ed25519": {false, true}, "-ssh-ed25519-cert*": {false, true},
	} {
		j := start(t, options{keys: ca.line("cert-authority", "") + k.line("", ""), config: "PubkeyAcceptedAlgorithms " + conf})
		if c, err := j.dialAs("root", k); (err == nil) != want[1] {
			t.Errorf("%s: the plain key: %v", conf, err)
		} else if err == nil {
			c.Close()
		}
		j.write(j.keys, ca.line("cert-authority", ""))
		if _, code := j.login(k, cert, "true"); (code == 0) != want[0] {
			t.Errorf("%s: the certificate: %d", conf, code)
		}
	}
}
