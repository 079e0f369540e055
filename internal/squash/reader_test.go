// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"testing/fstest"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// mksquashfs packs dir with the given options and returns the image's path.
func mksquashfs(t testing.TB, dir string, args ...string) string {
	t.Helper()
	testkit.NeedTool(t, "mksquashfs")
	path := filepath.Join(t.TempDir(), "image.sqsh")
	run(t, "mksquashfs", append([]string{dir, path, "-noappend", "-quiet", "-no-progress", "-processors", "2"}, args...)...)
	return path
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// openImage opens the image at path until the test ends.
func openImage(t testing.TB, path string) *Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	img, err := Open(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// plainTree is what a user without root can make.
func plainTree(t testing.TB) string {
	dir := t.TempDir()
	treekit.Make(t, dir,
		"file etc/passwd 0644 root:x:0:0::/root:/bin/sh", "file etc/empty 0600",
		"dir etc/empty.d 0700",
		"symlink etc/mtab passwd", "symlink abs /etc/passwd", "symlink up ../../../../etc/passwd", "symlink dirlink etc",
		"data usr/lib/big 0755 1000000 random:1", "data usr/lib/text 0644 700001 text",
		"data usr/lib/exact 0644 262144 random:2", "data usr/lib/zero 0644 300000 zero",
		"data usr/lib/copy 0644 1000000 random:1",
		"sparse usr/lib/sparse 0644 5000000 2000000:island", "sparse usr/lib/hole 0644 400000",
		"hardlink usr/bin/a usr/lib/text", "hardlink usr/bin/b usr/lib/text",
		`file "odd/new\nline" 0644 x`, `file "odd/ leading" 0644 y`, `file "odd/\xff\xfe" 0644 z`,
		"file odd/"+string(bytes.Repeat([]byte("n"), 255))+" 0644 long",
		"mtime etc/passwd 2001-02-03T04:05:06Z", "mtime etc/mtab 1999-01-01T00:00:00Z", "mtime etc 1985-10-26T09:00:00Z",
	)
	for i := range 600 {
		treekit.Make(t, dir, fmt.Sprintf("file many/file-%04d 0644 content %d", i, i))
	}
	return dir
}

// brokenTree adds to plainTree what cannot be opened.
func brokenTree(t testing.TB) string {
	dir := plainTree(t)
	treekit.Make(t, dir, "symlink dangling nowhere", "symlink loop loop", "fifo run/fifo 0640", "sock run/sock 0777")
	return dir
}

func TestReaderFS(t *testing.T) {
	dir := plainTree(t)
	for _, args := range [][]string{
		{}, {"-b", "4096"}, {"-b", "1M"}, {"-no-fragments"}, {"-always-use-fragments"},
		{"-comp", "zstd"}, {"-comp", "xz"}, {"-comp", "lz4"}, {"-comp", "lz4", "-Xhc"}, {"-noI", "-noD", "-noF", "-noX"},
		{"-noId"}, {"-no-exports", "-nopad", "-no-xattrs"}, {"-Xcompression-level", "1"},
	} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			img := openImage(t, mksquashfs(t, dir, args...))
			for _, name := range []string{"usr/lib/big", "usr/lib/text", "usr/lib/exact", "usr/lib/sparse", "usr/lib/hole",
				"usr/lib/zero", "etc/empty", "dirlink/passwd", "many/file-0333"} {
				want, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil {
					t.Fatal(err)
				}
				got, err := fs.ReadFile(img, name)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
				}
			}
		})
	}
}

// TestFS reads every file byte by byte, so its tree is a small one.
func TestReaderConforms(t *testing.T) {
	dir := t.TempDir()
	treekit.Make(t, dir, "file etc/passwd 0644 root", "file etc/empty 0600", "dir etc/empty.d", "symlink etc/mtab passwd",
		"symlink abs /etc/passwd", "symlink dirlink etc", "data lib/data 0755 20000 random:1", "data lib/exact 0644 8192 text",
		"sparse lib/sparse 0644 30000 20000:island", "hardlink lib/copy lib/exact", `file "odd/new\nline" 0644 x`,
		`file "odd/\xff\xfe" 0644 z`)
	for i := range 300 {
		treekit.Make(t, dir, fmt.Sprintf("file many/a-longer-name-for-the-directory-index-%04d 0644 %d", i, i))
	}
	for _, args := range [][]string{{"-b", "4096"}, {"-no-fragments", "-b", "4096"}, {}} {
		img := openImage(t, mksquashfs(t, dir, args...))
		if err := fstest.TestFS(img, "etc/passwd", "lib/data", "many/a-longer-name-for-the-directory-index-0299",
			"odd/new\nline", "odd/\xff\xfe", "etc/mtab"); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestReaderSymlinks(t *testing.T) {
	img := openImage(t, mksquashfs(t, brokenTree(t)))
	for _, name := range []string{"abs", "up"} {
		got, err := fs.ReadFile(img, name)
		if err != nil || string(got) != "root:x:0:0::/root:/bin/sh" {
			t.Errorf("%s: %q, %v: want the image's own file", name, got, err)
		}
	}
	if _, err := img.Stat("dangling"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dangling: %v", err)
	}
	if _, err := img.Stat("loop"); err == nil {
		t.Error("loop: no error")
	}
	if _, err := img.Open("etc/passwd/x"); err == nil {
		t.Error("etc/passwd/x: no error")
	}
	if info, err := img.Lstat("loop"); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("lstat loop: %v, %v", info, err)
	}
}

func TestReaderSeek(t *testing.T) {
	dir := plainTree(t)
	img := openImage(t, mksquashfs(t, dir))
	want, err := os.ReadFile(filepath.Join(dir, "usr/lib/sparse"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := img.Open("usr/lib/sparse")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.(io.Seeker).Seek(-3000010, io.SeekEnd); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(got, want[len(want)-3000010:]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	buf := make([]byte, 100)
	if n, err := f.(io.ReaderAt).ReadAt(buf, int64(len(want))-40); n != 40 || err != io.EOF {
		t.Errorf("read across the end: %d, %v", n, err)
	}
}
