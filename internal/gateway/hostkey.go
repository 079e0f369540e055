// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// hostKeys returns the server's identity: the HostKey files of sshd_config when there are
// any, else a key of our own, made once and kept in dir.
func hostKeys(set *sshdconf.Settings, dir string, log *slog.Logger) ([]ssh.Signer, error) {
	keys, err := givenHostKeys(set)
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 {
		own, err := ownHostKey(dir)
		if err != nil {
			return nil, err
		}
		keys = []ssh.Signer{own}
	}
	for _, k := range keys {
		log.Info("host key", "type", k.PublicKey().Type(), "fingerprint", ssh.FingerprintSHA256(k.PublicKey()))
	}
	for _, f := range set.HostCertificates {
		c, err := certify(f, keys)
		if err != nil {
			return nil, err
		}
		log.Info("host certificate", "file", f)
		keys = append(keys, c)
	}
	return keys, nil
}

// givenHostKeys loads the HostKey files, of which each must be usable.
func givenHostKeys(set *sshdconf.Settings) ([]ssh.Signer, error) {
	var keys []ssh.Signer
	for _, f := range set.HostKeys {
		k, err := loadHostKey(f)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

func loadHostKey(path string) (ssh.Signer, error) {
	text, err := readBounded(path, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("HostKey: %w: mount the key, or leave HostKey out to have one made", err)
	}
	if st, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("HostKey: %w", err)
	} else if st.Mode().Perm()&0o077 != 0 { // as sshd does
		return nil, fmt.Errorf("HostKey %s: mode %04o lets others read it: chmod it to 0600, or mount its secret with defaultMode 0400", path, st.Mode().Perm())
	}
	raw, err := ssh.ParseRawPrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("HostKey %s: %w: give an unencrypted OpenSSH or PEM private key", path, err)
	}
	k, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		return nil, fmt.Errorf("HostKey %s: %w", path, err)
	}
	if k.PublicKey().Type() == ssh.KeyAlgoRSA {
		// Without this the library would also offer ssh-rsa, which signs with SHA-1.
		k, err = ssh.NewSignerWithAlgorithms(k.(ssh.AlgorithmSigner), []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256})
		if err != nil {
			return nil, fmt.Errorf("HostKey %s: %w", path, err)
		}
	}
	return k, nil
}

// certify reads a HostCertificate and binds it to the key it is for.
func certify(path string, keys []ssh.Signer) (ssh.Signer, error) {
	text, err := readBounded(path, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("HostCertificate: %w", err)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, fmt.Errorf("HostCertificate %s: %w", path, err)
	}
	cert, ok := pub.(*ssh.Certificate)
	if !ok || cert.CertType != ssh.HostCert {
		return nil, fmt.Errorf("HostCertificate %s: not a host certificate; make one with ssh-keygen -h -s", path)
	}
	for _, k := range keys {
		if bytes.Equal(k.PublicKey().Marshal(), cert.Key.Marshal()) {
			return ssh.NewCertSigner(cert, k)
		}
	}
	return nil, fmt.Errorf("HostCertificate %s: no HostKey has the key it certifies", path)
}

// ownHostKey loads or makes an ed25519 key in dir. It is the only one: OpenSSH knows the kind
// since 2014 and every other client of today does, ECDSA over a NIST curve is what ssh-audit
// and others advise against, and making an RSA key takes a second. Clients in FIPS mode,
// which have no ed25519, need a HostKey.
func ownHostKey(dir string) (ssh.Signer, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("host key: %w", err)
	}
	path := filepath.Join(dir, "ssh_host_ed25519_key")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		_, raw, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make host key: %w", err)
		}
		block, err := ssh.MarshalPrivateKey(raw, "ims-buildenv")
		if err != nil {
			return nil, fmt.Errorf("make host key: %w", err)
		}
		if err := renameio.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, fmt.Errorf("keep host key: %w", err)
		}
	}
	return loadHostKey(path)
}
