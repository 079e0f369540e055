// SPDX-License-Identifier: Apache-2.0

package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// pair is one image laid out in both ways.
type pair struct {
	t     *testing.T
	image *squash.Image
	dirs  [2]string // volumes: unpacked, layered
}

var kinds = [2]layout.Kind{layout.Unpacked, layout.Layered}

func newPair(t *testing.T, lines ...string) *pair {
	t.Helper()
	testkit.NeedRoot(t)
	p := &pair{t: t, dirs: [2]string{t.TempDir(), t.TempDir()}}
	origin := t.TempDir()
	tree.Make(t, origin, lines...)
	old := unix.NsecToTimespec(time.Date(2020, 2, 29, 12, 0, 0, 0, time.UTC).UnixNano())
	err := filepath.WalkDir(origin, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW))
	})
	if err != nil {
		t.Fatal(err)
	}
	src, err := squash.DirSource(origin, squash.DirOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	for i, dir := range p.dirs {
		file := filepath.Join(dir, layout.Image)
		if _, err := squash.PackFile(t.Context(), src, file, squash.Options{}); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		info, err := f.Stat()
		if err == nil {
			p.image, err = squash.Open(f, info.Size())
		}
		root := filepath.Join(dir, "image-root")
		if err == nil && kinds[i] == layout.Layered {
			err = LayOut(p.image, dir, root)
		} else if err == nil {
			_, err = Unpack(t.Context(), p.image, dir, root, squash.UnpackOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p *pair) open(i int) *Root {
	p.t.Helper()
	var r *Root
	var err error
	if kinds[i] == layout.Layered {
		r, err = OpenLayered(p.dirs[i])
	} else {
		r, err = OpenUnpacked(filepath.Join(p.dirs[i], "image-root"))
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// edit does the same to both roots, as the sidecar would, nothing being mounted.
func (p *pair) edit(do func(i int, r *Root) error) {
	p.t.Helper()
	for i := range p.dirs {
		r := p.open(i)
		if err := do(i, r); err != nil {
			p.t.Errorf("%s: %v", kinds[i], err)
		}
		r.Close()
	}
}

// work does the same in both roots, as a user would: in the layered one by way of
// the kernel's overlay.
func (p *pair) work(do func(root *os.Root) error) {
	p.t.Helper()
	for i, dir := range p.dirs {
		path := filepath.Join(dir, "image-root")
		if kinds[i] == layout.Layered {
			m, err := layout.Mount(dir, path)
			if err != nil {
				p.t.Fatal(err)
			}
			defer m.Close()
			path = fmt.Sprintf("/proc/self/fd/%d", m.Fd())
		}
		root, err := os.OpenRoot(path)
		if err != nil {
			p.t.Fatal(err)
		}
		if err := do(root); err != nil {
			p.t.Errorf("%s: %v", kinds[i], err)
		}
		root.Close()
	}
}

// same packs both roots and fails unless the images are equal, byte for byte. It
// returns the image.
func (p *pair) same() []byte {
	p.t.Helper()
	epoch := time.Unix(1_600_000_000, 0) // hides when the changes were made
	var images [2][]byte
	for i := range p.dirs {
		r := p.open(i)
		src, err := r.Source(squash.DirOptions{})
		if err != nil {
			p.t.Fatal(err)
		}
		file := filepath.Join(p.t.TempDir(), "new")
		_, err = squash.PackFile(context.Background(), src, file, squash.Options{Epoch: &epoch, Base: &squash.Base{Image: p.image}})
		src.Close()
		r.Close()
		if err == nil {
			images[i], err = os.ReadFile(file)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		p.t.Errorf("the images differ, of %d and %d bytes; the upper layer:\n%s", len(images[0]), len(images[1]), strings.Join(p.upper(), "\n"))
	}
	return images[0]
}

// upper lists the upper layer.
func (p *pair) upper() []string {
	p.t.Helper()
	var names []string
	top := filepath.Join(p.dirs[1], layout.Upper)
	err := filepath.WalkDir(top, func(path string, _ fs.DirEntry, err error) error {
		if path != top {
			names = append(names, strings.TrimPrefix(path, top+"/"))
		}
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(p.dirs[1], layout.Edit)); err != nil || left != nil {
		p.t.Errorf("left by an edit: %q %v", left, err)
	}
	return names
}

var (
	plain = []string{
		"dir etc", "file etc/resolv.conf 0644 image's own", "dir tmp 1777", "dir boot", "file boot/vmlinuz 0644 kernel", "file boot/initrd 0600 initrd",
		"dir image 0755", "file image/config.xml 0644 secret", "file image/setup.sh 0755 #!/bin/sh", "dir image/sub 0700", "file image/sub/right 0600 already",
		"xattr etc user.dir=attribute", "xattr boot/vmlinuz user.file=attribute", "file image/twin 0644 two names", "hardlink image/twin2 image/twin", "data usr/big 0644 300000 random:1",
	}
	linked = []string{
		"dir usr/etc 0750", "symlink etc usr/etc", "symlink usr/etc/resolv.conf ../../run/resolv.conf", "dir usr/etc/cray/ca 0700", "file usr/etc/cray/ca/certificate_authority.crt 0644 PEM\n",
		"dir var/tmp 1777", "symlink tmp /var/tmp", "file var/tmp/complete 0644 stale", "file var/tmp/failed 0644 stale", "dir usr/lib/kernels",
		"symlink boot /usr/lib/kernels", "symlink usr/lib/kernels/vmlinuz vmlinuz-6", "file usr/lib/kernels/vmlinuz-6 0644 kernel",
		"file usr/lib/initrd 0600 initrd", "hardlink usr/lib/initrd.old usr/lib/initrd", "symlink usr/lib/kernels/initrd ../initrd", "symlink image usr", "owner usr/etc 3:4",
	}
	bare = []string{
		"dir etc/resolv.conf", "file etc/resolv.conf/odd 0644 odd", "dir boot", "symlink boot/vmlinuz a", "symlink boot/a b", "file boot/b 0644 kernel", "file boot/initrd 0644 initrd",
	}
)

// The sidecar's edits before and after the user's work lead to the same image in
// both layouts, whatever the root is like and whatever was done to it.
func TestSameImage(t *testing.T) {
	flags := []string{"tmp/complete", "tmp/failed"}
	for name, c := range map[string]struct {
		lines []string
		work  func(r *os.Root) error
	}{
		"nothing done":               {plain, func(*os.Root) error { return nil }},
		"nothing done, links":        {linked, func(*os.Root) error { return nil }},
		"nothing done, bare":         {bare, func(*os.Root) error { return nil }},
		"flag":                       {plain, func(r *os.Root) error { return r.WriteFile("tmp/complete", nil, 0o600) }},
		"flag, links":                {linked, func(r *os.Root) error { return r.WriteFile("var/tmp/complete", nil, 0o600) }},
		"flag, bare":                 {bare, func(r *os.Root) error { return r.WriteFile("tmp/complete", nil, 0o600) }},
		"resolv.conf removed":        {plain, func(r *os.Root) error { return r.Remove("etc/resolv.conf") }},
		"resolv.conf removed, links": {linked, func(r *os.Root) error { return r.Remove("usr/etc/resolv.conf") }},
		"resolv.conf replaced": {plain, func(r *os.Root) error {
			return errors.Join(r.Remove("etc/resolv.conf"), r.WriteFile("etc/resolv.conf", []byte("user's"), 0o600))
		}},
		"etc removed": {plain, func(r *os.Root) error { return r.RemoveAll("etc") }},
		"etc made anew": {plain, func(r *os.Root) error {
			return errors.Join(r.RemoveAll("etc"), r.Mkdir("etc", 0o700), r.WriteFile("etc/only", nil, 0o600))
		}},
		"image made anew": {plain, func(r *os.Root) error {
			return errors.Join(r.RemoveAll("image"), r.Mkdir("image", 0o777), r.WriteFile("image/only", nil, 0o666))
		}},
		"image is a file": {plain, func(r *os.Root) error {
			return errors.Join(r.RemoveAll("image"), r.WriteFile("image", nil, 0o666))
		}},
		"tmp is a link": {plain, func(r *os.Root) error {
			return errors.Join(r.RemoveAll("tmp"), r.MkdirAll("var/tmp", 0o777), r.Symlink("/var/tmp", "tmp"), r.WriteFile("var/tmp/complete", nil, 0o600))
		}},
		"twin changed": {plain, func(r *os.Root) error { return r.WriteFile("image/twin2", []byte("changed"), 0) }},
		"kernel replaced": {plain, func(r *os.Root) error {
			return errors.Join(r.WriteFile("boot/new", []byte("other kernel"), 0o600), r.Rename("boot/new", "boot/vmlinuz"), r.Link("boot/initrd", "boot/initrd.bak"))
		}},
		"no boot: kernel removed":          {plain, func(r *os.Root) error { return r.Remove("boot/vmlinuz") }},
		"no boot: all removed":             {plain, func(r *os.Root) error { return r.RemoveAll("boot") }},
		"no boot: target removed":          {linked, func(r *os.Root) error { return r.Remove("usr/lib/initrd") }},
		"tmp removed":                      {plain, func(r *os.Root) error { return r.RemoveAll("tmp") }},
		"tmp removed, links":               {linked, func(r *os.Root) error { return r.RemoveAll("var") }},
		"initrd changed by its other name": {linked, func(r *os.Root) error { return r.WriteFile("usr/lib/initrd.old", []byte("other initrd"), 0) }},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, c.lines...)
			ca, resolv := t.TempDir(), filepath.Join(t.TempDir(), "resolv.conf")
			if err := errors.Join(os.WriteFile(filepath.Join(ca, "certificate_authority.crt"), []byte("PEM\n"), 0o600), os.WriteFile(resolv, []byte("nameserver 127.0.0.1"), 0o600)); err != nil {
				t.Fatal(err)
			}
			backup := func(i int) string { return filepath.Join(p.dirs[i], imageroot.ResolvBackup) }
			removeFlags := func(r *Root, keep bool) error {
				return r.Flags(func() error { return errors.Join(r.dir.Remove(flags[0]), r.dir.Remove(flags[1])) }, keep, flags...)
			}
			p.edit(func(i int, r *Root) error {
				return errors.Join(r.InstallCA(ca), r.SwapResolvConf(resolv, backup(i)), removeFlags(r, true))
			})
			var undo [2]func() error
			for i := range p.dirs {
				r := p.open(i)
				defer r.Close()
				var err error
				if undo[i], err = r.EnsureTmp(); err != nil {
					t.Fatal(err)
				}
			}
			p.work(func(r *os.Root) error {
				if b, err := r.ReadFile("etc/resolv.conf"); err != nil || string(b) != "nameserver 127.0.0.1" {
					t.Errorf("resolv.conf in the shell: %q %v", b, err)
				}
				if _, err := r.Lstat("var/tmp/complete"); err == nil {
					t.Error("a stale flag is seen")
				}
				return c.work(r)
			})
			var boot [2]string
			p.edit(func(i int, r *Root) error {
				_, err := r.RestoreResolvConf(backup(i))
				if err := errors.Join(err, removeFlags(r, false), undo[i](), r.ProtectImageDir()); err != nil {
					return err
				}
				b, err := r.FindBoot(imageroot.BootNames{Kernel: "vmlinuz", Initrd: "initrd"})
				if (err != nil) != strings.HasPrefix(name, "no boot: ") {
					t.Errorf("%s: boot files: %v", kinds[i], err)
				}
				if err != nil {
					boot[i] = err.Error()
					return nil
				}
				defer b.Close()
				for _, f := range []*imageroot.BootFile{b.Kernel, b.Initrd} {
					content := make([]byte, f.Size)
					if _, err := f.ReadAt(content, 0); err != nil {
						return err
					}
					boot[i] += fmt.Sprintf("%s %s %q\n", f.Path, strings.TrimSuffix(f.Resolved, " (deleted)"), content)
				}
				return nil
			})
			if boot[0] != boot[1] {
				t.Errorf("boot files:\n%s\n%s", boot[0], boot[1])
			}
			p.same()
			p.noTrace()
		})
	}
}

// noTrace fails when the upper layer holds what the image does, too.
func (p *pair) noTrace() {
	p.t.Helper()
	r := p.open(1)
	defer r.Close()
	for _, name := range p.upper() {
		n, err := r.find(name)
		if err != nil {
			p.t.Fatal(err)
		}
		if n.upper == nil || isDir(n.upper) || n.lower == nil {
			continue
		}
		if same, err := r.unchanged(n); err != nil || same && n.upper.Nlink == 1 {
			p.t.Errorf("left in the upper layer: %s %v", name, err)
		}
	}
}

// An edit that changes nothing leaves nothing, and a root without boot files says
// what there is.
func TestNoTrace(t *testing.T) {
	p := newPair(t, append([]string{"file boot/initrd-6 0600 other", "dir etc/cray/ca", "file etc/cray/ca/crt 0644 PEM"}, plain...)...)
	ca, resolv := t.TempDir(), filepath.Join(t.TempDir(), "resolv.conf")
	if err := errors.Join(os.WriteFile(filepath.Join(ca, "crt"), []byte("PEM"), 0o600), os.WriteFile(resolv, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	var complaints [2]string
	p.edit(func(i int, r *Root) error {
		backup := filepath.Join(p.dirs[i], imageroot.ResolvBackup)
		undo, err := r.EnsureTmp()
		if err != nil {
			return err
		}
		if err := r.CheckBoot(imageroot.BootNames{Kernel: "vmlinuz", Initrd: "initrd"}); err != nil {
			return err
		}
		_, err = r.FindBoot(imageroot.BootNames{Kernel: "vmlinuz", Initrd: "initrd-7"})
		complaints[i] = fmt.Sprint(err)
		if err := r.CheckBoot(imageroot.BootNames{Kernel: "vmlinuz", Initrd: "initrd-7"}); fmt.Sprint(err) != complaints[i] {
			t.Errorf("the check says %v", err)
		}
		_, rerr := r.RestoreResolvConf(backup)
		err = errors.Join(r.InstallCA(ca), r.SwapResolvConf(resolv, backup), rerr)
		_, rerr = r.RestoreResolvConf(backup)
		return errors.Join(err, rerr, undo(), r.Flags(func() error { return nil }, false, "tmp/complete", "no/such/way"))
	})
	if complaints[0] != complaints[1] || !strings.Contains(complaints[1], "initrd-6") {
		t.Errorf("errors:\n%s\n%s", complaints[0], complaints[1])
	}
	if left := p.upper(); len(left) > 0 {
		t.Errorf("left in the upper layer: %q", left)
	}
	a, b := filepath.Join(p.dirs[0], "image-root"), filepath.Join(p.dirs[1], layout.Upper)
	var x, y unix.Stat_t
	if err := errors.Join(unix.Stat(a, &x), unix.Stat(b, &y)); err != nil || x.Mode != y.Mode || x.Mtim != y.Mtim {
		t.Errorf("the root itself: %v %v %v", x, y, err)
	}
	p.same()
}
