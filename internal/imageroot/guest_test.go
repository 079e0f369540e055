// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

const mtimes = "2020-02-02T02:02:02.123456789Z"

// configMap makes what a kubelet mounts: names that link to ..data, which
// links to a dated directory.
func configMap(t *testing.T, extra ...string) string {
	t.Helper()
	dir := t.TempDir()
	tree.Make(t, dir, append([]string{
		"file ..2024_05_05_05_05_05.123/certificate_authority.crt 0644 PEM",
		"symlink ..data ..2024_05_05_05_05_05.123",
		"symlink certificate_authority.crt ..data/certificate_authority.crt",
	}, extra...)...)
	return dir
}

func TestInstallCA(t *testing.T) {
	testkit.NeedRoot(t) // files must belong to root
	secret := canary(t)
	r := open(t, "dir etc 0755")
	src := configMap(t, "symlink stolen "+secret, "file plain.crt 0600 PLAIN", "dir subdir", "fifo pipe")
	if err := os.Remove(filepath.Join(src, "stolen")); err != nil {
		t.Fatal(err)
	}
	if err := r.InstallCA(src); err != nil {
		t.Fatal(err)
	}
	first := take(t, r.Name())
	names := 0
	for name, e := range first {
		if strings.HasPrefix(name, "etc/cray/ca/") {
			names++
			if e.Mode&0o7777 != 0o644 || e.UID != 0 {
				t.Errorf("%s: mode %o owner %d", name, e.Mode, e.UID)
			}
		}
	}
	if names != 2 {
		t.Errorf("%d entries in etc/cray/ca, want the two files: %v", names, first)
	}
	for _, dir := range []string{"etc/cray", "etc/cray/ca"} {
		if first[dir].Mode&0o7777 != 0o755 {
			t.Errorf("%s: mode %o", dir, first[dir].Mode)
		}
	}
	if err := r.InstallCA(src); err != nil {
		t.Fatal(err)
	}
	same(t, first, take(t, r.Name()))
}

func TestInstallCAHostileImage(t *testing.T) {
	outside := t.TempDir()
	for name, lines := range map[string][]string{
		"ca is a link out":     {"symlink etc/cray/ca " + outside},
		"cray is a link out":   {"symlink etc/cray " + outside},
		"etc is a link out":    {"symlink etc " + outside},
		"file is a link out":   {"dir etc/cray/ca", "symlink etc/cray/ca/certificate_authority.crt " + outside + "/x"},
		"inside, but absolute": {"dir usr/etc", "symlink etc /usr/etc"},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, lines...)
			err := r.InstallCA(configMap(t))
			if left := take(t, outside); len(left) != 1 {
				t.Errorf("written outside the image: %v", left)
			}
			if strings.HasPrefix(name, "inside") && err != nil {
				t.Error(err)
			}
			if err != nil && !strings.Contains(err.Error(), "source image") {
				t.Errorf("no next step: %v", err)
			}
		})
	}
}

// TestInstallCAFromHostileMount: a link in the mount is followed inside it only.
func TestInstallCAFromHostileMount(t *testing.T) {
	r := open(t, "dir etc")
	if err := r.InstallCA(configMap(t, "symlink evil.crt "+canary(t))); err == nil {
		t.Error("a link out of the mount was followed")
	}
	if err := r.InstallCA(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "ConfigMap") {
		t.Errorf("%v", err)
	}
}

// resolvCases are the forms /etc/resolv.conf has in real images.
var resolvCases = map[string][]string{
	"file":          {"file etc/resolv.conf 0640 nameserver 1.1.1.1", "mtime etc/resolv.conf " + mtimes},
	"absent":        {"dir etc"},
	"dangling link": {"symlink etc/resolv.conf /run/systemd/resolve/stub-resolv.conf", "mtime etc/resolv.conf " + mtimes},
	"relative link": {"file run/netconfig/resolv.conf 0644 x", "symlink etc/resolv.conf ../run/netconfig/resolv.conf"},
	"empty file":    {"file etc/resolv.conf 0644"},
	"hard link":     {"file etc/resolv.conf 0644 x", "hardlink etc/other etc/resolv.conf"},
	"directory":     {"file etc/resolv.conf/a 0644 x", "mtime etc/resolv.conf " + mtimes},
	"fifo":          {"fifo etc/resolv.conf"},
	"etc is a link": {"file usr/etc/resolv.conf 0644 x", "symlink etc /usr/etc"},
}

// container writes the resolv.conf of the sidecar's container.
func container(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(file, []byte("nameserver 10.0.0.10\n"), 0o600))
	return file
}

func backup(r *Root) string { return filepath.Join(filepath.Dir(r.Name()), ResolvBackup) }

// TestResolvConfRoundTrip: after a job without changes the tree is the same to
// the nanosecond, and nothing is left beside it.
func TestResolvConfRoundTrip(t *testing.T) {
	for name, lines := range resolvCases {
		t.Run(name, func(t *testing.T) {
			r := open(t, append(lines, "dir tmp 1777", "mtime etc "+mtimes)...)
			resolv := container(t)
			before := take(t, filepath.Dir(r.Name()))
			if err := r.SwapResolvConf(resolv, backup(r)); err != nil {
				t.Fatal(err)
			}
			f, err := r.OpenRegular("/etc/resolv.conf")
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, f); got != "nameserver 10.0.0.10\n" {
				t.Errorf("inside the image: %q", got)
			}
			f.Close()
			if kept, err := r.RestoreResolvConf(backup(r)); err != nil || kept {
				t.Fatalf("kept %v, %v", kept, err)
			}
			after := take(t, filepath.Dir(r.Name()))
			delete(before, ".")
			delete(after, ".")
			same(t, before, after)
			if kept, err := r.RestoreResolvConf(backup(r)); err != nil || kept {
				t.Errorf("a second restore: %v %v", kept, err)
			}
		})
	}
}

// TestResolvConfXattrs also checks owner and security attributes, which need root.
func TestResolvConfXattrs(t *testing.T) {
	testkit.NeedRoot(t)
	r := open(t, "file etc/resolv.conf 0604 x", "owner etc/resolv.conf 12:34", "xattr etc/resolv.conf trusted.a=b", "xattr etc/resolv.conf user.c=0x00ff")
	resolv := container(t)
	before := take(t, r.Name())
	if err := r.SwapResolvConf(resolv, backup(r)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.RestoreResolvConf(backup(r)); err != nil {
		t.Fatal(err)
	}
	same(t, before, take(t, r.Name()))
}

// TestResolvConfUserChanges: what the user does to the injected file.
func TestResolvConfUserChanges(t *testing.T) {
	for name, c := range map[string]struct {
		act  func(t *testing.T, root string)
		kept bool
		want string // what lies at /etc/resolv.conf in the end
	}{
		"untouched": {func(*testing.T, string) {}, false, "file:original"},
		"removed": {func(t *testing.T, root string) {
			must(t, os.Remove(filepath.Join(root, "etc/resolv.conf")))
		}, false, "file:original"},
		"tmp emptied": {func(t *testing.T, root string) {
			must(t, os.RemoveAll(filepath.Join(root, "tmp")))
		}, false, "file:original"},
		"rewritten": {func(t *testing.T, root string) {
			must(t, os.WriteFile(filepath.Join(root, "etc/resolv.conf"), []byte("mine"), 0o600))
		}, true, "file:mine"},
		"made a link": {func(t *testing.T, root string) {
			must(t, os.Remove(filepath.Join(root, "etc/resolv.conf")))
			must(t, os.Symlink("/run/x", filepath.Join(root, "etc/resolv.conf")))
		}, true, "link:/run/x"},
		"made a directory": {func(t *testing.T, root string) {
			must(t, os.Remove(filepath.Join(root, "etc/resolv.conf")))
			must(t, os.Mkdir(filepath.Join(root, "etc/resolv.conf"), 0o755))
		}, true, "dir"},
		"etc removed": {func(t *testing.T, root string) {
			must(t, os.RemoveAll(filepath.Join(root, "etc")))
		}, true, "gone"},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, "file etc/resolv.conf 0644 original", "dir tmp 1777")
			resolv := container(t)
			must(t, r.SwapResolvConf(resolv, backup(r)))
			c.act(t, r.Name())
			kept, err := r.RestoreResolvConf(backup(r))
			if err != nil || kept != c.kept {
				t.Errorf("kept %v, %v", kept, err)
			}
			if got := describe(filepath.Join(r.Name(), "etc/resolv.conf")); got != c.want {
				t.Errorf("in the end %s, want %s", got, c.want)
			}
			if left, _ := filepath.Glob(backup(r) + "*"); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func describe(path string) string {
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return "gone"
	case info.IsDir():
		return "dir"
	case info.Mode()&os.ModeSymlink != 0:
		target, _ := os.Readlink(path)
		return "link:" + target
	}
	data, _ := os.ReadFile(path)
	return "file:" + string(data)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestResolvConfSwapTwice: a sidecar that was killed after the swap and runs
// again must not take the injected file for the image's own.
func TestResolvConfSwapTwice(t *testing.T) {
	r := open(t, "file etc/resolv.conf 0644 original")
	resolv := container(t)
	before := take(t, r.Name())
	for range 2 {
		must(t, r.SwapResolvConf(resolv, backup(r)))
	}
	if _, err := r.RestoreResolvConf(backup(r)); err != nil {
		t.Fatal(err)
	}
	same(t, before, take(t, r.Name()))
}

func TestResolvConfOddContainers(t *testing.T) {
	r := open(t, "file etc/resolv.conf 0644 original")
	before := take(t, filepath.Dir(r.Name()))
	must(t, r.SwapResolvConf("/nonexistent/resolv.conf", backup(r)))
	same(t, before, take(t, filepath.Dir(r.Name())))
	// A backup that cannot be made must leave the image as it was.
	resolv := container(t)
	if err := r.SwapResolvConf(resolv, "/nonexistent/dir/backup"); err == nil {
		t.Error("no backup, and no error")
	}
	same(t, before, take(t, filepath.Dir(r.Name())))
}

// TestResolvConfDoesNotWriteOut: etc and resolv.conf lead to the container's files.
func TestResolvConfDoesNotWriteOut(t *testing.T) {
	secret := canary(t)
	r := open(t, "symlink etc/resolv.conf "+secret)
	resolv := container(t)
	must(t, r.SwapResolvConf(resolv, backup(r)))
	if data, _ := os.ReadFile(secret); string(data) != "CANARY" {
		t.Errorf("the container's file now holds %q", data)
	}
	if _, err := r.RestoreResolvConf(backup(r)); err != nil {
		t.Fatal(err)
	}
	r2 := open(t, "symlink etc "+filepath.Dir(secret))
	if err := r2.SwapResolvConf(resolv, backup(r2)); err == nil {
		t.Error("an /etc outside the image was used")
	}
}

func TestProtectImageDir(t *testing.T) {
	testkit.NeedRoot(t)
	r := open(t, "file image/config.xml 0644 secret", "file image/run.sh 0644 #!/bin/sh", "file image/sub/deep.sh 0755 x", "file image/sub/set 4755 x",
		"dir image/sub 0755", "dir image 0777", "symlink image/out /etc/passwd", "symlink image/etc /etc", "file etc/passwd 0644 x", "dir etc 0755",
		"owner image/config.xml 1000:1000", "fifo image/pipe 0666")
	must(t, r.ProtectImageDir())
	got := take(t, r.Name())
	for name, mode := range map[string]uint32{
		"image": 0o700, "image/config.xml": 0o600, "image/run.sh": 0o700, "image/sub": 0o700, "image/sub/deep.sh": 0o700, "image/sub/set": 0o600,
		"image/pipe": 0o666, "etc/passwd": 0o644, "etc": 0o755,
	} {
		if got[name].Mode&0o7777 != mode {
			t.Errorf("%s: mode %o, want %o", name, got[name].Mode&0o7777, mode)
		}
	}
	if got["image/config.xml"].UID != 0 {
		t.Errorf("owner %d", got["image/config.xml"].UID)
	}
	must(t, r.ProtectImageDir())
	same(t, got, take(t, r.Name()))
}

func TestProtectImageDirLink(t *testing.T) {
	outside := t.TempDir()
	tree.Make(t, outside, "file secret.xml 0644 x", "dir . 0755")
	before := take(t, outside)
	for _, lines := range [][]string{{"symlink image " + outside}, {"symlink image /etc", "file etc/passwd 0644 x"}, {"file image 0644 x"}, {"dir etc"}} {
		r := open(t, lines...)
		inside := take(t, r.Name())
		must(t, r.ProtectImageDir())
		same(t, inside, take(t, r.Name()))
	}
	same(t, before, take(t, outside))
}

func TestEnsureTmp(t *testing.T) {
	r := open(t, "dir etc", "mtime . "+mtimes)
	before := take(t, r.Name())
	undo, err := r.EnsureTmp()
	must(t, err)
	if got := take(t, r.Name())["tmp"].Mode & 0o7777; got != 0o1777 {
		t.Errorf("/tmp has mode %o", got)
	}
	must(t, undo())
	same(t, before, take(t, r.Name()))

	undo, err = r.EnsureTmp()
	must(t, err)
	tree.Make(t, r.Name(), "file tmp/used 0644 x")
	must(t, undo())
	if _, err := os.Stat(filepath.Join(r.Name(), "tmp/used")); err != nil {
		t.Errorf("the user's file: %v", err)
	}

	for _, lines := range [][]string{{"dir tmp 0700"}, {"symlink tmp /var/tmp", "dir var/tmp"}} {
		r := open(t, lines...)
		before := take(t, r.Name())
		undo, err := r.EnsureTmp()
		must(t, err)
		must(t, undo())
		same(t, before, take(t, r.Name()))
	}
	outside := t.TempDir()
	for _, lines := range [][]string{{"symlink tmp " + outside + "/new"}, {"file tmp 0644 x"}} {
		if _, err := open(t, lines...).EnsureTmp(); err == nil || !strings.Contains(err.Error(), "source image") {
			t.Errorf("%q: %v", lines, err)
		}
	}
}
