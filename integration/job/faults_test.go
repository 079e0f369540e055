// SPDX-License-Identifier: Apache-2.0

package job

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// TestByHand runs the containers as a pod of another system would: everything
// on stdout is the result, the log is on stderr.
func TestByHand(t *testing.T) {
	s := need(t)
	for _, jail := range []bool{true, false} {
		t.Run(map[bool]string{true: "jailed", false: "plain"}[jail], func(t *testing.T) {
			t.Parallel()
			p := s.newPod(t, jail, volumeDirectory)
			url, err := s.store.PresignGet(t.Context(), s.base.id+"/rootfs", time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if code := p.start("sidecar", "prepare", "/mnt/image", url).wait(); code != 0 {
				t.Fatalf("prepare: exit code %d", code)
			}
			sidecar, sshd := p.open()
			p.touch("complete")
			if a, b := sidecar.wait(), sshd.wait(); a != 0 || b != 0 {
				t.Errorf("exit codes %d and %d", a, b)
			}
			checkDocument(t, readFile(t, sidecar.stdout))
			j := job{t: t, w: s.world, name: p.name}
			j.ID = p.id
			checkTree(t, s.base.file, j.result(kernelText, initrdText).file, traces(jail)...)
			if got := statusesOf(t, s.world, p.id); !slices.Equal(got[len(got)-4:], []string{"creating", "waiting_on_user", "packaging_artifacts", "success"}) {
				t.Errorf("statuses %q", got)
			}
			for _, name := range []string{"complete", "exiting", "failed", "image-new.sqsh"} {
				if _, err := os.Lstat(p.path("/mnt/image/" + name)); !os.IsNotExist(err) {
					t.Errorf("left on the volume: %s", name)
				}
			}
		})
	}
}

// TestKeysMissing: the job must not wait for a user who cannot come.
func TestKeysMissing(t *testing.T) {
	s := need(t)
	for name, do := range map[string]func(file string) error{
		"missing":   os.Remove,
		"empty":     func(file string) error { return os.WriteFile(file, nil, 0o600) },
		"comments":  func(file string) error { return os.WriteFile(file, []byte("# none\n\n"), 0o600) },
		"directory": func(file string) error { os.Remove(file); return os.Mkdir(file, 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := s.newPod(t, true, volumeDirectory, baseTree()...)
			if err := do(p.path("/etc/cray/authorized_keys")); err != nil {
				t.Fatal(err)
			}
			pr := p.start("sidecar", "run", "/mnt/image")
			p.checkFailed(pr, "/etc/cray/authorized_keys", "public key")
			checkFailureDocument(t, pr)
		})
	}
}

// checkFailureDocument: stdout holds one JSON document that says why.
func checkFailureDocument(t *testing.T, pr *process) {
	t.Helper()
	text := readFile(t, pr.stdout)
	var doc map[string]string
	if err := json.Unmarshal([]byte(text), &doc); err != nil || len(doc) != 2 || doc["result"] != "failure" || doc["error"] == "" {
		t.Errorf("stdout is not one failure document: %v\n%s", err, text)
	}
}

// TestEnvironment is a job template gone wrong.
func TestEnvironment(t *testing.T) {
	s := need(t)
	for name, c := range map[string]struct {
		env   map[string]string
		words []string
	}{
		"unknown action": {map[string]string{"IMS_ACTION": "destroy"}, []string{"IMS_ACTION", `destroy`, "customize"}},
		"no action":      {map[string]string{"IMS_ACTION": ""}, []string{"IMS_ACTION", "customize"}},
		"no bucket":      {map[string]string{"S3_BUCKET": ""}, []string{"S3_BUCKET"}},
		"no keys":        {map[string]string{"S3_ACCESS_KEY": "", "S3_SECRET_KEY": ""}, []string{"S3_ACCESS_KEY", "S3_SECRET_KEY"}},
		"bad timeout":    {map[string]string{"IMS_PYTHON_HELPER_TIMEOUT": "soon"}, []string{"IMS_PYTHON_HELPER_TIMEOUT", "soon"}},
		"bad jail":       {map[string]string{"SSH_JAIL": "perhaps"}, []string{"SSH_JAIL", "perhaps"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := s.newPod(t, true, volumeDirectory, baseTree()...)
			p.env = c.env
			pr := p.start("sidecar", "run", "/mnt/image")
			p.checkFailed(pr, c.words...)
			checkFailureDocument(t, pr)
		})
	}
}

// TestStoreRefuses has keys or a bucket that are wrong.
func TestStoreRefuses(t *testing.T) {
	s := need(t)
	for name, c := range map[string]struct {
		env   map[string]string
		words []string
	}{
		"wrong secret":   {map[string]string{"S3_SECRET_KEY": "not-the-secret"}, []string{"S3_SECRET_KEY"}},
		"wrong key":      {map[string]string{"S3_ACCESS_KEY": "nobody"}, []string{"S3_ACCESS_KEY"}},
		"missing bucket": {map[string]string{"S3_BUCKET": "no-such-bucket"}, []string{"no-such-bucket", "S3_BUCKET"}},
		"no store there": {map[string]string{"S3_ENDPOINT": "http://127.0.0.1:1", "IMS_PYTHON_HELPER_TIMEOUT": "3"}, []string{"127.0.0.1:1", "connection refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := s.newPod(t, true, volumeDirectory, baseTree()...)
			p.env = c.env
			sidecar, _ := p.open()
			p.touch("complete")
			p.checkFailed(sidecar, c.words...)
			checkFailureDocument(t, sidecar)
			if log := readFile(t, sidecar.stderr); strings.Contains(log, "not-the-secret") {
				t.Error("the secret is in the log")
			}
		})
	}
}

// large is an image root whose packed form needs more than one part to upload.
func large() []string { return baseTree("data usr/lib/big 0644 40000000 random:7") }

// gatedPod is a pod that reaches its store through a gate.
func (s *stage) gatedPod(t *testing.T, root ...string) (*gate, *pod) {
	t.Helper()
	g := newGate(t, s.s3URL)
	p := s.newPod(t, true, volumeDirectory, root...)
	p.env["S3_ENDPOINT"] = g.url
	return g, p
}

// openAndHold opens p and returns when g holds the upload of its large image.
func (p *pod) openAndHold(g *gate) (sidecar *process) {
	p.t.Helper()
	sidecar, _ = p.open()
	g.hold(20_000_000)
	p.touch("complete")
	<-g.held
	return sidecar
}

// TestStoreGoes loses the store while the user works, and in mid-upload.
func TestStoreGoes(t *testing.T) {
	s := need(t)
	t.Run("before the upload", func(t *testing.T) {
		t.Parallel()
		g, p := s.gatedPod(t, baseTree()...)
		p.env["IMS_PYTHON_HELPER_TIMEOUT"] = "3"
		sidecar, _ := p.open()
		g.close()
		p.touch("complete")
		p.checkFailed(sidecar, strings.TrimPrefix(g.url, "http://"), "connection refused")
	})
	t.Run("in mid-upload for a moment", func(t *testing.T) {
		t.Parallel()
		g, p := s.gatedPod(t, large()...)
		sidecar := p.openAndHold(g)
		g.cut()
		if code := sidecar.wait(); code != 0 || p.status() != ims.Success {
			t.Errorf("exit code %d, status %s; a connection lost is no reason to fail", code, p.status())
		}
		j := job{t: t, w: s.world, name: p.name}
		j.ID = p.id
		j.result(kernelText, initrdText)
	})
	t.Run("in mid-upload for good", func(t *testing.T) {
		t.Parallel()
		g, p := s.gatedPod(t, large()...)
		p.env["IMS_PYTHON_HELPER_TIMEOUT"] = "1" // each of the many requests that fail takes this long
		sidecar := p.openAndHold(g)
		s.abandon(t, sidecar)
		g.close()
		if code := sidecar.wait(); code != 1 {
			t.Errorf("exit code %d", code)
		}
		p.checkAbandoned(sidecar)
	})
	t.Run("silent when the pod is deleted", func(t *testing.T) {
		t.Parallel()
		g, p := s.gatedPod(t, large()...)
		p.env["IMS_PYTHON_HELPER_TIMEOUT"] = "3"
		sidecar := p.openAndHold(g)
		s.abandon(t, sidecar)
		sidecar.cmd.Process.Signal(syscall.SIGTERM)
		if code := sidecar.wait(); code != 1 {
			t.Errorf("exit code %d", code)
		}
		p.checkAbandoned(sidecar)
	})
}

// abandon says that objects of the image a sidecar is making now may stay: their
// store is about to go.
func (w *world) abandon(t *testing.T, sidecar *process) {
	t.Helper()
	w.abandoned.Store(imageIn(t, readFile(t, sidecar.stderr)), true)
}

// checkAbandoned: nobody can take anything back from a store that is gone, but
// IMS was there all the time, and the log says what is left.
func (p *pod) checkAbandoned(sidecar *process) {
	t := p.t
	t.Helper()
	if got := p.status(); got != ims.Failed {
		t.Errorf("job status %s, want %s", got, ims.Failed)
	}
	log := readFile(t, sidecar.stderr)
	if !strings.Contains(log, "by hand") {
		t.Error("the log does not say what to remove by hand")
	}
	if left := p.w.imagesNamed(t, p.name); len(left) > 0 {
		t.Errorf("IMS still has the image record %s", left[0].Raw)
	}
	checkFailureDocument(t, sidecar)
}

// imageIn is the id of the image record that a sidecar's log says it made.
func imageIn(t *testing.T, log string) string {
	t.Helper()
	for line := range strings.Lines(log) {
		if strings.Contains(line, `msg="image record created"`) {
			return attribute(strings.TrimSpace(line), "image")
		}
	}
	t.Fatal("no image record in the log")
	return ""
}

// TestNoIMS: nobody can be told, but the job must end in time and say so.
func TestNoIMS(t *testing.T) {
	s := need(t)
	t.Parallel()
	p := s.newPod(t, true, volumeDirectory, baseTree()...)
	p.env["IMS_URL"] = "http://127.0.0.1:1"
	p.env["IMS_PYTHON_HELPER_TIMEOUT"] = "2"
	p.start("sshd", "/mnt/image")
	pr := p.start("sidecar", "run", "/mnt/image")
	if code := pr.wait(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	log := readFile(t, pr.stderr)
	if !strings.Contains(log, "127.0.0.1:1") || !strings.Contains(log, "waiting_on_user") {
		t.Error("the log does not name IMS and what it was to be told")
	}
	checkFailureDocument(t, pr)
	// its state stays for a sidecar that is started again
	if err := os.Remove(p.path("/mnt/image/.ims-buildenv-state")); err != nil {
		t.Error(err)
	}
	p.checkNothingLeft()
}

// TestDiskFull has no room for the new image beside the root.
func TestDiskFull(t *testing.T) {
	s := need(t)
	t.Parallel()
	p := s.newPod(t, true, volumeSmall, baseTree("data usr/lib/big 0644 14000000 random:3")...)
	sidecar, _ := p.open()
	p.touch("complete")
	p.checkFailed(sidecar, "no space left on device", "build_env_size")
	checkFailureDocument(t, sidecar)
}

// TestDiskFullAtOnce has no room to lay the image out.
func TestDiskFullAtOnce(t *testing.T) {
	s := need(t)
	t.Parallel()
	file := packTree(t, s.world, filepath.Join(t.TempDir(), "big"), baseTree("data usr/lib/big 0644 50000000 text")...)
	img := s.publish(t, newName(t), file)
	p := s.newPod(t, true, volumeSmall)
	p.env["IMS_BUILDENV_LAYOUT"] = "unpacked" // a layered one would fit
	url, err := s.store.PresignGet(t.Context(), img.id+"/rootfs", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	p.checkFailed(p.start("sidecar", "prepare", "/mnt/image", url), "bytes are free", "build_env_size")
}

// TestPrepareRefuses has download URLs and sums that are wrong.
func TestPrepareRefuses(t *testing.T) {
	s := need(t)
	good, err := s.store.PresignGet(t.Context(), s.base.id+"/rootfs", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	missing, err := s.store.PresignGet(t.Context(), s.base.id+"/nothing", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		url   string
		env   map[string]string
		words []string
	}{
		"object missing":   {missing, nil, []string{s.base.id + "/nothing", "404"}},
		"signature":        {good + "00", nil, []string{s.base.id + "/rootfs", "403"}},
		"no server":        {"http://127.0.0.1:1/rootfs", map[string]string{"IMS_PYTHON_HELPER_TIMEOUT": "3"}, []string{"127.0.0.1:1", "connection refused"}},
		"scheme":           {"file:///etc/admin-client-auth/client-secret", nil, []string{"http://HOST/", "presigned URL"}},
		"sum":              {good, map[string]string{"DOWNLOAD_MD5SUM": strings.Repeat("a", 32)}, []string{"MD5", strings.Repeat("a", 32)}},
		"sum that is none": {good, map[string]string{"DOWNLOAD_MD5SUM": "abc"}, []string{"DOWNLOAD_MD5SUM", "abc"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := s.newPod(t, true, volumeDirectory)
			for k, v := range c.env {
				p.env[k] = v
			}
			pr := p.start("sidecar", "prepare", "/mnt/image", c.url)
			p.checkFailed(pr, c.words...)
			if left, err := os.ReadDir(p.path("/mnt/image")); err != nil || len(left) > 0 {
				t.Errorf("on the volume: %v %v", left, err)
			}
			if strings.Contains(readFile(t, pr.stderr), "X-Amz-Signature=") {
				t.Error("the URL with its credentials is in the log")
			}
		})
	}
}

// TestTold sends SIGTERM, as Kubernetes does when a pod is deleted.
func TestTold(t *testing.T) {
	s := need(t)
	for name, until := range map[string]func(p *pod, g *gate, sidecar *process){
		"while waiting": func(*pod, *gate, *process) {},
		"while packing": func(p *pod, _ *gate, sidecar *process) {
			p.touch("complete")
			eventually(p.t, "a packed image in the making", func() bool {
				info, err := os.Lstat(p.path("/mnt/image/image-new.sqsh"))
				return err == nil && info.Size() > 0
			})
		},
		"while uploading": func(p *pod, g *gate, _ *process) {
			g.hold(20_000_000)
			p.touch("complete")
			<-g.held
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g, p := s.gatedPod(t, large()...)
			sidecar, sshd := p.open()
			until(p, g, sidecar)
			sidecar.cmd.Process.Signal(syscall.SIGTERM)
			g.release()
			p.checkFailed(sidecar, "signal")
			sshd.cmd.Process.Signal(syscall.SIGTERM)
			sshd.wait()
		})
	}
}
