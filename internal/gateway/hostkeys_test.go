// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// hostKeyFiles makes host keys of the kinds and returns their lines of sshd_config and public halves.
func hostKeyFiles(t *testing.T, dir string, kinds ...string) (config string, public []string) {
	t.Helper()
	testkit.NeedTool(t, "ssh-keygen")
	for i, kind := range kinds {
		f := filepath.Join(dir, kind+strings.Repeat("+", i))
		if out, err := exec.Command("ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", f).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
		pub, err := os.ReadFile(f + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		config += "HostKey " + f + "\n"
		public = append(public, strings.TrimSpace(string(pub)))
	}
	return config, public
}

// hostKeyClient is ssh with nothing but the known hosts in a file.
func (j *job) hostKeyClient(known string, options ...string) *exec.Cmd {
	_, port, _ := net.SplitHostPort(j.addr)
	args := []string{"-F", "none", "-p", port, "-i", j.key.path}
	for _, o := range append(options, "IdentitiesOnly=yes", "IdentityAgent=none", "BatchMode=yes", "StrictHostKeyChecking=yes",
		"UserKnownHostsFile="+known, "GlobalKnownHostsFile=none") {
		args = append(args, "-o", o)
	}
	return exec.Command("ssh", append(args, host, "true")...)
}

// OpenSSH's client, which knows one of our keys, learns the others and forgets one that we do not have any more, whatever
// the key exchange's own key. Of two keys of one type the first is used, so that the second can be its successor.
func TestHostKeyUpdate(t *testing.T) {
	dir := t.TempDir()
	config, public := hostKeyFiles(t, dir, "ed25519", "rsa", "ecdsa", "ed25519")
	_, retired := hostKeyFiles(t, t.TempDir(), "ecdsa")
	j := start(t, options{config: config})
	_, port, _ := net.SplitHostPort(j.addr)
	at := "[" + host[strings.Index(host, "@")+1:] + "]:" + port + " "
	for algorithm, first := range map[string]int{"ssh-ed25519": 0, "rsa-sha2-256": 1, "rsa-sha2-512": 1, "ecdsa-sha2-nistp256": 2} {
		t.Run(algorithm, func(t *testing.T) {
			known := filepath.Join(t.TempDir(), "known_hosts")
			j.write(known, at+public[first]+"\n"+at+retired[0]+"\n")
			cmd := j.hostKeyClient(known, "UpdateHostKeys=yes", "LogLevel=DEBUG1", "HostKeyAlgorithms="+algorithm+",rsa-sha2-256,rsa-sha2-512,ssh-ed25519,ecdsa-sha2-nistp256")
			out, errs, code := run(t, cmd)
			if code != 0 {
				t.Fatalf("%d, %s%s", code, out, errs)
			}
			text, err := os.ReadFile(known)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for line := range strings.Lines(string(text)) {
				got = append(got, strings.TrimSpace(strings.TrimPrefix(line, at)))
			}
			want := slices.Clone(public)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("known_hosts:\n%s\nwant\n%s\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"), errs)
			}
		})
	}
}

// What is no key of ours is not signed, and neither is anything else.
func TestHostKeyProofsRefused(t *testing.T) {
	j := start(t, options{})
	c := j.dial()
	for name, payload := range map[string][]byte{
		"nothing": nil, "half a string": {0, 0, 0, 9, 'x'}, "a foreign key": strings4251(j.key.PublicKey().Marshal()), "text": strings4251([]byte("text")),
	} {
		if ok, answer, err := c.SendRequest("hostkeys-prove-00@openssh.com", true, payload); ok || err != nil {
			t.Errorf("%s: %x, %v", name, answer, err)
		}
	}
	if out, code := execute(t, c, "echo on"); out != "on\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
}

// HostKeyAlgorithms restricts what the key exchange offers, certificates included.
func TestHostKeyAlgorithms(t *testing.T) {
	config, public := hostKeyFiles(t, t.TempDir(), "ed25519", "rsa")
	for list, want := range map[string]string{
		"rsa-sha2-512":   "rsa-sha2-512",
		"-ssh-ed25519":   "rsa-sha2-512 rsa-sha2-256",
		"-rsa-sha2-512":  "ssh-ed25519 rsa-sha2-256",
		"*ed25519,dss-x": "ssh-ed25519",
	} {
		t.Run(list, func(t *testing.T) {
			j := start(t, options{config: config + "HostKeyAlgorithms " + list})
			_, port, _ := net.SplitHostPort(j.addr)
			known := filepath.Join(t.TempDir(), "known_hosts")
			at := "[" + host[strings.Index(host, "@")+1:] + "]:" + port + " "
			j.write(known, at+public[0]+"\n"+at+public[1]+"\n")
			for _, algorithm := range []string{"ssh-ed25519", "rsa-sha2-256", "rsa-sha2-512"} {
				_, errs, code := run(t, j.hostKeyClient(known, "UpdateHostKeys=no", "HostKeyAlgorithms="+algorithm))
				if offered := slices.Contains(strings.Fields(want), algorithm); offered != (code == 0) || !offered && !strings.Contains(errs, "no matching host key type") {
					t.Errorf("%s: %d, %s", algorithm, code, errs)
				}
			}
		})
	}
	if err := startError(t, options{config: config + "HostKeyAlgorithms rot13"}); err == nil || !strings.Contains(err.Error(), "HostKeyAlgorithms rot13 leaves no host key") {
		t.Errorf("nothing left: %v", err)
	}
}
