// SPDX-License-Identifier: Apache-2.0

package krl

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// signer makes the n-th key.
func signer(t testing.TB, n byte) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(append(make([]byte, 31), n)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func certificate(t testing.TB, key, ca ssh.Signer, serial uint64, id string) *ssh.Certificate {
	t.Helper()
	c := &ssh.Certificate{Key: key.PublicKey(), Serial: serial, KeyId: id, CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity}
	if err := c.SignCert(zeros{}, ca); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestOpenSSH: ssh-keygen makes the lists, and says of each key what we say.
func TestOpenSSH(t *testing.T) {
	testkit.NeedTool(t, "ssh-keygen")
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	line := func(k ssh.PublicKey) string { return string(ssh.MarshalAuthorizedKey(k)) }
	user, other, ca, otherCA := signer(t, 1), signer(t, 2), signer(t, 3), signer(t, 4)
	keys := []ssh.PublicKey{user.PublicKey(), other.PublicKey(), ca.PublicKey()}
	for _, serial := range []uint64{0, 1, 2, 5, 7, 8, 9, 100, 101, 1000, 5000, 1 << 40, 1<<64 - 1} {
		keys = append(keys, certificate(t, user, ca, serial, "someone"))
	}
	keys = append(keys, certificate(t, other, ca, 0, "the id"), certificate(t, other, otherCA, 7, "the id"), certificate(t, other, otherCA, 7, "x"))
	var files []string
	for i, k := range keys {
		files = append(files, write(fmt.Sprintf("key%d.pub", i), line(k)))
	}
	var odd strings.Builder // what becomes a bitmap
	for n := 1; n < 300; n += 2 {
		fmt.Fprintf(&odd, "serial: %d\n", n)
	}
	caFile := write("ca.pub", line(ca.PublicKey()))
	for _, tt := range []struct {
		name, spec string
		anyCA      bool
	}{
		{"nothing", "", false},
		{"key", "key: " + line(user.PublicKey()), false},
		{"CA", "key: " + line(ca.PublicKey()), false},
		{"sha1", "sha1: " + line(other.PublicKey()), false},
		{"sha256", "sha256: " + line(user.PublicKey()), false},
		{"hash", "hash: " + ssh.FingerprintSHA256(other.PublicKey()) + "\n", false},
		{"list", "serial: 7\nserial: 5000\nserial: 1099511627776\n", false},
		{"range", "serial: 8-1000\nserial: 0xffffffffffffff00-0xffffffffffffffff\n", false},
		{"bitmap", odd.String(), false},
		{"id", "id: the id\nid: nobody\n", false},
		{"any CA", "serial: 7\nid: x\n", true},
	} {
		spec, list := write("spec", tt.spec), filepath.Join(dir, "krl")
		args := []string{"-k", "-q", "-f", list, "-s", caFile, spec}
		if tt.anyCA {
			args[5] = "none"
		}
		if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", tt.name, err, out)
		}
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		l, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		out, _ := exec.Command("ssh-keygen", append([]string{"-Q", "-f", list}, files...)...).Output() // 1 when any is revoked
		answers := strings.Split(strings.TrimSpace(string(out)), "\n")
		if len(answers) != len(keys) {
			t.Fatalf("%s: %s", tt.name, out)
		}
		for i, k := range keys {
			if err := l.Check(k); (err != nil) != strings.HasSuffix(answers[i], "REVOKED") {
				t.Errorf("%s: %v, ssh-keygen says %s", tt.name, err, answers[i])
			}
		}
		for n := range text { // no beginning of a list is one, unless it ends with a section
			if _, err := Parse(text[:n]); err == nil && n != 44 {
				t.Errorf("%s: the first %d of %d bytes are accepted", tt.name, n, len(text))
			}
		}
	}
}

func str(parts ...string) string {
	s := strings.Join(parts, "")
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s
}

func u64(n uint64) string { return string(binary.BigEndian.AppendUint64(nil, n)) }

func list(sections ...string) []byte {
	return []byte(Magic + "\x00\x00\x00\x01" + u64(1) + u64(2) + u64(0) + str() + str("comment") + strings.Join(sections, ""))
}

func certs(parts ...string) string { return "\x01" + str(str(), str(), strings.Join(parts, "")) }

var refused = map[string][]byte{
	"not a key revocation list": []byte("ssh-ed25519 AAAA"),
	"format version 2":          []byte(Magic + "\x00\x00\x00\x02"),
	"offset 66: 1 bytes left":   list("\xff" + str(str("x"), "\x00", str(), "y")),
	"unknown type 9":            list("\x09" + str()),
	"critical extension":        list("\xff" + str(str("x"), "\x01", str())),
	"after a signature":         list("\x04"+str("key")+str("sig"), "\x02"+str()),
	"bytes are missing":         list("\x02\xff\xff\xff\xff"),
	"a hash of 2 bytes":         list("\x03" + str(str("xx"))),
	"the key of a CA":           list("\x01" + str(str("no key"), str())),
	"unknown type 0x24":         list(certs("\x24" + str())),
	"from 0 to 0":               list(certs("\x20" + str(u64(0)))),
	"from 3 to 2":               list(certs("\x21" + str(u64(3), u64(2)))),
	"negative bitmap":           list(certs("\x22" + str(u64(1), str("\x80")))),
	"beyond 64 bits":            list(certs("\x22" + str(u64(1<<64-1), str("\x01\x00")))),
	"serial number 0":           list(certs("\x22" + str(u64(0), str("\x01")))),
	"more than 2048":            list(certs("\x22" + str(u64(1), str(strings.Repeat("\x01", 2049))))),
	`extension "crit"`:          list(certs("\x39" + str(str("crit"), "\x01", str()))),
}

func TestRefused(t *testing.T) {
	for want, text := range refused {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "offset ") {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := Parse(list("\xff"+str(str("x"), "\x00", str()), certs("\x39"+str(str("y"), "\x00", str())), "\x04"+str("key")+str("sig"))); err != nil {
		t.Errorf("extensions that are not critical, and a signature: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range refused {
		f.Add(text)
	}
	f.Add(list(certs("\x20"+str(u64(7)), "\x22"+str(u64(9), str("\x55")), "\x23"+str(str("id"))), "\x02"+str(str("key"))))
	cert := certificate(f, signer(f, 1), signer(f, 2), 7, "id")
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := Parse(text)
		if err != nil && !strings.HasPrefix(err.Error(), "offset ") {
			t.Errorf("an error without an offset: %v", err)
		}
		if err == nil {
			l.Check(cert)
			l.Check(cert.Key)
		}
	})
}
