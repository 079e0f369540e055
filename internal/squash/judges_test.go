// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// kernelMount mounts an image read-only until the test ends.
func kernelMount(t testing.TB, image string) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "mount")
	dir := t.TempDir()
	run(t, "mount", "-t", "squashfs", "-o", "loop,ro,nodev,nosuid", image, dir)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// judge has the kernel, unsquashfs, our own reader and rdsquashfs read an
// image, which must give them the tree at want.
func judge(t *testing.T, image, want string) {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "unsquashfs", "rdsquashfs")
	expect, err := treekit.Take(want)
	if err != nil {
		t.Fatal(err)
	}
	compare := func(judge, dir string, opts ...treekit.Option) {
		t.Helper()
		got, err := treekit.Take(dir)
		if err != nil {
			t.Errorf("%s: %v", judge, err)
			return
		}
		for _, d := range expect.Diff(got, append(opts, treekit.Seconds)...) {
			t.Errorf("%s: %s", judge, d)
		}
	}
	compare("kernel", kernelMount(t, image))

	// unsquashfs in a list, too: it reads the tables another way, and says
	// "FATAL" where it otherwise goes on.
	run(t, "unsquashfs", "-ll", image)
	dir := filepath.Join(t.TempDir(), "unsquashfs")
	run(t, "unsquashfs", "-no-progress", "-quiet", "-strict-errors", "-dest", dir, image)
	compare("unsquashfs", dir)

	dir = filepath.Join(t.TempDir(), "unpack")
	if _, err := Unpack(t.Context(), openImage(t, image), dir, UnpackOptions{}); err != nil {
		t.Errorf("our own reader: %v", err)
	}
	compare("our own reader", dir)

	// rdsquashfs 1.2.0 knows no hard links when unpacking, sets no xattrs on
	// symlinks and cannot quote every name: a listing without error will do.
	if out, err := exec.Command("rdsquashfs", "-d", image).CombinedOutput(); err != nil {
		t.Errorf("rdsquashfs: %v\n%s", err, out)
	}
}

// onDisk writes an image to a file.
func (o *memOut) onDisk(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.sqsh")
	if err := os.WriteFile(path, o.b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
