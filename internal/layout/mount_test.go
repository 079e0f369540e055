// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

const root = "image-root"

// volume is a job's volume with an image of these lines, packed by the real tool.
func volume(t *testing.T, options []string, lines ...string) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "mksquashfs")
	origin, parent := t.TempDir(), t.TempDir()
	tree.Make(t, origin, lines...)
	args := append([]string{origin, filepath.Join(parent, Image), "-no-progress", "-quiet"}, options...)
	if out, err := exec.Command("mksquashfs", args...).CombinedOutput(); err != nil {
		t.Fatalf("mksquashfs: %v\n%s", err, out)
	}
	for _, dir := range []string{root, Upper, Work} {
		if err := os.Mkdir(filepath.Join(parent, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { checkNoLoop(t, parent) })
	return parent
}

// checkNoLoop fails when a loop device of the volume's image is left.
func checkNoLoop(t *testing.T, parent string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), parent) {
			t.Errorf("a loop device is left: %s", f)
		}
	}
	if b, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(b), parent) {
		t.Errorf("a mount is left, or: %v", err)
	}
}

func TestMount(t *testing.T) {
	parent := volume(t, nil, "file etc/old 0644 old", "file etc/gone 0644 x", "hardlink etc/link etc/old")
	m, err := Mount(parent, filepath.Join(parent, root))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", m.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := errors.Join(r.WriteFile("etc/link", []byte("changed"), 0), r.Remove("etc/gone")); err != nil {
		t.Fatal(err)
	}
	if b, err := r.ReadFile("etc/old"); err != nil || string(b) != "changed" {
		t.Errorf("the other name reads %q, %v", b, err)
	}
	if list, err := os.ReadDir(filepath.Join(parent, root)); err != nil || len(list) > 0 {
		t.Errorf("the mount is attached: %v %v", list, err)
	}
	r.Close()
	m.Close()
	checkNoLoop(t, parent)
	if b, err := os.ReadFile(filepath.Join(parent, Upper, "etc/link")); err != nil || string(b) != "changed" {
		t.Errorf("upper layer: %q, %v", b, err)
	}
}

func TestProbe(t *testing.T) {
	for name, c := range map[string]struct {
		options []string
		spoil   func(parent string) error
		want    string
	}{
		"fit":             {nil, nil, ""},
		"no export table": {[]string{"-no-exports"}, nil, "names of a file would come apart"},
		"no image":        {nil, func(p string) error { return os.Remove(filepath.Join(p, Image)) }, "no such file"},
		"damaged image":   {nil, func(p string) error { return os.Truncate(filepath.Join(p, Image), 50) }, "mount the image"},
	} {
		t.Run(name, func(t *testing.T) {
			parent := volume(t, c.options, "dir etc", "file etc/old 0644 old")
			if c.spoil != nil {
				if err := c.spoil(parent); err != nil {
					t.Fatal(err)
				}
			}
			err := Probe(parent, filepath.Join(parent, root))
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			for _, dir := range []string{root, Upper, Work} {
				if list, err := os.ReadDir(filepath.Join(parent, dir)); err != nil || len(list) > 0 {
					t.Errorf("%s: %v %v", dir, list, err)
				}
			}
			if _, err := os.Stat(filepath.Join(parent, probeDir)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("left by the probe: %v", err)
			}
		})
	}
}

// A volume that is no good for an upper layer is found out.
func TestProbeUnfit(t *testing.T) {
	image := volume(t, nil, "file etc/old 0644 old")
	parent := t.TempDir()
	if err := unix.Mount("ramfs", parent, "ramfs", 0, "mode=0755"); err != nil { // without attributes
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(parent, 0); err != nil {
			t.Error(err)
		}
	}()
	b, err := os.ReadFile(filepath.Join(image, Image))
	if err := errors.Join(err, os.WriteFile(filepath.Join(parent, Image), b, 0o600), os.Mkdir(filepath.Join(parent, root), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := Probe(parent, filepath.Join(parent, root)); err == nil {
		t.Error("fit, it says")
	} else {
		t.Log(err)
	}
}
