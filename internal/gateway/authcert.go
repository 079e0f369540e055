// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/authkeys"
	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// authorizeCert finds the CA of a user certificate: first among TrustedUserCAKeys, then in
// the cert-authority lines of authorized_keys (user_key_allowed of auth2-pubkey.c). The key
// it returns has the options of both; it is nil, without error, when nobody knows the CA.
func authorizeCert(set *sshdconf.Settings, algs []string, keys []authkeys.Key, c authkeys.Certified) (*authkeys.Key, error) {
	if !slices.Contains(algs, c.Signature.Format) {
		return nil, fmt.Errorf("the CA's signature algorithm %s is not in CASignatureAlgorithms", c.Signature.Format)
	}
	k, err := trustedCert(set, c)
	if k == nil {
		var lineErr error
		k, lineErr = authkeys.FindAuthority(keys, c, user)
		err = errors.Join(err, lineErr)
	}
	if k == nil {
		return nil, err
	}
	// The SSH library waives the touch for every certificate that says so, whatever we say.
	if _, waived := c.Extensions["no-touch-required"]; waived && strings.HasPrefix(c.Key.Type(), "sk-") && (set.TouchRequired || !k.NoTouchRequired) {
		return nil, errors.New("the certificate's no-touch-required is not permitted: give the CA's line that option, or leave it out of the certificate")
	}
	return k, nil
}

// trustedCert is user_cert_trusted_ca of auth2-pubkey.c.
func trustedCert(set *sshdconf.Settings, c authkeys.Certified) (*authkeys.Key, error) {
	cas, err := readCAs(set)
	ca := c.SignatureKey.Marshal()
	if err != nil || !slices.ContainsFunc(cas, func(k ssh.PublicKey) bool { return bytes.Equal(k.Marshal(), ca) }) {
		return nil, err
	}
	if set.PrincipalsFile == "" {
		return authkeys.CertifyAny(c, user)
	}
	file := expand(set.PrincipalsFile)
	text, err := readBounded(file, maxKeysFile)
	if err != nil {
		return nil, fmt.Errorf("AuthorizedPrincipalsFile: %w", err)
	}
	lines, bad := authkeys.ParsePrincipals(file, text)
	k, err := authkeys.FindPrincipal(lines, c)
	if k == nil {
		for _, b := range bad {
			err = errors.Join(err, b)
		}
	}
	return k, err
}

// readCAs reads TrustedUserCAKeys anew, as each login does.
func readCAs(set *sshdconf.Settings) ([]ssh.PublicKey, error) {
	if set.TrustedUserCAKeys == "" {
		return nil, nil
	}
	text, err := readBounded(set.TrustedUserCAKeys, maxKeysFile)
	if err != nil {
		return nil, fmt.Errorf("TrustedUserCAKeys: %w", err)
	}
	cas, err := authkeys.ParsePublic(set.TrustedUserCAKeys, text)
	if err != nil {
		return nil, fmt.Errorf("TrustedUserCAKeys: %w", err)
	}
	return cas, nil
}

// readRevoked reads RevokedKeys; nil without one.
func readRevoked(set *sshdconf.Settings) (*authkeys.Revoked, error) {
	if set.RevokedKeys == "" {
		return nil, nil
	}
	text, err := readBounded(set.RevokedKeys, maxKeysFile)
	if err != nil {
		return nil, fmt.Errorf("RevokedKeys: %w", err)
	}
	r, err := authkeys.ParseRevoked(set.RevokedKeys, text)
	if err != nil {
		return nil, fmt.Errorf("RevokedKeys: %w", err)
	}
	return r, nil
}

// checkRevoked fails for a revoked key, and for every key when the list cannot be read, as
// in sshd.
func checkRevoked(set *sshdconf.Settings, key ssh.PublicKey) error {
	r, err := readRevoked(set)
	if r == nil {
		return err
	}
	return r.Check(key)
}

// checkCertFiles finds at start what every login would fail with.
func checkCertFiles(set *sshdconf.Settings) error {
	_, err := readRevoked(set)
	cas, caErr := readCAs(set)
	if caErr == nil && len(cas) == 0 && set.TrustedUserCAKeys != "" {
		caErr = fmt.Errorf("TrustedUserCAKeys: no key in %s", set.TrustedUserCAKeys)
	}
	return errors.Join(err, caErr)
}
