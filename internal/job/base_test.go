// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// packRoot packs the pod's root to the image the init container leaves on the
// volume, and opens that. The caller closes the file.
func (p *pod) packRoot(opt squash.Options) (*squash.Image, *os.File) {
	p.t.Helper()
	file := filepath.Join(p.cfg.Parent, layout.Image)
	src, err := squash.DirSource(p.cfg.RootDir, squash.DirOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	defer src.Close()
	if _, err := squash.PackFile(p.t.Context(), src, file, opt); err != nil {
		p.t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		p.t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		p.t.Fatal(err)
	}
	img, err := squash.Open(f, info.Size())
	if err != nil {
		p.t.Fatal(err)
	}
	return img, f
}

// prepare does the init container's work: the root is packed to an image, and
// laid out from it.
func (p *pod) prepare() {
	p.t.Helper()
	img, f := p.packRoot(squash.Options{Compressor: squash.Zstd})
	defer f.Close()
	root := p.cfg.RootDir
	err := os.RemoveAll(root)
	if err == nil {
		_, err = squash.Unpack(p.t.Context(), img, root, squash.UnpackOptions{})
	}
	if err == nil {
		err = squash.WriteIndex(p.t.Context(), img, root, filepath.Join(p.cfg.Parent, layout.Index))
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// What did not change is taken over from the image the init container left; and
// whatever that is like, the image holds what the user made.
func TestBase(t *testing.T) {
	for name, c := range map[string]struct {
		change func(volume string) error
		logs   string
	}{
		"as prepared":   {func(string) error { return nil }, "unchanged data was taken over from the old image\" layout=append files=3 of=6 bytes=13000017"},
		"without index": {func(v string) error { return os.Remove(filepath.Join(v, layout.Index)) }, "every file is read to see what changed"},
		"index damaged": {func(v string) error { return os.Truncate(filepath.Join(v, layout.Index), 100) }, "every file is read to see what changed"},
		"image damaged": {func(v string) error { return os.Truncate(filepath.Join(v, layout.Image), 5000) }, "the image the root was made from cannot be read"},
		"no image":      {func(v string) error { return os.Remove(filepath.Join(v, layout.Image)) }, "is not on the volume: everything is compressed"},
		"a link": {func(v string) error {
			if err := os.Rename(filepath.Join(v, layout.Image), filepath.Join(v, "elsewhere")); err != nil {
				return err
			}
			return os.Symlink("elsewhere", filepath.Join(v, layout.Image))
		}, "everything is compressed"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			volume, root := p.cfg.Parent, p.cfg.RootDir
			p.prepare()
			if err := c.change(volume); err != nil {
				t.Fatal(err)
			}
			p.user = func() {
				for file, text := range map[string]string{"etc/new": "new", "etc/hostname": "other"} {
					if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o644); err != nil {
						t.Error(err)
					}
				}
				if err := p.flags().Touch(signalfile.Complete); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), success)
			if !strings.Contains(p.log.String(), c.logs) {
				t.Errorf("the log does not say %q:\n%s", c.logs, p.log.String())
			}
			got := p.open()
			if err := squash.Verify(t.Context(), got, false); err != nil {
				t.Error(err)
			}
			for file, text := range map[string]string{"etc/new": "new", "etc/hostname": "other", "boot/vmlinuz": "kernel"} {
				if b, err := fs.ReadFile(got, file); err != nil || string(b) != text {
					t.Errorf("%s: %q %v", file, b, err)
				}
			}
			if b, err := fs.ReadFile(got, "opt/payload"); err != nil || len(b) != 13000000 {
				t.Errorf("payload of %d bytes: %v", len(b), err)
			}
		})
	}
}

// On a node with SELinux every file has a label; an image that had none gets none. One that had some keeps them.
func TestNodeLabels(t *testing.T) {
	for name, lines := range map[string][]string{"none": nil, "some": {"file boot/vmlinuz 0644 kernel", "file boot/initrd 0600 initrd", "xattr boot/vmlinuz security.selinux=image"}} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, lines...)
			p.prepare()
			p.user = func() {
				tree.Make(t, p.cfg.RootDir, "file etc/new", "xattr etc/new security.selinux=node", "xattr etc/new user.mine=1")
				if err := p.flags().Touch(signalfile.Complete); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), success)
			label := func(name string) bool { return name == "security.selinux" }
			if has, err := p.open().HasXattr(label); err != nil || has != (lines != nil) {
				t.Errorf("labels in the new image: %t, %v", has, err)
			}
			if told := strings.Contains(p.log.String(), "labels of the node's SELinux are left out"); told != (lines == nil) {
				t.Errorf("told of it: %t", told)
			}
		})
	}
}

// The store copies what it has of the new image, its kernel and its initrd: what
// goes over the network follows the change.
func TestBaseUpload(t *testing.T) {
	const initrdSize = 6 << 20
	lines := []string{"file boot/vmlinuz 0644 kernel", fmt.Sprintf("data boot/initrd 0644 %d random:8", initrdSize)}
	for name, c := range map[string]struct {
		record func(*layout.Record)
		user   func(t *testing.T, root string)
		most   int64 // bytes sent
		least  int64
	}{
		"nothing changed": {most: 6 << 20},
		"small edit": {user: func(t *testing.T, root string) {
			tree.Make(t, root, "data etc/new 0644 1000000 random:9")
		}, most: 7 << 20, least: 5<<20 + 1000000},
		"a third of it changed": {user: func(t *testing.T, root string) {
			os.Remove(filepath.Join(root, "boot/initrd"))
			tree.Make(t, root, fmt.Sprintf("data boot/initrd 0644 %d random:9", initrdSize))
		}, most: 6<<20 + 2*initrdSize, least: 5<<20 + 2*initrdSize}, // compacted: the payload is copied from where it lay
		"other bucket": {record: func(r *layout.Record) { r.URLPath = "/others/" + testJob + "/rootfs" }, least: 13000000 + 2*initrdSize},
		"other object": {record: func(r *layout.Record) { r.MD5 = strings.Repeat("0", 32) }, least: 13000000 + initrdSize},
		"no path":      {record: func(r *layout.Record) { r.URLPath = "?" }, least: 13000000 + 2*initrdSize},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, lines...)
			p.prepare()
			rec := p.storeBase()
			if c.record != nil {
				c.record(&rec)
			}
			if err := layout.Write(p.cfg.Parent, rec); err != nil {
				t.Fatal(err)
			}
			sent := p.countSent()
			p.user = func() {
				if c.user != nil {
					c.user(t, p.cfg.RootDir)
				}
				if err := p.flags().Touch(signalfile.Complete); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), outcome{exit: 0, status: "success", images: 2})
			delete(p.ims.images, oldImage)
			if n := sent.Load(); n < c.least || c.most > 0 && n > c.most {
				t.Errorf("%d bytes sent, want %d to %d:\n%s", n, c.least, c.most, p.log.String())
			}
			if err := squash.Verify(t.Context(), p.open(), false); err != nil {
				t.Error(err)
			}
		})
	}
}

const oldImage = "0c5fc51c-fc1d-4d2e-8c42-7c903f1ec20d"

// storeBase stores the image the root was made from, as an earlier job did, and
// returns what the init container notes of it.
func (p *pod) storeBase() layout.Record {
	p.t.Helper()
	p.ims.images[oldImage] = map[string]any{"id": oldImage}
	rec := layout.Record{URLPath: "/" + p.s3.Bucket + "/" + oldImage + "/rootfs"}
	for name, path := range map[string]string{"rootfs": filepath.Join(p.cfg.Parent, layout.Image),
		"initrd": filepath.Join(p.cfg.RootDir, "boot/initrd"), "kernel": filepath.Join(p.cfg.RootDir, "boot/vmlinuz")} {
		b, err := os.ReadFile(path)
		if err != nil {
			p.t.Fatal(err)
		}
		info, err := p.store.S3.Put(p.t.Context(), upload.Object{Key: oldImage + "/" + name, Body: bytes.NewReader(b), Size: int64(len(b))})
		if err != nil {
			p.t.Fatal(err)
		}
		if name == "rootfs" {
			rec.Size, rec.MD5 = info.Size, info.Metadata["md5sum"]
		}
	}
	return rec
}

// countSent counts what is sent to the store from now on.
func (p *pod) countSent() *atomic.Int64 {
	p.t.Helper()
	var sent atomic.Int64
	p.meet(func(r *http.Request) { sent.Add(max(r.ContentLength, 0)) })
	return &sent
}

// meet has the requests to the store come past do from now on.
func (p *pod) meet(do func(r *http.Request)) {
	p.t.Helper()
	to, err := url.Parse(p.s3.Endpoint)
	if err != nil {
		p.t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		do(r.In)
		r.SetURL(to)
		r.Out.Host = r.In.Host // it is signed
	}})
	p.t.Cleanup(proxy.Close)
	p.cfg.S3.Endpoint = proxy.URL
	p.store.S3 = p.newStore()
}

// Over a slow network, what is new of an image is sent while the rest of it is packed.
func TestSentWhilePacking(t *testing.T) {
	p := newPod(t)
	p.meet(func(r *http.Request) {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/kernel") {
			time.Sleep(200 * time.Millisecond)
		}
	})
	if err := os.WriteFile(filepath.Join(p.cfg.RootDir, "boot/vmlinuz"), make([]byte, 2<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	p.prepare()
	fresh := make([]byte, 160<<20)
	rand.NewChaCha8([32]byte{}).Read(fresh)
	p.user = func() {
		if err := os.WriteFile(filepath.Join(p.cfg.RootDir, "opt/fresh"), fresh, 0o644); err != nil {
			t.Error(err)
		}
		if err := p.flags().Touch(signalfile.Complete); err != nil {
			t.Error(err)
		}
	}
	var early *upload.Base
	p.store.ahead = func(b *upload.Base) { early = b }
	p.check(p.run(t.Context()), success)
	if early == nil || early.Size < 16<<20 {
		t.Errorf("sent early: %+v\n%s", early, p.log.String())
	}
	got := p.open()
	if b, err := fs.ReadFile(got, "opt/fresh"); err != nil || !bytes.Equal(b, fresh) {
		t.Errorf("opt/fresh: %d bytes, %v", len(b), err)
	}
	if err := squash.Verify(t.Context(), got, false); err != nil {
		t.Error(err)
	}
}
