// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	gssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// offerHostKeys chooses the keys of the key exchange: of each type the first, as sshd, with the algorithms that
// HostKeyAlgorithms leaves it.
func offerHostKeys(keys []ssh.Signer, want string) (offered []ssh.Signer, err error) {
	var all []string
	for _, k := range keys {
		all = append(all, hostAlgorithms(k)...)
	}
	chosen := selectAlgorithms(want, all, all)
	types := map[string]bool{}
	for _, k := range keys {
		has := hostAlgorithms(k)
		left := slices.DeleteFunc(slices.Clone(has), func(a string) bool { return !slices.Contains(chosen, a) })
		if typ := k.PublicKey().Type(); len(left) == 0 || types[typ] {
			continue
		} else {
			types[typ] = true
		}
		if len(left) < len(has) { // RSA: the others have one
			for i := range left {
				left[i] = strings.Replace(left[i], certSuffix, "", 1)
			}
			if k, err = ssh.NewSignerWithAlgorithms(k.(ssh.AlgorithmSigner), left); err != nil {
				return nil, fmt.Errorf("HostKeyAlgorithms: %w", err)
			}
		}
		offered = append(offered, k)
	}
	if len(offered) == 0 && len(keys) > 0 {
		return nil, fmt.Errorf("sshd_config: HostKeyAlgorithms %s leaves no host key; those there are have %s", want, strings.Join(all, ","))
	}
	return offered, nil
}

// hostAlgorithms are the names by which a client can ask for the key.
func hostAlgorithms(k ssh.Signer) []string {
	typ := k.PublicKey().Type()
	m, several := k.(ssh.MultiAlgorithmSigner)
	if !several {
		return []string{typ}
	}
	list := slices.Clone(m.Algorithms())
	if strings.HasSuffix(typ, certSuffix) {
		for i := range list {
			list[i] = certAlgorithm(list[i])
		}
	}
	return list
}

// plainKeys leaves out certificates, which the client gets in the key exchange or not at all.
func plainKeys(keys []ssh.Signer) []ssh.Signer {
	return slices.DeleteFunc(slices.Clone(keys), func(k ssh.Signer) bool { _, cert := k.PublicKey().(*ssh.Certificate); return cert })
}

// strings4251 encodes each of the parts as a string (RFC 4251, section 5).
func strings4251(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, ssh.Marshal(struct{ B []byte }{p})...)
	}
	return all
}

// hostKeysBug are clients that do not bear to hear of host keys (SSH_BUG_HOSTKEYS in compat.c).
const hostKeysBug = "Cisco-1.*,TeraTerm SSH*,TTSSH/1.5.*,TTSSH/2.1*,TTSSH/2.2*,TTSSH/2.3*,TTSSH/2.4*,TTSSH/2.5*,TTSSH/2.6*,TTSSH/2.70*,TTSSH/2.71*,TTSSH/2.72*"

// announceHostKeys names all host keys to the client once, so that it knows those of tomorrow today (PROTOCOL of OpenSSH,
// section 2.5). sshd does it after the login; the SSH library hands the connection out with the first thing the client asks for.
func (c *conn) announceHostKeys(sc ssh.Conn) {
	c.announced.Do(func() {
		if sshdconf.MatchList(strings.TrimPrefix(string(sc.ClientVersion()), "SSH-2.0-"), hostKeysBug) {
			return
		}
		var blobs [][]byte
		for _, k := range c.srv.hostKeys {
			blobs = append(blobs, k.PublicKey().Marshal())
		}
		sc.SendRequest("hostkeys-00@openssh.com", false, strings4251(blobs...)) // an error is the connection's end
	})
}

// proveHostKeys answers a client that wants to see that we have the keys. It asks before it asks for a command, and sshd
// answers in that order; here a short command could end, and the client with it, before its keys are signed for. So the
// ends of sessions wait for proofs that are under way.
func (s *server) proveHostKeys(ctx gssh.Context, _ *gssh.Server, req *ssh.Request) (ok bool, answer []byte) {
	c := ctx.Value(connKey{}).(*conn)
	defer c.guard("global request")
	c.proofs.Lock()
	defer c.proofs.Unlock()
	answer, err := s.hostKeyProofs(ctx.Value(gssh.ContextKeyConn).(*ssh.ServerConn), req.Payload)
	if err != nil {
		c.log.Info("host keys are not proven", "err", err)
	}
	req.Reply(err == nil, answer) // before the lock is free
	req.WantReply = false         // answered
	return
}

// awaitProofs returns when no proofs are under way.
func (c *conn) awaitProofs() {
	c.proofs.Lock()
	defer c.proofs.Unlock()
}

func (s *server) hostKeyProofs(sc *ssh.ServerConn, payload []byte) ([]byte, error) {
	var proofs [][]byte
	for rest := payload; len(rest) > 0; {
		var m struct {
			Blob []byte
			Rest []byte `ssh:"rest"`
		}
		if err := ssh.Unmarshal(rest, &m); err != nil {
			return nil, err
		}
		rest = m.Rest
		if len(proofs) == len(s.hostKeys) {
			return nil, errors.New("more keys than there are")
		}
		i := slices.IndexFunc(s.hostKeys, func(k ssh.Signer) bool { return bytes.Equal(k.PublicKey().Marshal(), m.Blob) })
		if i < 0 {
			return nil, errors.New("not a key of this server")
		}
		sig, err := signProof(sc, s.hostKeys[i], strings4251([]byte("hostkeys-prove-00@openssh.com"), sc.SessionID(), m.Blob))
		if err != nil {
			return nil, err
		}
		proofs = append(proofs, ssh.Marshal(sig))
	}
	if len(proofs) == 0 {
		return nil, errors.New("no key is named")
	}
	return strings4251(proofs...), nil
}

// signProof signs with an RSA key by the algorithm of the key exchange, if that was one of RSA: the client takes no other.
func signProof(sc *ssh.ServerConn, k ssh.Signer, data []byte) (*ssh.Signature, error) {
	rsa, ok := k.(ssh.MultiAlgorithmSigner)
	if !ok {
		return k.Sign(rand.Reader, data)
	}
	algorithm := rsa.Algorithms()[0]
	if m, ok := sc.Conn.(ssh.AlgorithmsConnMetadata); ok {
		if used := strings.Replace(m.Algorithms().HostKey, certSuffix, "", 1); slices.Contains(rsa.Algorithms(), used) {
			algorithm = used
		}
	}
	return rsa.SignWithAlgorithm(rand.Reader, data, algorithm)
}
