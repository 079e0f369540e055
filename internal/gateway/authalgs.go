// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// algorithms are the lists the server offers.
type algorithms struct {
	kex, ciphers, macs []string
	accepted           []string // PubkeyAcceptedAlgorithms, those of certificates among them
	pubkeys            []string // the signature algorithms of accepted
	ca                 []string // of signatures in certificates
}

// accepts reports whether key may log in with a signature of the given algorithm.
func (a *algorithms) accepts(key ssh.PublicKey, signature string) bool {
	if _, ok := key.(*ssh.Certificate); ok {
		signature = certAlgorithm(signature)
	}
	return slices.Contains(a.accepted, signature)
}

// certSuffix is what distinguishes the name of an algorithm for certificates.
const certSuffix = "-cert-v01@openssh.com"

// certAlgorithm is the name of a signature algorithm for certificates (PROTOCOL.certkeys).
func certAlgorithm(signature string) string {
	return strings.TrimSuffix(signature, "@openssh.com") + certSuffix
}

// chooseAlgorithms offers what the SSH library holds secure, less HMAC-SHA1 and key exchange
// over the NIST curves, which every client has a better one for, changed by the lists in
// sshd_config. MACs that are not encrypt-then-MAC stay for libssh2 below 1.11 (curl).
func chooseAlgorithms(set *sshdconf.Settings) (a algorithms, err error) {
	sup := ssh.SupportedAlgorithms()
	kex := slices.DeleteFunc(slices.Clone(sup.KeyExchanges), func(k string) bool { return strings.HasPrefix(k, "ecdh-sha2-nistp") })
	macs := slices.DeleteFunc(slices.Clone(sup.MACs), func(m string) bool { return m == ssh.HMACSHA1 })
	var pubkeys []string
	for _, p := range sup.PublicKeyAuths {
		pubkeys = append(pubkeys, p, certAlgorithm(p))
	}
	for _, l := range []struct {
		name, want string
		base, all  []string
		to         *[]string
	}{
		{"KexAlgorithms", set.KexAlgorithms, kex, sup.KeyExchanges, &a.kex},
		{"Ciphers", set.Ciphers, sup.Ciphers, sup.Ciphers, &a.ciphers},
		{"MACs", set.MACs, macs, sup.MACs, &a.macs},
		{"PubkeyAcceptedAlgorithms", set.PubkeyAlgorithms, pubkeys, pubkeys, &a.accepted},
		{"CASignatureAlgorithms", set.CAAlgorithms, sup.PublicKeyAuths, sup.PublicKeyAuths, &a.ca},
	} {
		*l.to = selectAlgorithms(l.want, l.base, l.all)
		if len(*l.to) == 0 {
			return a, fmt.Errorf("sshd_config: %s %s leaves nothing this server has; it has %s", l.name, l.want, strings.Join(l.all, ","))
		}
	}
	for _, p := range sup.PublicKeyAuths {
		if slices.Contains(a.accepted, p) || slices.Contains(a.accepted, certAlgorithm(p)) {
			a.pubkeys = append(a.pubkeys, p)
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
