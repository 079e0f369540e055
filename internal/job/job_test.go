// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

var success = outcome{exit: 0, status: "success", images: 1}

func failure1(text string) outcome { return outcome{exit: 1, status: "error", errors: text} }

// open reads the published root file system back from the store.
func (p *pod) open() *squash.Image {
	p.t.Helper()
	for id := range p.ims.images {
		r, _, err := p.newStore().Get(p.t.Context(), id+"/rootfs")
		if err != nil {
			p.t.Fatal(err)
		}
		defer r.Close()
		var b bytes.Buffer
		if _, err := b.ReadFrom(r); err != nil {
			p.t.Fatal(err)
		}
		img, err := squash.Open(bytes.NewReader(b.Bytes()), int64(b.Len()))
		if err != nil {
			p.t.Fatal(err)
		}
		return img
	}
	p.t.Fatal("no image")
	return nil
}

func TestCustomize(t *testing.T) {
	p := newPod(t, "file boot/vmlinuz 0644 kernel", "file boot/initrd 0644 initrd", "file boot/kernel-parameters 0644 quiet",
		"file tmp/complete 0644 stale", "file tmp/failed 0644 stale", "symlink etc/resolv.conf ../run/resolv.conf",
		"file image/vault.yml 0644 secret", "file image/run.sh 0755 x")
	seen := false
	p.user = func() {
		conf, err := os.ReadFile(filepath.Join(p.cfg.RootDir, "etc/resolv.conf"))
		if err != nil || !bytes.Contains(conf, []byte("127.0.0.1")) {
			t.Errorf("resolv.conf in the shell: %q, %v", conf, err)
		}
		seen = true
		if err := p.flags().Touch(signalfile.Complete); err != nil {
			t.Error(err)
		}
	}
	p.check(p.run(t.Context()), success)
	if !seen {
		t.Fatal("the user never came")
	}
	want := []string{"waiting_on_user", "packaging_artifacts", "success"}
	if !slices.Equal(p.ims.statuses, want) {
		t.Errorf("statuses %v, want %v", p.ims.statuses, want)
	}
	if got := strings.Join(p.ims.calls, ", "); got != "PATCH jobs status=waiting_on_user, PATCH jobs status=packaging_artifacts, POST images, PATCH images link, PATCH jobs resultant_image_id, PATCH jobs status=success" {
		t.Errorf("calls: %s", got)
	}
	for id, img := range p.ims.images {
		if p.ims.job["resultant_image_id"] != id || img["name"] != "a/b ü" || img["arch"] != "x86_64" {
			t.Errorf("job %v, image %v", p.ims.job, img)
		}
		if _, err := p.newStore().Head(t.Context(), id+"/boot_parameters"); err != nil {
			t.Error(err)
		}
	}
	img := p.open()
	if err := squash.Verify(t.Context(), img, false); err != nil {
		t.Error(err)
	}
	for _, gone := range []string{"tmp/complete", "tmp/failed"} {
		if _, err := img.Lstat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is packed: %v", gone, err)
		}
	}
	if target, err := img.ReadLink("etc/resolv.conf"); err != nil || target != "../run/resolv.conf" {
		t.Errorf("resolv.conf in the image: %q, %v", target, err)
	}
	for name, mode := range map[string]fs.FileMode{"image": 0o700 | fs.ModeDir, "image/vault.yml": 0o600, "image/run.sh": 0o700} {
		if info, err := img.Lstat(name); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, want %v", name, info, mode)
		}
	}
	if ca, err := fs.ReadFile(img, "etc/cray/ca/certificate_authority.crt"); err != nil || string(ca) != "PEM" {
		t.Errorf("CA: %q, %v", ca, err)
	}
	if ca, err := fs.ReadDir(img, "etc/cray/ca"); err != nil || len(ca) != 1 {
		t.Errorf("CA directory: %v, %v", ca, err)
	}
}

// The result has the legacy document's shape: same keys at every level.
func TestResultDocument(t *testing.T) {
	p := newPod(t)
	exit := p.run(t.Context())
	text := p.stdout.String()
	p.check(exit, success)
	if !strings.HasPrefix(text, "{\n    \"ims_image_artifacts\": [\n        {\n            \"link\": {\n                \"etag\": ") {
		t.Errorf("layout:\n%s", text)
	}
	var doc struct {
		Artifacts []struct{ Link, MD5, Type any } `json:"ims_image_artifacts"`
		Image     map[string]any                  `json:"ims_image_record"`
		Job       map[string]any                  `json:"ims_job_record"`
	}
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		t.Fatal(err)
	}
	var types []any
	for _, a := range doc.Artifacts {
		types = append(types, a.Type)
	}
	if !slices.Equal(types, []any{"application/vnd.cray.image.rootfs.squashfs", "application/vnd.cray.image.kernel", "application/vnd.cray.image.initrd", "application/json"}) {
		t.Errorf("artifacts %v", types)
	}
	if doc.Job["status"] != "packaging_artifacts" || doc.Image["link"] == nil || doc.Job["resultant_image_id"] != doc.Image["id"] {
		t.Errorf("records %v %v", doc.Job, doc.Image)
	}
}

func TestUserGivesUp(t *testing.T) {
	for name, touch := range map[string][]signalfile.Name{"failed": {signalfile.Failed}, "both flags": {signalfile.Complete, signalfile.Failed}} {
		for _, jailed := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				p := newPod(t)
				p.cfg.Jailed = jailed
				p.user = func() {
					for _, f := range touch {
						if err := p.flags().Touch(f); err != nil {
							t.Error(err)
						}
					}
				}
				p.check(p.run(t.Context()), outcome{exit: 0, status: "error", silent: true})
			})
		}
	}
}

// Everything that can go wrong, and that nothing is left of it.
func TestFaults(t *testing.T) {
	always := func(call string, status int) func(*pod) {
		return func(p *pod) {
			p.ims.intercept(func(c string) int {
				if c == call {
					return status
				}
				return 0
			})
		}
	}
	inRoot := func(p *pod, line ...string) {
		if err := os.RemoveAll(filepath.Join(p.cfg.RootDir, "boot")); err != nil {
			p.t.Error(err)
		}
		tree.Make(p.t, p.cfg.RootDir, line...)
	}
	storeConfig := func(change func(*config.S3)) func(*pod) {
		return func(p *pod) {
			change(&p.cfg.S3)
			p.impatient()
		}
	}
	away := func(call string, status int) func(*pod) {
		return func(p *pod) {
			always(call, status)(p)
			p.impatient()
		}
	}
	for name, c := range map[string]struct {
		arrange func(*pod)
		user    func(*pod) // before complete is touched
		want    outcome
	}{
		"store down":       {arrange: storeConfig(func(s *config.S3) { s.Endpoint = "http://127.0.0.1:1" }), want: failure1("S3_ENDPOINT")},
		"bad key":          {arrange: storeConfig(func(s *config.S3) { s.AccessKey = "nobody" }), want: failure1("S3_ACCESS_KEY")},
		"bad secret":       {arrange: storeConfig(func(s *config.S3) { s.SecretKey = config.NewSecret("x") }), want: failure1("S3_SECRET_KEY")},
		"missing bucket":   {arrange: storeConfig(func(s *config.S3) { s.Bucket = "no-such-bucket" }), want: failure1("does not exist")},
		"store dies":       {arrange: func(p *pod) { p.impatient(); p.store.put = func(string, int64) { p.s3.Kill() } }, want: failure1("S3_ENDPOINT")},
		"kernel missing":   {user: func(p *pod) { inRoot(p, "file boot/initrd 0644 i") }, want: failure1("/boot/vmlinuz")},
		"kernel empty":     {user: func(p *pod) { inRoot(p, "file boot/initrd 0644 i", "file boot/vmlinuz") }, want: failure1("empty")},
		"initrd is a FIFO": {user: func(p *pod) { inRoot(p, "file boot/vmlinuz 0644 k", "fifo boot/initrd") }, want: failure1("FIFO")},
		"initrd is a theft": {user: func(p *pod) {
			inRoot(p, "file boot/vmlinuz 0644 k", "symlink boot/initrd "+p.dir+"/secrets/client-secret")
		}, want: failure1("leads nowhere")},
		"root is a link":      {user: func(p *pod) { swapRoot(p) }, want: failure1("symbolic link")},
		"no key":              {arrange: func(p *pod) { os.Remove(p.cfg.AuthorizedKeys) }, want: failure1("public_key_id")},
		"no usable key":       {arrange: func(p *pod) { p.write("keys", "ssh-rsa garbage\n") }, want: failure1("no usable public key")},
		"IMS refuses waiting": {arrange: always("PATCH jobs status=waiting_on_user", 422), want: failure1("on demand")},
		"IMS has no image":    {arrange: always("POST images", 400), want: failure1("on demand")},
		"IMS lost an answer":  {arrange: always("POST images", -1), want: failure1("reach IMS")},
		"link refused":        {arrange: always("PATCH images link", 422), want: failure1("link the image")},
		"link unavailable":    {arrange: away("PATCH images link", 503), want: failure1("link the image")},
		"job refuses image":   {arrange: away("PATCH jobs resultant_image_id", 500), want: failure1("tell the job")},
		"remote build":        {arrange: func(p *pod) { p.cfg.RemoteBuildNode = "x3000" }, want: failure1("x3000")},
		"unknown action":      {arrange: func(p *pod) { p.cfg.Action = "destroy" }, want: failure1("destroy")},
		"no image root":       {arrange: func(p *pod) { os.RemoveAll(p.cfg.RootDir) }, want: failure1("image-root")},
		"pod error": {arrange: func(p *pod) {
			p.user = func() { p.flags().Touch(signalfile.PodError) }
		}, want: failure1("pod_error")},
		"panic": {arrange: func(p *pod) { p.store.put = func(string, int64) { panic("at the disco") } }, want: failure1("at the disco")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			if c.arrange != nil {
				c.arrange(p)
			}
			if c.user != nil {
				p.user = func() {
					c.user(p)
					os.WriteFile(filepath.Join(p.cfg.Parent, "exiting"), nil, 0o600)
				}
			}
			p.check(p.run(t.Context()), c.want)
		})
	}
}

// swapRoot is what a plain-mode user can do: point image-root at the sidecar's
// own file system, secrets and all.
func swapRoot(p *pod) {
	if err := os.Rename(p.cfg.RootDir, filepath.Join(p.cfg.Parent, "elsewhere")); err != nil {
		p.t.Error(err)
	}
	if err := os.Symlink(filepath.Join(p.dir, "secrets"), p.cfg.RootDir); err != nil {
		p.t.Error(err)
	}
}

// A service that is away for a while costs nothing.
func TestServiceReturns(t *testing.T) {
	p := newPod(t)
	failed := map[string]int{}
	p.ims.intercept(func(call string) int {
		p.ims.mu.Lock()
		defer p.ims.mu.Unlock()
		if failed[call]++; failed[call] <= 2 {
			return 503
		}
		return 0
	})
	p.check(p.run(t.Context()), success)
}

// The last status cannot be set: the image stays, the state too, and another
// run only reports.
func TestLastStatus(t *testing.T) {
	p := newPod(t)
	p.impatient()
	down := true
	p.ims.intercept(func(call string) int {
		if down && call == "PATCH jobs status=success" {
			return 500
		}
		return 0
	})
	if exit := p.run(t.Context()); exit != 1 {
		t.Errorf("exit %d", exit)
	}
	if _, err := os.Stat(filepath.Join(p.cfg.Parent, layout.State)); err != nil {
		t.Errorf("no state for another run: %v", err)
	}
	document := p.stdout.String()
	down = false
	exit := p.runAlone(t.Context())
	if p.stdout.String() != document {
		t.Error("the result was printed twice")
	}
	p.check(exit, success)
}

// SIGTERM, at each place where it can come.
func TestTold(t *testing.T) {
	told := errors.New("told to end")
	for name, arrange := range map[string]func(p *pod, end func()){
		"at the login":  func(p *pod, end func()) { p.ims.intercept(onCall("PATCH jobs status=waiting_on_user", end)) },
		"with the user": func(p *pod, end func()) { p.user = end },
		"while packing": func(p *pod, end func()) { p.ims.intercept(onCall("PATCH jobs status=packaging_artifacts", end)) },
		"at the record": func(p *pod, end func()) {
			p.ims.intercept(func(call string) int {
				if call == "POST images" {
					end()
				}
				return 0 // the record is made all the same
			})
		},
		"amid the upload": func(p *pod, end func()) {
			p.store.put = func(_ string, n int64) {
				if n > 0 {
					end()
				}
			}
		},
		"after the upload": func(p *pod, end func()) { p.ims.intercept(onCall("PATCH images link", end)) },
		"at the very end":  func(p *pod, end func()) { p.ims.intercept(onCall("PATCH jobs resultant_image_id", end)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			arrange(p, func() { cancel(told) })
			p.check(p.run(ctx), failure1("told to end"))
		})
	}
}

func onCall(want string, do func()) func(string) int {
	return func(call string) int {
		if call != want {
			return 0
		}
		do()
		return -1 // no answer, so that the cancellation is always first
	}
}

// The sshd container dies while the user is at work.
func TestSSHDGone(t *testing.T) {
	p := newPod(t)
	p.tune.watchPause = 5 * time.Millisecond
	p.user = func() { p.listener.Close() }
	p.check(p.run(t.Context()), failure1("sshd container is gone"))
}

func TestSSHDNeverComes(t *testing.T) {
	p := newPod(t)
	p.tune.probeTimeout = time.Nanosecond
	p.deaf = true
	p.check(p.run(t.Context()), failure1("let nobody in"))
}

func TestCreate(t *testing.T) {
	arrange := func(t *testing.T) *pod {
		p := newPod(t)
		p.cfg.Action = config.ActionCreate
		p.cfg.RootDir = filepath.Join(p.cfg.Parent, "build/image-root")
		if err := os.Mkdir(filepath.Join(p.cfg.Parent, "build"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p.cfg.ImageRoot(), p.cfg.RootDir); err != nil {
			t.Fatal(err)
		}
		return p
	}
	t.Run("built", func(t *testing.T) {
		p := arrange(t)
		p.check(p.run(t.Context()), success)
		if !slices.Equal(p.ims.statuses, []string{"packaging_artifacts", "success"}) {
			t.Errorf("statuses %v", p.ims.statuses)
		}
	})
	t.Run("failed", func(t *testing.T) {
		p := arrange(t)
		tree.Make(t, p.cfg.Parent, "file build_failed")
		p.check(p.run(t.Context()), failure1("build of the image failed"))
		if len(p.ims.statuses) != 1 {
			t.Errorf("statuses %v", p.ims.statuses)
		}
	})
	t.Run("failed with debug", func(t *testing.T) {
		p := arrange(t)
		p.cfg.Debug, p.cfg.Jailed = true, false
		tree.Make(t, p.cfg.Parent, "file build_failed")
		p.check(p.run(t.Context()), failure1("build of the image failed"))
		if !slices.Equal(p.ims.statuses, []string{"waiting_on_user", "error"}) {
			t.Errorf("statuses %v", p.ims.statuses)
		}
	})
}

func TestRefuse(t *testing.T) {
	p := newPod(t)
	cfg := p.cfg
	cfg.S3 = config.S3{}
	exit := Refuse(t.Context(), cfg, Deps{Stdout: &p.stdout}, errors.New("configuration: S3_BUCKET is not set"))
	p.check(exit, failure1("S3_BUCKET"))
}

// smallVolume moves the job to a volume of a size.
func (p *pod) smallVolume(size string) {
	p.t.Helper()
	testkit.NeedRoot(p.t)
	volume := p.t.TempDir()
	if err := unix.Mount("tmpfs", volume, "tmpfs", 0, "size="+size); err != nil {
		p.t.Skipf("mount a small volume: %v", err)
	}
	p.t.Cleanup(func() {
		if err := unix.Unmount(volume, unix.MNT_DETACH); err != nil {
			p.t.Error(err)
		}
	})
	if err := os.CopyFS(volume+"/image-root", os.DirFS(p.cfg.RootDir)); err != nil {
		p.t.Fatal(err)
	}
	p.cfg.Parent, p.cfg.RootDir = volume, volume+"/image-root"
}

// The new image has no room beside the one the root was made from: that one goes.
func TestRoomOfBase(t *testing.T) {
	p := newPod(t)
	p.smallVolume("40m")
	p.prepare()
	p.user = func() {
		tree.Make(t, p.cfg.RootDir, "data etc/new 0644 3000000 random:9")
		if err := p.flags().Touch(signalfile.Complete); err != nil {
			t.Error(err)
		}
	}
	p.check(p.run(t.Context()), success)
	if log := p.log.String(); !strings.Contains(log, "which is removed; everything is compressed") {
		t.Errorf("the old image was not removed:\n%s", log)
	}
	got := p.open()
	if err := squash.Verify(t.Context(), got, false); err != nil {
		t.Error(err)
	}
	if b, err := fs.ReadFile(got, "etc/new"); err != nil || len(b) != 3000000 {
		t.Errorf("new file of %d bytes: %v", len(b), err)
	}
}

// The volume is too small: found before packing when hopeless, and otherwise
// while packing, with the space given back and the setting to raise named.
func TestNoSpace(t *testing.T) {
	for name, c := range map[string]struct{ size, want string }{
		"hopeless": {"13500k", "at least"}, "not enough": {"20m", "the image needs about"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			p.smallVolume(c.size)
			exit := p.run(t.Context())
			if out := p.stdout.String(); !strings.Contains(out, "build_env_size") {
				t.Errorf("no next step in %s", out)
			}
			p.check(exit, failure1(c.want))
		})
	}
}
