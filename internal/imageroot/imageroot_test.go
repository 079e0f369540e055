// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

// open makes an image root of lines in a parent directory of its own.
func open(t *testing.T, lines ...string) *Root {
	t.Helper()
	parent := t.TempDir()
	tree.Make(t, parent, "dir image-root")
	path := filepath.Join(parent, "image-root")
	tree.Make(t, path, lines...)
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// canary is a file of the container that no image may reach.
func canary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client-secret")
	if err := os.WriteFile(path, []byte("CANARY"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, f io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func take(t *testing.T, dir string) tree.Snapshot {
	t.Helper()
	s, err := tree.Take(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func same(t *testing.T, before, after tree.Snapshot) {
	t.Helper()
	if d := before.Diff(after); len(d) > 0 {
		t.Errorf("the tree changed:\n%s", strings.Join(d, "\n"))
	}
}

// TestRootIsALink: in plain mode the user can replace the image root with a
// link to the sidecar's own "/".
func TestRootIsALink(t *testing.T) {
	dir := t.TempDir()
	tree.Make(t, dir, "symlink image-root /")
	if r, err := Open(filepath.Join(dir, "image-root")); err == nil {
		r.Close()
		t.Error("a link was opened as an image root")
	}
}

func TestOpenRegular(t *testing.T) {
	secret := canary(t)
	for name, c := range map[string]struct {
		lines []string
		want  string // content; empty: an error
		is    error
	}{
		"file":              {[]string{"file f 0644 hello"}, "hello", nil},
		"absolute link":     {[]string{"symlink f /etc/g", "file etc/g 0644 inside"}, "inside", nil},
		"dots stop":         {[]string{"symlink f ../../../../etc/g", "file etc/g 0644 inside"}, "inside", nil},
		"link to secret":    {[]string{"symlink f " + secret}, "", fs.ErrNotExist},
		"dots to secret":    {[]string{"symlink f ../../../../../.." + secret}, "", fs.ErrNotExist},
		"magic link":        {[]string{"symlink f /proc/self/root" + secret}, "", fs.ErrNotExist},
		"fifo":              {[]string{"fifo f"}, "", ErrNotRegular},
		"socket":            {[]string{"sock f"}, "", ErrNotRegular},
		"directory":         {[]string{"dir f"}, "", ErrNotRegular},
		"link to fifo":      {[]string{"fifo p", "symlink f /p"}, "", ErrNotRegular},
		"loop":              {[]string{"symlink f g", "symlink g f"}, "", unix.ELOOP},
		"file as directory": {[]string{"symlink f g/h", "file g"}, "", unix.ENOTDIR},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := open(t, c.lines...).OpenRegular("f")
			if c.want == "" {
				if err == nil {
					f.Close()
				}
				if !errors.Is(err, c.is) {
					t.Fatalf("error %v, want %v", err, c.is)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := read(t, f); got != c.want {
				t.Errorf("read %q, want %q", got, c.want)
			}
		})
	}
}

// TestMagicLinksAreRefused takes the machine's own / as the root, where /proc
// is a real one.
func TestMagicLinksAreRefused(t *testing.T) {
	r, err := Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if f, err := r.OpenRegular("/proc/self/exe"); err == nil {
		f.Close()
		t.Error("a magic link was followed")
	}
}

// TestSwappedWhileOpening races a directory against a link to the container's
// files; whatever is opened must be the image's.
func TestSwappedWhileOpening(t *testing.T) {
	secret := canary(t)
	r := open(t, "file real/client-secret 0644 image", "dir a", "symlink out "+filepath.Dir(secret))
	at := func(name string) string { return filepath.Join(r.Name(), name) }
	if err := os.Rename(at("real"), at("b")); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, at("b"), unix.AT_FDCWD, at("out"), unix.RENAME_EXCHANGE)
			}
		}
	}()
	opened := 0
	for range 3000 {
		f, err := r.OpenRegular("b/client-secret")
		if err != nil {
			continue
		}
		opened++
		if got := read(t, f); got != "image" {
			t.Fatalf("read %q from outside the image", got)
		}
		f.Close()
	}
	close(stop)
	<-done
	if opened == 0 {
		t.Error("nothing was ever opened: the race was not run")
	}
}

func TestRemoveAndTouchDoNotFollow(t *testing.T) {
	secret := canary(t)
	r := open(t, "symlink a "+secret, "symlink d "+filepath.Dir(secret), "symlink t "+secret+".new")
	if err := r.Remove("a"); err != nil {
		t.Error(err)
	}
	if err := r.Remove("d/client-secret"); err != nil {
		t.Error(err)
	}
	if err := r.Touch("t", 0o644); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(secret); err != nil {
		t.Errorf("the container's file: %v", err)
	}
	if _, err := os.Stat(secret + ".new"); err == nil {
		t.Error("a file was made in the container")
	}
	if ok, err := r.IsRegular("t"); !ok || err != nil {
		t.Errorf("touched file: %v %v", ok, err)
	}
}

func TestWrongUses(t *testing.T) {
	r := open(t, "dir d")
	if _, err := r.OpenFile("x", os.O_CREATE|os.O_WRONLY); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("O_CREATE: %v", err)
	}
	if err := r.Remove("/"); !errors.Is(err, unix.EISDIR) {
		t.Errorf("removing the root: %v", err)
	}
	if err := r.Remove("d"); !errors.Is(err, unix.EISDIR) {
		t.Errorf("removing a directory: %v", err)
	}
	if err := r.Touch("d", 0o644); err == nil {
		t.Error("touch on a directory succeeded")
	}
}
