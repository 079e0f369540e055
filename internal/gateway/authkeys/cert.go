// SPDX-License-Identifier: Apache-2.0

package authkeys

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/krl"
)

// A Certified is a user certificate (PROTOCOL.certkeys of OpenSSH) with the peer that shows it.
type Certified struct {
	*ssh.Certificate
	Addr   netip.Addr
	Now    time.Time
	MinRSA int // bits, as for Parse
}

// FindAuthority returns what the first cert-authority line that admits the certificate for
// user permits together with it: Public is the certified key. When lines hold its CA and
// none admits it, err says why; when no line holds it, both are nil.
func FindAuthority(keys []Key, c Certified, user string) (*Key, error) {
	ca := c.SignatureKey.Marshal()
	var why error
	for i := range keys {
		line := &keys[i]
		if !line.CertAuthority || !bytes.Equal(line.Public.Marshal(), ca) {
			continue
		}
		names := line.Principals
		if names == nil {
			names = []string{user}
		}
		k, err := line.certify(c, names)
		if err == nil {
			return k, nil
		}
		why = fmt.Errorf("%s line %d: %w", line.File, line.Line, err)
	}
	return nil, why
}

// CertifyAny is for a CA of TrustedUserCAKeys without AuthorizedPrincipalsFile: the
// certificate must name user, and nothing but the certificate restricts it.
func CertifyAny(c Certified, user string) (*Key, error) {
	all := Key{PTY: true, PortForwarding: true, AgentForwarding: true, NoTouchRequired: true}
	return all.certify(c, []string{user})
}

// FindPrincipal is for a CA of TrustedUserCAKeys with AuthorizedPrincipalsFile: the first of
// the file's lines that names a principal of the certificate and admits it counts.
func FindPrincipal(lines []Key, c Certified) (*Key, error) {
	why := errors.New("no principal of the certificate is in AuthorizedPrincipalsFile")
	for i := range lines {
		if !slices.Contains(c.ValidPrincipals, lines[i].Principals[0]) {
			continue
		}
		k, err := lines[i].certify(c, lines[i].Principals)
		if err == nil {
			return k, nil
		}
		why = fmt.Errorf("%s line %d: %w", lines[i].File, lines[i].Line, err)
	}
	return nil, why
}

// criticalOptions are those this server enforces. verify-required is none of them: the SSH
// library does not tell whether the authenticator verified its user.
var criticalOptions = []string{"force-command", "source-address"}

// certify checks everything about c but its CA, and merges its options with those of the
// line that names the CA. names are the principals of which it must have one.
func (k *Key) certify(c Certified, names []string) (*Key, error) {
	if c.CertType != ssh.UserCert {
		return nil, errors.New("the certificate is none for users")
	}
	if err := usable(c.Key, c.MinRSA); err != nil {
		return nil, err
	}
	if err := k.Admits(c.Addr, c.Now); err != nil {
		return nil, err
	}
	// A certificate without principals admits nobody, as in OpenSSH since 10.3.
	i := slices.IndexFunc(c.ValidPrincipals, func(p string) bool { return slices.Contains(names, p) })
	if i < 0 {
		return nil, fmt.Errorf("the certificate is for the principals %q, not for %s", c.ValidPrincipals, strings.Join(names, ", "))
	}
	check := ssh.CertChecker{SupportedCriticalOptions: criticalOptions, Clock: func() time.Time { return c.Now }}
	if err := check.CheckCert(c.ValidPrincipals[i], c.Certificate); err != nil {
		return nil, err
	}
	if list, ok := c.CriticalOptions["source-address"]; ok {
		if ok, err := matchBlocks(c.Addr, list); err != nil || !ok {
			return nil, errors.Join(fmt.Errorf("the certificate's source-address does not permit %s", c.Addr), err)
		}
	}
	return k.merge(c)
}

// merge is sshauthopt_merge of auth-options.c: what both permit, and each restriction of
// either. Extensions nobody knows are ignored, as PROTOCOL.certkeys asks.
func (k *Key) merge(c Certified) (*Key, error) {
	has := func(extension string) bool { _, ok := c.Extensions[extension]; return ok }
	m := *k
	m.Public, m.CertAuthority, m.Principals = c.Key, false, nil
	m.PTY = k.PTY && has("permit-pty")
	m.PortForwarding = k.PortForwarding && has("permit-port-forwarding")
	m.AgentForwarding = k.AgentForwarding && has("permit-agent-forwarding")
	m.NoTouchRequired = k.NoTouchRequired && has("no-touch-required")
	if command, forced := c.CriticalOptions["force-command"]; forced {
		if k.Forced && k.Command != command {
			return nil, errors.New("the forced commands of the certificate and of the line do not match")
		}
		m.Command, m.Forced = command, true
	}
	return &m, nil
}

// matchBlocks is addr_match_cidr_list of addrmatch.c: addresses and CIDR blocks.
func matchBlocks(addr netip.Addr, list string) (found bool, err error) {
	addr = addr.Unmap().WithZone("")
	for p := range strings.SplitSeq(list, ",") {
		block, err := netip.ParsePrefix(p)
		if a, aerr := netip.ParseAddr(p); aerr == nil {
			block, err = a.Unmap().Prefix(a.Unmap().BitLen())
		}
		if err != nil {
			return false, err
		}
		if block != block.Masked() {
			return false, fmt.Errorf("%s: host bits are set below the mask", p)
		}
		found = found || block.Contains(addr)
	}
	return found, nil
}

// ParsePrincipals reads an AuthorizedPrincipalsFile: on each line a principal, after options
// as in authorized_keys. The lines are Keys with one of Principals and without Public.
func ParsePrincipals(name string, text []byte) (lines []Key, bad []*LineError) {
	n := 0
	for raw := range bytes.Lines(text) {
		n++
		line, _, _ := strings.Cut(string(raw), "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		k := Key{PTY: true, PortForwarding: true, AgentForwarding: true, File: name, Line: n}
		i := strings.LastIndexAny(line, " \t")
		err := k.options(splitOptions(strings.TrimSpace(line[:i+1])))
		if err == nil && (k.CertAuthority || k.Principals != nil) {
			err = errors.New("cert-authority and principals= have no meaning here")
		}
		if err != nil {
			bad = append(bad, &LineError{name, n, err})
			continue
		}
		k.Principals = []string{line[i+1:]}
		lines = append(lines, k)
	}
	return lines, bad
}

// splitOptions cuts a list at the commas that do not stand in double quotes.
func splitOptions(s string) (options []string) {
	quoted, start := false, 0
	for i := range len(s) {
		switch {
		case s[i] == '"' && (i == 0 || s[i-1] != '\\'):
			quoted = !quoted
		case s[i] == ',' && !quoted:
			options = append(options, s[start:i])
			start = i + 1
		}
	}
	if s == "" {
		return nil
	}
	return append(options, s[start:])
}

// Revoked is a list of keys that may neither log in nor certify (RevokedKeys).
type Revoked struct {
	name string
	keys map[string]struct{}
	list *krl.List // instead of keys, unless nil
}

// ParseRevoked reads a list of ssh-keygen -k, or one of public keys, one a line, and fails for what it does not understand:
// a list that is half understood would let somebody in.
func ParseRevoked(name string, text []byte) (*Revoked, error) {
	if bytes.HasPrefix(text, []byte(krl.Magic)) {
		list, err := krl.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w; make it anew with ssh-keygen -k", name, err)
		}
		return &Revoked{name: name, list: list}, nil
	}
	keys, err := ParsePublic(name, text)
	if err != nil {
		return nil, err
	}
	r := &Revoked{name: name, keys: map[string]struct{}{}}
	for _, k := range keys {
		r.keys[string(plain(k).Marshal())] = struct{}{}
	}
	return r, nil
}

// Check fails when pub, the key in it or the CA of it is on the list.
func (r *Revoked) Check(pub ssh.PublicKey) error {
	if r.list != nil {
		if err := r.list.Check(pub); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		return nil
	}
	has := func(k ssh.PublicKey) bool { _, ok := r.keys[string(k.Marshal())]; return ok }
	if has(plain(pub)) {
		return fmt.Errorf("key %s is revoked by %s", ssh.FingerprintSHA256(plain(pub)), r.name)
	}
	if c, ok := pub.(*ssh.Certificate); ok && has(c.SignatureKey) {
		return fmt.Errorf("CA %s is revoked by %s", ssh.FingerprintSHA256(c.SignatureKey), r.name)
	}
	return nil
}

func plain(pub ssh.PublicKey) ssh.PublicKey {
	if c, ok := pub.(*ssh.Certificate); ok {
		return c.Key
	}
	return pub
}

// ParsePublic reads a file of public keys without options, one a line (TrustedUserCAKeys).
// Any other line is an error.
func ParsePublic(name string, text []byte) (keys []ssh.PublicKey, err error) {
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		k, _, options, _, err := ssh.ParseAuthorizedKey(line)
		if err == nil && len(options) > 0 {
			err = errors.New("options are not allowed here")
		}
		if err != nil {
			return nil, &LineError{name, n, err}
		}
		keys = append(keys, k)
	}
	return keys, nil
}
