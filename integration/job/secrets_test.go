// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// secrets are what no log, image or session may hold.
func (w *world) secrets() []string { return []string{w.secretKey, w.clientSecret} }

// issued is the shape of a token of imslocal, wherever one may turn up, and of
// what makes a presigned URL a credential.
var issued = regexp.MustCompile(`\b[A-Z2-7]{26}\b|X-Amz-Signature=[0-9a-f]{16}`)

func (w *world) checkNoSecret(t *testing.T, where, text string) {
	t.Helper()
	for _, s := range w.secrets() {
		if strings.Contains(text, s) {
			t.Errorf("%s holds a secret", where)
		}
	}
	if found := issued.FindString(text); found != "" {
		t.Errorf("%s holds what looks like a credential: %.12s…", where, found)
	}
}

// checkFiles looks into every file below dir.
func (w *world) checkFiles(t *testing.T, dir string) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		for _, s := range w.secrets() {
			if bytes.Contains(b, []byte(s)) {
				t.Errorf("%s holds a secret", path)
			}
		}
		return nil
	})
	if err != nil || seen == 0 {
		t.Errorf("%s: %d files read, %v", dir, seen, err)
	}
}

// TestSecrets looks for the keys of S3 and of IMS where the user is, and in
// what a job leaves.
func TestSecrets(t *testing.T) {
	s := need(t)
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, m.order)
			j.wait(ims.WaitingOnUser)
			// in what root in the shell can read of other processes
			out := j.ssh(`for f in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do tr '\000' '\n' <$f; done 2>/dev/null; env`)
			if !strings.Contains(out, "IMS_JOB_ID="+j.ID) {
				t.Errorf("the session sees not even its own environment: %q", out)
			}
			s.checkNoSecret(t, "/proc in the shell", out)
			// in files; the pattern goes by standard input, or it would find itself
			// /proc and the like are mounted in the root of a privileged pod, and never end
			dirs := "/etc /run /tmp /root"
			if m.jail {
				dirs = "/etc /boot /run /tmp /root /usr /var/tmp /home"
			}
			out, _ = j.client(strings.Join(s.secrets(), "\n")+"\nroot:x:0:0\n", "ssh", "root@127.0.0.1", "grep -rlsF -f - "+dirs)
			if !strings.Contains(out, "/etc/passwd\n") {
				t.Errorf("the search does not find what is there: %q", out)
			}
			for _, name := range strings.Fields(out) {
				if base := filepath.Base(name); base != "passwd" && base != "passwd-" {
					t.Errorf("a secret is in %s", name)
				}
			}
			// outside, in the daemon that root in the shell talks to
			for _, p := range processesOf(t, j.ID) {
				pid, cmdline, _ := strings.Cut(p, " ")
				s.checkNoSecret(t, "a command line", cmdline)
				if !strings.Contains(cmdline, "/sidecar") {
					env, _ := os.ReadFile("/proc/" + pid + "/environ")
					s.checkNoSecret(t, "the environment of "+cmdline, string(env))
				}
			}
			s.checkFiles(t, j.path("volume"))
			s.checkFiles(t, j.path("ims"))
			j.ssh("touch " + j.flag("complete"))
			j.wait(ims.Success)
			j.ends()
			for _, name := range []string{"prepare", "sshd", "buildenv-sidecar"} {
				s.checkNoSecret(t, "the log of "+name, j.log(name))
			}
			s.checkNoSecret(t, "sshd.log", readFile(t, j.path("ims", "sshd.log")))
			s.checkNoSecret(t, "the log of imslocal", s.output(t))
			s.checkNoSecret(t, "the log of the store", readFile(t, filepath.Join(s.data, "s3.log")))
			s.checkFiles(t, unpack(t, j.result(kernelText, initrdText).file))
		})
	}
}

// TestSecretsInDetail has everything logged that can be.
func TestSecretsInDetail(t *testing.T) {
	s := need(t)
	t.Parallel()
	p := s.newPod(t, true, volumeDirectory)
	p.env["LOG_LEVEL"] = "DEBUG"
	url, err := s.store.PresignGet(t.Context(), s.base.id+"/rootfs", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	prepare := p.start("sidecar", "prepare", "/mnt/image", url)
	if code := prepare.wait(); code != 0 {
		t.Fatalf("prepare: exit code %d", code)
	}
	sidecar, sshd := p.open()
	j := job{t: t, w: s.world, user: s.user, port: p.port, jail: true}
	j.ssh("echo the-user-types-a-password | cat >/dev/null; touch /tmp/complete")
	if a, b := sidecar.wait(), sshd.wait(); a != 0 || b != 0 {
		t.Errorf("exit codes %d and %d", a, b)
	}
	for name, pr := range map[string]*process{"prepare": prepare, "sidecar": sidecar, "sshd": sshd} {
		log := readFile(t, pr.stderr)
		if !strings.Contains(log, "level=DEBUG") {
			t.Errorf("nothing of %s is logged in detail", name)
		}
		s.checkNoSecret(t, "the log of "+name, log)
		if strings.Contains(log, "the-user-types-a-password") {
			t.Errorf("the log of %s holds what the user ran", name)
		}
	}
}
