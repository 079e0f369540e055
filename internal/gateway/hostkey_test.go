// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// Several host keys from files, and a certificate that the client trusts by its CA alone.
func TestHostKeyFiles(t *testing.T) {
	testkit.NeedTool(t, "ssh-keygen")
	dir, ca := t.TempDir(), newKey(t)
	config := ""
	for _, kind := range []string{"rsa", "ecdsa", "ed25519"} {
		f := filepath.Join(dir, kind)
		if out, err := exec.Command("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", f).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
		if out, err := exec.Command("ssh-keygen", "-q", "-s", ca.path, "-h", "-I", "job", "-n", "the-job", f+".pub").CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
		config += "HostKey " + f + "\nHostCertificate " + f + "-cert.pub\n"
	}
	j := start(t, options{config: config})
	known := filepath.Join(dir, "known_hosts")
	login := func(name, algorithm string) int {
		t.Helper()
		_, port, _ := net.SplitHostPort(j.addr)
		cmd := exec.Command("ssh", "-F", "none", "-p", port, "-i", j.key.path, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
			"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile="+known, "-o", "GlobalKnownHostsFile=none",
			"-o", "HostKeyAlias="+name, "-o", "HostKeyAlgorithms="+algorithm, host, "true")
		_, _, code := run(t, cmd)
		return code
	}
	for _, kind := range []string{"rsa", "ecdsa", "ed25519"} {
		pub, err := os.ReadFile(filepath.Join(dir, kind+".pub"))
		if err != nil {
			t.Fatal(err)
		}
		algorithm, _, _ := strings.Cut(string(pub), " ")
		if kind == "rsa" {
			algorithm = "rsa-sha2-512"
		}
		j.write(known, "the-job "+string(pub))
		if code := login("the-job", algorithm); code != 0 {
			t.Errorf("%s: %d", algorithm, code)
		}
		j.write(known, "@cert-authority the-job "+ca.line("", ""))
		if code := login("the-job", certAlgorithm(algorithm)); code != 0 {
			t.Errorf("%s: %d", certAlgorithm(algorithm), code)
		}
	}
	j.write(known, "@cert-authority * "+ca.line("", ""))
	if code := login("another", "ssh-ed25519-cert-v01@openssh.com"); code == 0 {
		t.Error("the certificate was accepted under a name that it does not have")
	}
}

// What ssh-audit finds fault with, and why it stays.
var auditWarnings = map[string]string{
	"mlkem768x25519-sha256":        "ssh-audit 2.5 does not know it: newer than itself",
	"kex-strict-s-v00@openssh.com": "the same; it is the remedy for the Terrapin attack",
	"hmac-sha2-256":                "libssh2 before 1.11 has neither encrypt-then-MAC nor AES-GCM",
	"hmac-sha2-512":                "the same",
}

func TestAudit(t *testing.T) {
	testkit.NeedTool(t, "ssh-audit")
	j := start(t, options{})
	_, port, _ := net.SplitHostPort(j.addr)
	out, err := exec.Command("ssh-audit", "-n", "-l", "warn", "-p", port, "127.0.0.1").CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	finding := regexp.MustCompile(`(?:^\(\w+\) (\S+) .*-- |^ +` + "`" + `- )\[(fail|warn)\] (.*)`)
	algorithm, seen := "", 0
	for line := range strings.Lines(string(out)) {
		m := finding.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if m[1] != "" {
			algorithm = m[1]
		}
		if seen++; m[2] == "fail" || auditWarnings[algorithm] == "" {
			t.Errorf("%s: %s: %s", algorithm, m[2], m[3])
		}
	}
	if seen < len(auditWarnings) {
		t.Errorf("%d findings, want at least the %d known ones: is this the output of an audit?\n%s", seen, len(auditWarnings), out)
	}
}
