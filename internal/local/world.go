// SPDX-License-Identifier: Apache-2.0

package local

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// loadOnce reads v from a file only root may read, or has it made and writes
// the file.
func loadOnce(path string, v any, build func() error) error {
	b, err := os.ReadFile(path)
	if err == nil {
		if err := json.Unmarshal(b, v); err != nil {
			return fmt.Errorf("read %s: %w; remove it to have it made anew", path, err)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := build(); err != nil {
		return err
	}
	if b, err = json.MarshalIndent(v, "", "  "); err != nil {
		return err
	}
	return renameio.WriteFile(path, append(b, '\n'), 0o600)
}

// secrets are what an installation has in its config maps and secrets, made
// once per data directory.
type secrets struct {
	ClientID     string `json:"client_id"`
	ClientSecret string `json:"client_secret"`
	CA           string `json:"ca"`         // PEM; nothing here is signed with it
	RemoteKey    string `json:"remote_key"` // PEM, for remote builds, which there are none of
}

func loadSecrets(data string) (secrets, error) {
	var s secrets
	err := loadOnce(filepath.Join(data, "cluster-secrets"), &s, func() (err error) {
		s.ClientID, s.ClientSecret = "admin-client", rand.Text()
		s.CA, s.RemoteKey, err = newCA(time.Now())
		return err
	})
	return s, err
}

// newCA makes the certificate that jobs copy into images, and a private key of
// the kind remote builds use. The key of the certificate is thrown away.
func newCA(now time.Time) (cert, key string, err error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "imslocal"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return "", "", err
	}
	remote, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	remoteDER, err := x509.MarshalECPrivateKey(remote)
	if err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: remoteDER})), nil
}
