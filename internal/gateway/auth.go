// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/authkeys"
	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// user is the only one there is: what a job changes belongs to root.
const user = "root"

// maxKeysFile bounds an authorized_keys file.
const maxKeysFile = 4 << 20

// login is a proven identity: the key that signed, with what the line of authorized_keys and
// the certificate permit it together.
type login struct {
	key  *authkeys.Key
	cert *ssh.Certificate // nil for a plain key
}

// attrs describe the identity in the log.
func (l *login) attrs() []any {
	a := []any{"key", l.key.Fingerprint(), "comment", l.key.Comment, "line", l.key.Line}
	if l.cert != nil {
		a = append(a, "cert", short(l.cert.KeyId), "serial", l.cert.Serial, "ca", ssh.FingerprintSHA256(l.cert.SignatureKey))
	}
	return a
}

// loginKey is where Permissions.ExtraData holds the *login.
type loginKey struct{}

var errDenied = errors.New("permission denied")

// serverConfig builds the SSH configuration of one connection. NoClientAuthCallback must
// stay: gliderlabs switches NoClientAuth on when it has no handler of its own, and without
// the callback everybody would be let in.
func (s *server) serverConfig(c *conn) *ssh.ServerConfig {
	return &ssh.ServerConfig{
		Config: ssh.Config{
			KeyExchanges:   c.algs.kex,
			Ciphers:        c.ciphers,
			MACs:           c.algs.macs,
			RekeyThreshold: c.set.RekeyBytes,
		},
		PublicKeyAuthAlgorithms: c.algs.pubkeys,
		MaxAuthTries:            c.set.MaxAuthTries,
		NoClientAuthCallback: func(ssh.ConnMetadata) (*ssh.Permissions, error) {
			return nil, ssh.ErrNoAuth
		},
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			l, err := s.authorize(c, meta, key)
			if err != nil {
				c.log.Debug("key offered", "key", ssh.FingerprintSHA256(key), "accepted", false)
				return nil, err
			}
			c.offered.Store(true)
			perms := &ssh.Permissions{}
			if l.key.NoTouchRequired && !c.set.TouchRequired {
				perms.Extensions = map[string]string{"no-touch-required": ""}
			}
			return perms, nil
		},
		// Only here the client has shown that it holds the key, and meta.User() is the user of
		// this very attempt. The file is read again: what it says now counts.
		VerifiedPublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey, _ *ssh.Permissions, alg string) (*ssh.Permissions, error) {
			l, err := s.authorize(c, meta, key)
			if err == nil && !c.algs.accepts(key, alg) {
				err = fmt.Errorf("%w: %s is not in PubkeyAcceptedAlgorithms", errDenied, alg)
			}
			if err != nil {
				return nil, err
			}
			c.loggedIn(l, string(meta.ClientVersion()))
			c.log.Info("login", append([]any{"user", meta.User(), "algorithm", alg, "client", short(string(meta.ClientVersion()))}, l.attrs()...)...)
			return &ssh.Permissions{ExtraData: map[any]any{loginKey{}: l}}, nil
		},
		AuthLogCallback: func(meta ssh.ConnMetadata, method string, err error) {
			if err != nil && !errors.Is(err, ssh.ErrNoAuth) {
				s.seen.authFailures.Inc()
				c.log.Info("login refused", "user", short(meta.User()), "method", short(method), "err", err)
			}
		},
		BannerCallback: func(ssh.ConnMetadata) string {
			if why := s.closing(); why != "" {
				return why + "\r\n"
			}
			return s.banner(c)
		},
	}
}

// banner is the text of the Banner file.
func (s *server) banner(c *conn) string {
	if c.set.Banner == "" {
		return ""
	}
	text, err := readBounded(c.set.Banner, 64<<10)
	if err != nil {
		c.log.Warn("banner", "err", err)
	}
	return string(text)
}

// authorize decides whether key may log in as the user of this attempt.
func (s *server) authorize(c *conn, meta ssh.ConnMetadata, key ssh.PublicKey) (*login, error) {
	if why := s.closing(); why != "" {
		return nil, fmt.Errorf("%w: %s", errDenied, why)
	}
	if meta.User() != user {
		return nil, fmt.Errorf("%w: the only user is %s", errDenied, user)
	}
	addr := peerAddr(meta.RemoteAddr())
	if err := userAllowed(c.set, addr); err != nil {
		return nil, err
	}
	if err := checkRevoked(c.set, key); err != nil {
		return nil, fmt.Errorf("%w: %w", errDenied, err)
	}
	keys, bad, err := readKeys(c.set)
	if err != nil {
		c.log.Error("authorized_keys", "err", err)
	}
	for _, b := range bad {
		c.log.Debug("authorized_keys line ignored", "err", b)
	}
	var k *authkeys.Key
	who := key
	cert, certified := key.(*ssh.Certificate)
	if certified {
		who = cert.SignatureKey
		k, err = authorizeCert(c.set, c.algs.ca, keys, authkeys.Certified{Certificate: cert, Addr: addr, Now: time.Now(), MinRSA: c.set.RequiredRSASize})
	} else {
		k, err = authkeys.Find(keys, key, addr, time.Now())
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errDenied, err)
	case k == nil:
		return nil, fmt.Errorf("%w: key %s is not in %s", errDenied, ssh.FingerprintSHA256(who), strings.Join(c.set.AuthorizedKeysFiles, " "))
	case c.set.PermitRootLogin == sshdconf.RootForcedCommandsOnly && !k.Forced && c.set.ForceCommand == "":
		return nil, fmt.Errorf("%w: PermitRootLogin forced-commands-only, and the key has no command=", errDenied)
	}
	return &login{k, cert}, nil
}

// userAllowed applies PermitRootLogin, PubkeyAuthentication and the Allow and Deny lists,
// in the order of allowed_user in auth.c.
func userAllowed(set *sshdconf.Settings, addr netip.Addr) error {
	if set.PermitRootLogin == sshdconf.RootNo {
		return fmt.Errorf("%w: PermitRootLogin no", errDenied)
	}
	if !set.PubkeyAuth {
		return fmt.Errorf("%w: PubkeyAuthentication no", errDenied)
	}
	matchUser := func(pat string) bool {
		name, host, atHost := strings.Cut(pat, "@")
		if !sshdconf.MatchList(user, name) {
			return false
		}
		ok, err := sshdconf.MatchAddress(addr, host) // the error was told when the file was read
		return !atHost || err == nil && ok
	}
	matchGroup := func(pat string) bool { return sshdconf.MatchList("root", pat) }
	switch {
	case slices.ContainsFunc(set.DenyUsers, matchUser):
		return fmt.Errorf("%w: DenyUsers", errDenied)
	case len(set.AllowUsers) > 0 && !slices.ContainsFunc(set.AllowUsers, matchUser):
		return fmt.Errorf("%w: not in AllowUsers", errDenied)
	case slices.ContainsFunc(set.DenyGroups, matchGroup):
		return fmt.Errorf("%w: DenyGroups", errDenied)
	case len(set.AllowGroups) > 0 && !slices.ContainsFunc(set.AllowGroups, matchGroup):
		return fmt.Errorf("%w: not in AllowGroups", errDenied)
	}
	return nil
}

// checkPeers refuses addresses in the lists of users that would match nobody.
func checkPeers(set *sshdconf.Settings) error {
	for _, l := range []struct {
		keyword  string
		patterns []string
	}{{"AllowUsers", set.AllowUsers}, {"DenyUsers", set.DenyUsers}} {
		for _, p := range l.patterns {
			if _, host, atHost := strings.Cut(p, "@"); atHost {
				if host == "" {
					return fmt.Errorf("sshd_config: %s %s: no address after @", l.keyword, p)
				}
				if _, err := sshdconf.MatchAddress(netip.IPv4Unspecified(), host); err != nil {
					return fmt.Errorf("sshd_config: %s %s: %w", l.keyword, p, err)
				}
			}
		}
	}
	return nil
}

// readKeys reads every AuthorizedKeysFile. A missing file is not an error, as in sshd;
// err holds the others, and what could be read counts.
func readKeys(set *sshdconf.Settings) (keys []authkeys.Key, bad []*authkeys.LineError, err error) {
	for _, f := range set.AuthorizedKeysFiles {
		if strings.EqualFold(f, "none") {
			continue
		}
		f = expand(f)
		text, rerr := readBounded(f, maxKeysFile)
		if rerr != nil {
			if !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
			continue
		}
		k, b := authkeys.Parse(f, text, set.RequiredRSASize)
		keys, bad = append(keys, k...), append(bad, b...)
	}
	return keys, bad, err
}

// expand replaces the tokens in the name of a user's file, which is relative to root's home.
func expand(f string) string {
	f = strings.NewReplacer("%%", "%", "%h", "/root", "%u", user, "%U", "0").Replace(f)
	if !filepath.IsAbs(f) {
		f = filepath.Join("/root", f)
	}
	return f
}

// errNobody says why nobody could log in.
var errNobody = errors.New("nobody could log in")

// checkKeys fails when nobody could ever log in, from anywhere. It returns the number of keys.
func checkKeys(set *sshdconf.Settings, warn func(msg string, args ...any)) (int, error) {
	best, why := -1, error(nil)
	told := map[string]bool{}
	once := func(bad *authkeys.LineError) {
		if !told[bad.Error()] {
			told[bad.Error()] = true
			warn("authorized_keys line ignored", "err", bad)
		}
	}
	for _, v := range set.Variants() {
		n, err := checkVariant(v, once)
		switch {
		case err == nil:
			best = max(best, n)
		case !errors.Is(err, errNobody):
			return 0, err
		case why == nil:
			why = err
		}
	}
	if best < 0 {
		return 0, why
	}
	return best, nil
}

// checkVariant is checkKeys for some peers.
func checkVariant(set *sshdconf.Settings, ignored func(*authkeys.LineError)) (int, error) {
	if err := userAllowed(set, netip.IPv4Unspecified()); err != nil && len(set.AllowUsers) == 0 && len(set.DenyUsers) == 0 {
		return 0, fmt.Errorf("%w: %w; change sshd_config", errNobody, err)
	}
	keys, bad, err := readKeys(set)
	for _, b := range bad {
		ignored(b)
	}
	if err != nil {
		return 0, fmt.Errorf("authorized_keys: %w", err)
	}
	if err := checkCertFiles(set); err != nil {
		return 0, err
	}
	if len(keys) == 0 && set.TrustedUserCAKeys == "" {
		return 0, fmt.Errorf("no usable key in %s (%d lines ignored): %w; put a public key there",
			strings.Join(set.AuthorizedKeysFiles, " "), len(bad), errNobody)
	}
	return len(keys), nil
}

// readBounded reads a regular file; O_NONBLOCK keeps a FIFO in its place from hanging us.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return text, nil
}

func peerAddr(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// peerOf is a connection as Match blocks see it.
func peerOf(nc net.Conn) sshdconf.Peer {
	p := sshdconf.Peer{Addr: peerAddr(nc.RemoteAddr()), Local: peerAddr(nc.LocalAddr())}
	if t, ok := nc.LocalAddr().(*net.TCPAddr); ok {
		p.LocalPort = t.Port
	}
	return p
}
