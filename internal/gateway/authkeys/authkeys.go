// SPDX-License-Identifier: Apache-2.0

// Package authkeys reads authorized_keys files with their options (sshd(8), AUTHORIZED_KEYS
// FILE FORMAT; auth-options.c of OpenSSH 9.x) and decides whether a line lets a peer in, with
// a key or with a user certificate.
//
// A line that is malformed, has an option that OpenSSH does not know, or has one that this
// server cannot enforce (verify-required, tunnel=) admits nobody: it is left out and
// reported, and the other lines count. A certificate with a critical option that is not
// enforced here admits nobody either. Refused as a whole: a RevokedKeys file that is not a
// list of public keys.
package authkeys

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// A Key is one usable line.
type Key struct {
	Public  ssh.PublicKey
	Comment string
	File    string
	Line    int

	Command         string // command=, when Forced
	Forced          bool
	Environment     []string  // environment=, NAME=value, first of each name
	From            string    // from=, a pattern list; empty: anywhere
	Expires         time.Time // expiry-time=; zero: never
	PTY             bool
	PortForwarding  bool
	AgentForwarding bool
	PermitOpen      sshdconf.Permissions // permitopen=; nil: anything
	PermitListen    sshdconf.Permissions // permitlisten=
	NoTouchRequired bool                 // of a FIDO key

	CertAuthority bool     // cert-authority: Public signs certificates and does not log in
	Principals    []string // principals=; nil: the name of the user
}

// Fingerprint is the SHA256 fingerprint as ssh-keygen -l prints it.
func (k *Key) Fingerprint() string { return ssh.FingerprintSHA256(k.Public) }

// A LineError tells why one line admits nobody.
type LineError struct {
	File string
	Line int
	Err  error
}

func (e *LineError) Error() string { return fmt.Sprintf("%s line %d: %v", e.File, e.Line, e.Err) }
func (e *LineError) Unwrap() error { return e.Err }

// Parse reads the text of one file; name is for messages. minRSA is the least size of an
// RSA key in bits (RequiredRSASize).
func Parse(name string, text []byte, minRSA int) (keys []Key, bad []*LineError) {
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		k, err := parseLine(line, minRSA)
		if err != nil {
			bad = append(bad, &LineError{name, n, err})
			continue
		}
		k.File, k.Line = name, n
		keys = append(keys, k)
	}
	return keys, bad
}

func parseLine(line []byte, minRSA int) (Key, error) {
	if bytes.IndexByte(line, 0) >= 0 {
		return Key{}, errors.New("NUL byte")
	}
	pub, comment, options, _, err := ssh.ParseAuthorizedKey(line)
	if err != nil {
		return Key{}, err
	}
	if err := usable(pub, minRSA); err != nil {
		return Key{}, err
	}
	k := Key{Public: pub, Comment: comment, PTY: true, PortForwarding: true, AgentForwarding: true}
	if err := k.options(options); err != nil {
		return Key{}, err
	}
	if k.Principals != nil && !k.CertAuthority {
		return Key{}, errors.New("principals= without cert-authority")
	}
	return k, nil
}

func (k *Key) options(list []string) error {
	for _, o := range list {
		if err := k.option(o); err != nil {
			return err
		}
	}
	return nil
}

// usable refuses the kinds of keys that cannot pass an authentication here, so that a file
// with nothing else is found out at start and not at the first login.
func usable(pub ssh.PublicKey, minRSA int) error {
	switch pub.Type() {
	case "ssh-dss": // RFC 4253; OpenSSH removed it
		return errors.New("DSA keys are not accepted; make an ed25519 key with ssh-keygen -t ed25519")
	case ssh.KeyAlgoRSA:
		if c, ok := pub.(ssh.CryptoPublicKey); ok {
			if r, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok && r.N.BitLen() < minRSA {
				return fmt.Errorf("RSA key has %d bits, the least is %d", r.N.BitLen(), minRSA)
			}
		}
	}
	if _, ok := pub.(*ssh.Certificate); ok {
		return errors.New("a certificate stands in place of a public key")
	}
	return nil
}

// option applies one option. The flags take effect in the order written: restrict,pty
// allows a terminal, pty,restrict does not.
func (k *Key) option(o string) error {
	name, raw, hasValue := strings.Cut(o, "=")
	name = strings.ToLower(name)
	if !hasValue {
		if f, on := k.flag(name); f != nil {
			*f = on
			return nil
		}
		switch name {
		case "restrict":
			k.PTY, k.PortForwarding, k.AgentForwarding = false, false, false
			return nil
		case "x11-forwarding", "no-x11-forwarding", "user-rc", "no-user-rc", "no-verify-required":
			return nil // this server has neither X11 forwarding nor ~/.ssh/rc
		case "cert-authority":
			k.CertAuthority = true
			return nil
		case "verify-required":
			return fmt.Errorf("option %q is not supported by this server", name)
		}
		return fmt.Errorf("unknown key option %q", o)
	}
	switch name {
	case "command", "environment", "from", "expiry-time", "permitopen", "permitlisten", "principals", "tunnel":
	default:
		return fmt.Errorf("unknown key option %q", name)
	}
	v, err := dequote(raw)
	if err != nil {
		return fmt.Errorf("option %s: %w", name, err)
	}
	return k.value(name, v)
}

func (k *Key) flag(name string) (*bool, bool) {
	base, negated := strings.CutPrefix(name, "no-")
	switch base {
	case "pty":
		return &k.PTY, !negated
	case "port-forwarding":
		return &k.PortForwarding, !negated
	case "agent-forwarding":
		return &k.AgentForwarding, !negated
	case "touch-required":
		return &k.NoTouchRequired, negated
	}
	return nil, false
}

func (k *Key) value(name, v string) error {
	switch name {
	case "command":
		if k.Forced {
			return errors.New("multiple command= options")
		}
		k.Command, k.Forced = v, true
	case "from":
		if k.From != "" {
			return errors.New("multiple from= options")
		}
		if v == "" {
			return errors.New("from= with an empty list")
		}
		if _, err := sshdconf.MatchAddress(netip.IPv4Unspecified(), v); err != nil {
			return fmt.Errorf("option from: %w", err)
		}
		k.From = v
	case "expiry-time":
		t, err := parseExpiry(v)
		if err != nil {
			return err
		}
		if k.Expires.IsZero() || t.Before(k.Expires) {
			k.Expires = t
		}
	case "environment":
		n, _, ok := strings.Cut(v, "=")
		if !ok || !validName(n) {
			return fmt.Errorf("invalid environment string %q: want NAME=value", v)
		}
		if !slices.ContainsFunc(k.Environment, func(e string) bool { return strings.HasPrefix(e, n+"=") }) {
			k.Environment = append(k.Environment, v)
		}
	case "permitopen":
		return permit(&k.PermitOpen, v, false)
	case "principals":
		if k.Principals != nil {
			return errors.New("multiple principals= options")
		}
		k.Principals = slices.DeleteFunc(strings.Split(v, ","), func(p string) bool { return p == "" })
	case "permitlisten":
		return permit(&k.PermitListen, v, true)
	case "tunnel": // says which device a tunnel gets, and this server makes none
		if _, err := strconv.ParseInt(v, 10, 32); err != nil && v != "any" {
			return fmt.Errorf("invalid tun device %q: want a number or any", v)
		}
	}
	return nil
}

// permit adds a permission; port 0, which means any in sshd_config, is none here
// (handle_permit in auth-options.c).
func permit(l *sshdconf.Permissions, v string, barePort bool) error {
	p, err := sshdconf.ParsePermission(v, barePort)
	if err == nil && p.Port == 0 && !strings.HasSuffix(v, "*") {
		err = fmt.Errorf("bad port number in permission %q", v)
	}
	*l = append(*l, p)
	return err
}

func validName(n string) bool {
	for i := 0; i < len(n); i++ {
		c := n[i]
		if c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	return n != ""
}

// dequote is opt_dequote of misc.c: the value stands in double quotes, \" is a quote.
func dequote(s string) (string, error) {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' || s[len(s)-2] == '\\' {
		return "", errors.New("the value must stand in double quotes")
	}
	s = s[1 : len(s)-1]
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s) && s[i+1] == '"':
			i++
		case s[i] == '"':
			return "", errors.New("unescaped double quote in the value")
		}
		b.WriteByte(s[i])
	}
	return b.String(), nil
}

// parseExpiry reads YYYYMMDD[Z] and YYYYMMDDHHMM[SS][Z]; without Z it is local time.
func parseExpiry(v string) (time.Time, error) {
	loc, digits := time.Local, v
	if d, ok := strings.CutSuffix(strings.ToUpper(v), "Z"); ok {
		loc, digits = time.UTC, d
	}
	layouts := map[int]string{8: "20060102", 12: "200601021504", 14: "20060102150405"}
	if l, ok := layouts[len(digits)]; ok {
		if t, err := time.ParseInLocation(l, digits, loc); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("invalid expiry-time %q: want YYYYMMDD or YYYYMMDDHHMM[SS]", v)
}

// Admits reports why the line does not let a peer at addr in at time now; nil lets it in.
func (k *Key) Admits(addr netip.Addr, now time.Time) error {
	if !k.Expires.IsZero() && now.After(k.Expires) {
		return fmt.Errorf("%s line %d: the key expired at %s", k.File, k.Line, k.Expires.UTC().Format(time.RFC3339))
	}
	if k.From == "" {
		return nil
	}
	if ok, err := sshdconf.MatchAddress(addr, k.From); err != nil || !ok {
		return fmt.Errorf("%s line %d: from= does not permit %s", k.File, k.Line, addr)
	}
	return nil
}

// Find returns the first line that holds pub and admits a peer at addr. When lines hold the
// key and none admits the peer, err says why; when no line holds it, both are nil.
func Find(keys []Key, pub ssh.PublicKey, addr netip.Addr, now time.Time) (*Key, error) {
	wire := pub.Marshal()
	var why error
	for i := range keys {
		if keys[i].CertAuthority || !bytes.Equal(keys[i].Public.Marshal(), wire) {
			continue
		}
		err := keys[i].Admits(addr, now)
		if err == nil {
			return &keys[i], nil
		}
		why = err
	}
	return nil, why
}
