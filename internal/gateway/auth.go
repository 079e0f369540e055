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

// login is a proven identity: the line of authorized_keys whose key signed.
type login struct {
	key *authkeys.Key
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
			KeyExchanges: s.algs.kex,
			Ciphers:      c.ciphers,
			MACs:         s.algs.macs,
		},
		PublicKeyAuthAlgorithms: s.algs.pubkeys,
		MaxAuthTries:            s.set.MaxAuthTries,
		NoClientAuthCallback: func(ssh.ConnMetadata) (*ssh.Permissions, error) {
			return nil, ssh.ErrNoAuth
		},
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			l, err := s.authorize(c, meta, key)
			if err != nil {
				c.log.Debug("key offered", "key", ssh.FingerprintSHA256(key), "accepted", false)
				return nil, err
			}
			perms := &ssh.Permissions{}
			if l.key.NoTouchRequired {
				perms.Extensions = map[string]string{"no-touch-required": ""}
			}
			return perms, nil
		},
		// Only here the client has shown that it holds the key, and meta.User() is the user of
		// this very attempt. The file is read again: what it says now counts.
		VerifiedPublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey, _ *ssh.Permissions, alg string) (*ssh.Permissions, error) {
			l, err := s.authorize(c, meta, key)
			if err != nil {
				return nil, err
			}
			c.loggedIn(l, string(meta.ClientVersion()))
			c.log.Info("login", "user", meta.User(), "key", l.key.Fingerprint(), "comment", l.key.Comment,
				"algorithm", alg, "line", l.key.Line, "client", short(string(meta.ClientVersion())))
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
	if s.set.Banner == "" {
		return ""
	}
	text, err := readBounded(s.set.Banner, 64<<10)
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
	if err := userAllowed(s.set, addr); err != nil {
		return nil, err
	}
	keys, bad, err := readKeys(s.set)
	if err != nil {
		c.log.Error("authorized_keys", "err", err)
	}
	for _, b := range bad {
		c.log.Debug("authorized_keys line ignored", "err", b)
	}
	k, err := authkeys.Find(keys, key, addr, time.Now())
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errDenied, err)
	case k == nil:
		return nil, fmt.Errorf("%w: key %s is not in %s", errDenied, ssh.FingerprintSHA256(key), strings.Join(s.set.AuthorizedKeysFiles, " "))
	case s.set.PermitRootLogin == sshdconf.RootForcedCommandsOnly && !k.Forced && s.set.ForceCommand == "":
		return nil, fmt.Errorf("%w: PermitRootLogin forced-commands-only, and the key has no command=", errDenied)
	}
	return &login{key: k}, nil
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
		return sshdconf.MatchList(user, name) && (!atHost || sshdconf.MatchList(addr.String(), host))
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

// readKeys reads every AuthorizedKeysFile. A missing file is not an error, as in sshd;
// err holds the others, and what could be read counts.
func readKeys(set *sshdconf.Settings) (keys []authkeys.Key, bad []*authkeys.LineError, err error) {
	for _, f := range set.AuthorizedKeysFiles {
		if strings.EqualFold(f, "none") {
			continue
		}
		f = strings.NewReplacer("%%", "%", "%h", "/root", "%u", user, "%U", "0").Replace(f)
		if !filepath.IsAbs(f) {
			f = filepath.Join("/root", f)
		}
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

// checkKeys fails when nobody could ever log in.
func checkKeys(set *sshdconf.Settings, warn func(msg string, args ...any)) (int, error) {
	if err := userAllowed(set, netip.IPv4Unspecified()); err != nil && len(set.AllowUsers) == 0 && len(set.DenyUsers) == 0 {
		return 0, fmt.Errorf("nobody could log in: %w; change sshd_config", err)
	}
	keys, bad, err := readKeys(set)
	for _, b := range bad {
		warn("authorized_keys line ignored", "err", b)
	}
	if err != nil {
		return 0, fmt.Errorf("authorized_keys: %w", err)
	}
	if len(keys) == 0 {
		return 0, fmt.Errorf("no usable key in %s (%d lines ignored): nobody could log in; put a public key there",
			strings.Join(set.AuthorizedKeysFiles, " "), len(bad))
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

// algorithms are the lists the server offers.
type algorithms struct{ kex, ciphers, macs, pubkeys []string }

// chooseAlgorithms offers what the SSH library holds secure, less HMAC-SHA1, changed by
// the lists in sshd_config.
func chooseAlgorithms(set *sshdconf.Settings) (a algorithms, err error) {
	sup := ssh.SupportedAlgorithms()
	macs := slices.DeleteFunc(slices.Clone(sup.MACs), func(m string) bool { return m == ssh.HMACSHA1 })
	for _, l := range []struct {
		name, want string
		base, all  []string
		to         *[]string
	}{
		{"KexAlgorithms", set.KexAlgorithms, sup.KeyExchanges, sup.KeyExchanges, &a.kex},
		{"Ciphers", set.Ciphers, sup.Ciphers, sup.Ciphers, &a.ciphers},
		{"MACs", set.MACs, macs, sup.MACs, &a.macs},
		{"PubkeyAcceptedAlgorithms", set.PubkeyAlgorithms, sup.PublicKeyAuths, sup.PublicKeyAuths, &a.pubkeys},
	} {
		*l.to = selectAlgorithms(l.want, l.base, l.all)
		if len(*l.to) == 0 {
			return a, fmt.Errorf("sshd_config: %s %s leaves nothing this server has; it has %s", l.name, l.want, strings.Join(l.all, ","))
		}
	}
	return a, nil
}

// selectAlgorithms reads a list as sshd_config(5) does: a plain list replaces base, +
// appends, ^ puts in front, - removes. Names this server does not have are left out.
func selectAlgorithms(want string, base, all []string) []string {
	if want == "" {
		return base
	}
	op := want[0]
	list := strings.TrimLeft(want, "+-^")
	var hit []string
	for p := range strings.SplitSeq(list, ",") {
		for _, a := range all {
			if sshdconf.MatchList(a, p) && !slices.Contains(hit, a) {
				hit = append(hit, a)
			}
		}
	}
	rest := slices.DeleteFunc(slices.Clone(base), func(a string) bool { return slices.Contains(hit, a) })
	switch op {
	case '-':
		return rest
	case '+':
		return append(rest, hit...)
	case '^':
		return append(hit, rest...)
	}
	return hit
}
