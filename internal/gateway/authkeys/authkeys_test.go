// SPDX-License-Identifier: Apache-2.0

package authkeys

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// public is a new key of the given kind as it stands in authorized_keys, without comment.
func public(t testing.TB, kind string) string {
	t.Helper()
	var raw any
	switch kind {
	case "ed25519":
		pub, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		raw = pub
	case "ecdsa":
		k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		raw = &k.PublicKey
	case "rsa":
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		raw = &k.PublicKey
	}
	k, err := ssh.NewPublicKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

// A FIDO key from OpenSSH's regression tests' format: type, point and application.
func fido(t testing.TB) string {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	blob := ssh.Marshal(struct {
		Type, Key, App string
	}{ssh.KeyAlgoSKED25519, string(pub), "ssh:"})
	k, err := ssh.ParsePublicKey(blob)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

func TestSeveralLines(t *testing.T) {
	a, b, c, d := public(t, "ed25519"), public(t, "ecdsa"), public(t, "rsa"), fido(t)
	text := strings.Join([]string{
		"# comment", "", a + " user@host with blanks", "rubbish", b, "no-such-option " + a, "\t" + c + "\r", "ssh-ed25519 AAAA", d + " fido",
	}, "\n")
	keys, bad := Parse("ak", []byte(text), 1024)
	var got []string
	for _, k := range keys {
		got = append(got, k.Comment)
	}
	if len(keys) != 4 || keys[0].Comment != "user@host with blanks" || keys[0].Line != 3 || keys[2].Line != 7 {
		t.Errorf("keys: %q, lines %v", got, keys)
	}
	var lines []int
	for _, e := range bad {
		lines = append(lines, e.Line)
	}
	if !reflect.DeepEqual(lines, []int{4, 6, 8}) {
		t.Errorf("bad lines %v: %v", lines, bad)
	}
	if !strings.Contains(bad[1].Error(), `unknown key option "no-such-option"`) {
		t.Errorf("got %v", bad[1])
	}
}

func TestOptions(t *testing.T) {
	pub := public(t, "ed25519")
	line := func(opts string) (Key, error) {
		keys, bad := Parse("ak", []byte(opts+" "+pub), 1024)
		if len(bad) > 0 {
			return Key{}, bad[0]
		}
		return keys[0], nil
	}
	for _, tt := range []struct {
		opts string
		ok   func(Key) bool
	}{
		{"restrict", func(k Key) bool { return !k.PTY && !k.PortForwarding && !k.AgentForwarding }},
		{"restrict,pty", func(k Key) bool { return k.PTY && !k.PortForwarding }},
		{"pty,restrict", func(k Key) bool { return !k.PTY }},
		{"no-pty", func(k Key) bool { return !k.PTY && k.PortForwarding }},
		{"No-PTY,no-port-forwarding,no-X11-forwarding,no-user-rc,no-agent-forwarding", func(k Key) bool { return !k.PTY && !k.PortForwarding && !k.AgentForwarding }},
		{`command="echo \"a b\", c"`, func(k Key) bool { return k.Forced && k.Command == `echo "a b", c` }},
		{`command=""`, func(k Key) bool { return k.Forced && k.Command == "" }},
		{`environment="A=1",environment="B=x y",environment="A=2"`, func(k Key) bool { return reflect.DeepEqual(k.Environment, []string{"A=1", "B=x y"}) }},
		{`from="10.0.0.0/8,!10.1.0.0/16"`, func(k Key) bool { return k.From != "" }},
		{`expiry-time="20300101Z"`, func(k Key) bool { return k.Expires.Equal(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)) }},
		{`expiry-time="203001011530",expiry-time="20290101Z"`, func(k Key) bool { return k.Expires.Year() == 2029 }},
		{`permitopen="h:1",permitopen="h:2",permitlisten="8080"`, func(k Key) bool { return len(k.PermitOpen) == 2 && len(k.PermitListen) == 1 }},
		{`cert-authority,principals="x,y"`, func(k Key) bool { return k.CertAuthority && reflect.DeepEqual(k.Principals, []string{"x", "y"}) }},
		{`cert-authority,principals=""`, func(k Key) bool { return k.Principals != nil && len(k.Principals) == 0 }},
		{`tunnel="0",no-pty`, func(k Key) bool { return !k.PTY }},
		{"no-touch-required", func(k Key) bool { return k.NoTouchRequired }},
	} {
		k, err := line(tt.opts)
		if err != nil || !tt.ok(k) {
			t.Errorf("%s: %+v, %v", tt.opts, k, err)
		}
	}
	for _, opts := range []string{
		"no-pty,frobnicate", `command="a",command="b"`, `command=a`, `command="a`, `from="10.0.0.1/8"`, `from=""`, `from="a",from="b"`,
		`environment="A"`, `environment="A B=1"`, `expiry-time="tomorrow"`, `expiry-time="20301301"`, `principals="x"`, `cert-authority,principals="x",principals="y"`,
		"verify-required", `tunnel="tun0"`, `permitopen="h"`, `permitopen="none"`, `permitopen="h:0"`, `permitlisten="x"`, `pty="yes"`, "command",
	} {
		if k, err := line(opts); err == nil {
			t.Errorf("%s was accepted: %+v", opts, k)
		}
	}
}

func TestSmallRSA(t *testing.T) {
	line := public(t, "rsa")
	if keys, _ := Parse("ak", []byte(line), 2048); len(keys) != 1 {
		t.Error("2048 bits were refused with a limit of 2048")
	}
	if keys, bad := Parse("ak", []byte(line), 2049); len(keys) != 0 || len(bad) != 1 {
		t.Error("2048 bits were accepted with a limit of 2049")
	}
}

func TestFind(t *testing.T) {
	a, b := public(t, "ed25519"), public(t, "ed25519")
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	keys, bad := Parse("ak", []byte(strings.Join([]string{
		`expiry-time="20250101Z" ` + a + " old",
		`from="192.0.2.*,2001:db8::/32" ` + a + " lan",
		`from="!203.0.113.7,203.0.113.0/24",command="x" ` + a + " outside",
	}, "\n")), 1024)
	if len(bad) > 0 {
		t.Fatal(bad)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey([]byte(a))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ addr, want string }{
		{"192.0.2.9", "lan"}, {"::ffff:192.0.2.9", "lan"}, {"2001:db8::1", "lan"}, {"203.0.113.8", "outside"},
	} {
		k, err := Find(keys, pub, netip.MustParseAddr(tt.addr), now)
		if err != nil || k == nil || k.Comment != tt.want {
			t.Errorf("%s: %+v, %v", tt.addr, k, err)
		}
	}
	for _, addr := range []string{"203.0.113.7", "198.51.100.1", "::1"} {
		if k, err := Find(keys, pub, netip.MustParseAddr(addr), now); k != nil || err == nil {
			t.Errorf("%s was admitted by %+v", addr, k)
		}
	}
	if k, err := Find(keys, pub, netip.Addr{}, now); k != nil || err == nil {
		t.Errorf("no address was admitted by %+v", k)
	}
	other, _, _, _, err := ssh.ParseAuthorizedKey([]byte(b))
	if err != nil {
		t.Fatal(err)
	}
	if k, err := Find(keys, other, netip.MustParseAddr("192.0.2.9"), now); k != nil || err != nil {
		t.Errorf("an unknown key: %+v, %v", k, err)
	}
}

func TestPrincipals(t *testing.T) {
	lines, bad := ParsePrincipals("p", []byte("# who\n\n admin \ncommand=\"a, \\\"b\\\"\",no-pty\tguest # x\nnonsense x\ncert-authority y\n"))
	if len(lines) != 2 || lines[0].Principals[0] != "admin" || !lines[0].PTY || lines[0].Line != 3 {
		t.Errorf("%+v", lines)
	}
	if k := lines[1]; k.Principals[0] != "guest" || k.Command != `a, "b"` || k.PTY {
		t.Errorf("%+v", k)
	}
	if len(bad) != 2 || bad[0].Line != 5 || bad[1].Line != 6 {
		t.Errorf("%v", bad)
	}
}

func TestMatchBlocks(t *testing.T) {
	for _, tt := range []struct {
		list      string
		found, ok bool
	}{
		{"192.0.2.0/24", true, true}, {"10.0.0.0/8,192.0.2.7", true, true}, {"192.0.2.8", false, true}, {"::ffff:192.0.2.7", true, true},
		{"2001:db8::/32", false, true}, {"", false, false}, {"192.0.2.7,x", true, false}, {"192.0.2.7/24", false, false}, {"!192.0.2.7", false, false},
	} {
		found, err := matchBlocks(netip.MustParseAddr("::ffff:192.0.2.7"), tt.list)
		if (err == nil) != tt.ok || err == nil && found != tt.found {
			t.Errorf("%q: %v, %v", tt.list, found, err)
		}
	}
}

// FuzzCertify merges any certificate's options with any line's: nothing is permitted that either does not permit.
func FuzzCertify(f *testing.F) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINCeZDQLaBMW8N886VRM7iZtzSAxrzbELJgtGZfvdWsS lab"
	f.Add("cert-authority,command=\"a\" "+key, "root", "source-address", "192.0.2.0/24", "permit-pty")
	f.Add("cert-authority,restrict,principals=\"x,root\" "+key, "x", "force-command", "b", "permit-port-forwarding")
	f.Fuzz(func(t *testing.T, line, principal, critical, value, extension string) {
		keys, _ := Parse("ak", []byte(line), 1024)
		for _, k := range keys {
			c := Certified{Addr: netip.MustParseAddr("192.0.2.1"), Now: time.Unix(1e9, 0), Certificate: &ssh.Certificate{
				Key: k.Public, SignatureKey: k.Public, Signature: &ssh.Signature{Format: ssh.KeyAlgoED25519}, CertType: ssh.UserCert, ValidPrincipals: []string{principal}, ValidBefore: ssh.CertTimeInfinity,
				Permissions: ssh.Permissions{CriticalOptions: map[string]string{critical: value}, Extensions: map[string]string{extension: ""}},
			}}
			m, err := k.certify(c, []string{"root"})
			if err == nil {
				t.Fatalf("admitted without a signature: %+v", m)
			}
			if m, err = k.merge(c); err != nil {
				continue
			}
			if m.PTY && (!k.PTY || extension != "permit-pty") || m.PortForwarding && (!k.PortForwarding || extension != "permit-port-forwarding") ||
				k.Forced && (!m.Forced || m.Command != k.Command) || critical == "force-command" && (!m.Forced || m.Command != value) {
				t.Errorf("%+v became %+v", k, m)
			}
			matchBlocks(c.Addr, value)
		}
	})
}

func FuzzParse(f *testing.F) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINCeZDQLaBMW8N886VRM7iZtzSAxrzbELJgtGZfvdWsS lab"
	f.Add([]byte(key))
	f.Add([]byte(`command="a \"b\"",from="10.0.0.0/8,!x*",environment="A=1",restrict,pty,expiry-time="20300101" ` + key))
	f.Add([]byte("cert-authority,principals=\"x\" " + key + "\r\n#\n\n\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if lines, bad := ParsePrincipals("p", text); len(lines)+len(bad) > strings.Count(string(text), "\n")+1 {
			t.Fatalf("%d principals and %d errors", len(lines), len(bad))
		}
		keys, bad := Parse("ak", text, 1024)
		if n := strings.Count(string(text), "\n") + 1; len(keys)+len(bad) > n {
			t.Fatalf("%d keys and %d errors from %d lines", len(keys), len(bad), n)
		}
		for _, k := range keys {
			k.Admits(netip.MustParseAddr("192.0.2.1"), time.Unix(1e9, 0))
			if _, ok := k.Public.(*ssh.Certificate); ok {
				t.Fatal("a certificate passed")
			}
		}
	})
}
