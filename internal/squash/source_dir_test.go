// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// between is a source whose tree is tampered with when the walk is over, or
// when it comes to a path.
type between struct {
	Source
	at     string // empty: after the walk
	tamper func()
}

func (b between) Walk(ctx context.Context, fn func(*Entry) error) error {
	err := b.Source.Walk(ctx, func(e *Entry) error {
		if e.Path == b.at {
			b.tamper()
		}
		return fn(e)
	})
	if b.at == "" {
		b.tamper()
	}
	return err
}

// A file that does not hold still is an error that names it; what it has
// become, be it a link to a secret or a fifo, is never read.
func TestDirSourceChanges(t *testing.T) {
	check := func(t testing.TB, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tamper := range map[string]func(t testing.TB, f string){
		"grows": func(t testing.TB, f string) {
			h, err := os.OpenFile(f, os.O_APPEND|os.O_WRONLY, 0)
			check(t, err)
			_, err = h.WriteString("more")
			check(t, err)
			check(t, h.Close())
		},
		"shrinks":     func(t testing.TB, f string) { check(t, os.Truncate(f, 3)) },
		"is emptied":  func(t testing.TB, f string) { check(t, os.Truncate(f, 0)) },
		"is removed":  func(t testing.TB, f string) { check(t, os.Remove(f)) },
		"gets a mode": func(t testing.TB, f string) { check(t, os.Chmod(f, 0o600)) },
		"is replaced": func(t testing.TB, f string) {
			b, err := os.ReadFile(f)
			check(t, err)
			check(t, os.WriteFile(f+".new", b, 0o644))
			check(t, os.Rename(f+".new", f))
		},
		"becomes a symlink": func(t testing.TB, f string) {
			check(t, os.Rename(f, f+".old"))
			check(t, os.Symlink(filepath.Base(f)+".old", f))
		},
		"becomes a fifo": func(t testing.TB, f string) {
			check(t, os.Remove(f))
			check(t, unix.Mkfifo(f, 0o644))
		},
		"becomes a directory": func(t testing.TB, f string) {
			check(t, os.Remove(f))
			check(t, os.Mkdir(f, 0o755))
		},
		"has its directory removed": func(t testing.TB, f string) { check(t, os.RemoveAll(filepath.Dir(f))) },
		"has its directory replaced by a symlink": func(t testing.TB, f string) {
			check(t, os.Rename(filepath.Dir(f), filepath.Dir(f)+".old"))
			check(t, os.Symlink(filepath.Base(filepath.Dir(f))+".old", filepath.Dir(f)))
		},
	} {
		for _, kind := range []string{"small", "large"} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				dir := t.TempDir()
				treekit.Make(t, dir, "file a", "data d/e/small 0644 5000 random:1", "data d/e/large 0644 500000 random:1",
					"mtime d/e/small 1000000000.5", "mtime d/e/large 1000000000.5", "file z")
				victim := filepath.Join(dir, "d/e", kind)
				src := between{Source: dirSourceOf(t, dir, DirOptions{}), tamper: func() { tamper(t, victim) }}
				_, err := Pack(t.Context(), src, &memOut{}, Options{})
				if !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "d/e") {
					t.Errorf("error %v", err)
				}
			})
		}
	}
}

// writeDuring is a content that is written to after its first block was read.
type writeDuring struct {
	Content
	write func()
}

type writeDuringReader struct {
	ContentReader
	write func()
}

func (w writeDuring) Open() (ContentReader, error) {
	r, err := w.Content.Open()
	return writeDuringReader{r, w.write}, err
}

func (w writeDuringReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.ContentReader.ReadAt(p, off)
	if off == 0 {
		w.write()
	}
	return n, err
}

type contents struct {
	Source
	wrap func(*Entry)
}

func (c contents) Walk(ctx context.Context, fn func(*Entry) error) error {
	return c.Source.Walk(ctx, func(e *Entry) error {
		c.wrap(e)
		return fn(e)
	})
}

func TestDirSourceWrittenWhileRead(t *testing.T) {
	for _, size := range []int{10, 300000} {
		dir := t.TempDir()
		treekit.Make(t, dir, fmt.Sprintf("data log 0644 %d text", size), "mtime log 1000000000")
		src := contents{dirSourceOf(t, dir, DirOptions{}), func(e *Entry) {
			if e.Content != nil {
				e.Content = writeDuring{e.Content, func() {
					f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY, 0)
					if err == nil {
						_, err = f.WriteAt([]byte("X"), 5) // size stays
					}
					if err := errors.Join(err, f.Close()); err != nil {
						t.Error(err)
					}
				}}
			}
		}}
		if _, err := Pack(t.Context(), src, &memOut{}, Options{}); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "log: ") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// Between its name being listed and it being opened, a directory becomes a
// link to one with a secret.
func TestDirSourceDirectorySwap(t *testing.T) {
	outside := t.TempDir()
	treekit.Make(t, outside, "file secret")
	dir := t.TempDir()
	treekit.Make(t, dir, "dir d")
	src := between{Source: dirSourceOf(t, dir, DirOptions{}), at: "d", tamper: func() {
		if err := errors.Join(os.Remove(filepath.Join(dir, "d")), os.Symlink(outside, filepath.Join(dir, "d"))); err != nil {
			t.Error(err)
		}
	}}
	out := &memOut{}
	if _, err := Pack(t.Context(), src, out, Options{}); !errors.Is(err, ErrChanged) {
		t.Errorf("error %v", err)
	}
}

// No file stays open, whatever happens.
func TestDirSourceCloses(t *testing.T) {
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("needs /proc: ", err)
		}
		return len(fds)
	}
	dir := t.TempDir()
	for i := range 50 {
		treekit.Make(t, dir, fmt.Sprintf("data %d/large 0644 1000000 random:%d", i, i), fmt.Sprintf("data %d/small 0644 1000 random:%d", i, i))
	}
	before := open()
	for _, victim := range []string{"", "0/large", "25/small", "25/large", "49/small"} {
		src, err := DirSource(dir, DirOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = Pack(t.Context(), between{Source: src, tamper: func() {
			if victim != "" {
				os.Truncate(filepath.Join(dir, victim), 17)
			}
		}}, &memOut{}, Options{})
		if (err != nil) != (victim != "") {
			t.Errorf("%s: %v", victim, err)
		}
		if err := src.Close(); err != nil {
			t.Error(err)
		}
		if n := open(); n != before {
			t.Errorf("%s: %d files open, %d before", victim, n, before)
		}
	}
}

func TestDirSourceExclude(t *testing.T) {
	dir := t.TempDir()
	treekit.Make(t, dir, "file keep/a", "file keep/tmp", "file tmp/b", "symlink l tmp")
	src := dirSourceOf(t, dir, DirOptions{Exclude: func(p string) bool { return p == "tmp" || strings.HasSuffix(p, "/a") }})
	out, _ := packMem(t, src, Options{})
	var got []string
	if err := fs.WalkDir(out.image(t), ".", func(p string, _ fs.DirEntry, err error) error {
		got = append(got, p)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := []string{".", "keep", "keep/tmp", "l"}; !slices.Equal(got, want) {
		t.Errorf("packed %q, want %q", got, want)
	}
}

func TestDirSourceTwice(t *testing.T) {
	src := dirSourceOf(t, plainTree(t), DirOptions{})
	epoch := time.Unix(1<<30, 0)
	first, _ := packMem(t, src, Options{Epoch: &epoch})
	if second, _ := packMem(t, src, Options{Epoch: &epoch}); !bytes.Equal(first.b, second.b) {
		t.Errorf("%d bytes, then %d", len(first.b), len(second.b))
	}
}

func TestDirSourceErrors(t *testing.T) {
	dir := t.TempDir()
	treekit.Make(t, dir, "file f")
	for _, p := range []string{filepath.Join(dir, "absent"), filepath.Join(dir, "f")} {
		if _, err := DirSource(p, DirOptions{}); err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", p, err)
		}
	}
}

// mounted mounts a file system, or a bind, below a test directory.
func mounted(t *testing.T, args ...string) {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "mount")
	run(t, "mount", args...)
	dir := args[len(args)-1]
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

func TestDirSourceOneFileSystem(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	treekit.Make(t, dir, "file etc/conf", "dir proc 0555", "dir bound", "file other/x")
	mounted(t, "-t", "tmpfs", "-o", "mode=0700", "none", filepath.Join(dir, "proc"))
	mounted(t, "--bind", filepath.Join(dir, "other"), filepath.Join(dir, "bound")) // the same device
	treekit.Make(t, dir, "file proc/inside")

	out, st := packMem(t, dirSourceOf(t, dir, DirOptions{OneFileSystem: true}), Options{})
	want := []string{"bound: mount point, packed as an empty directory", "proc: mount point, packed as an empty directory"}
	if !slices.Equal(st.Warnings, want) || st.Inodes != 7 {
		t.Errorf("%d inodes, warnings %q", st.Inodes, st.Warnings)
	}
	for _, p := range []string{"bound/x", "proc/inside"} {
		if _, err := out.image(t).Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if out, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{}); true {
		if _, err := out.image(t).Lstat("proc/inside"); err != nil {
			t.Errorf("all file systems: %v", err)
		}
	}

	mounted(t, "--bind", "/dev/null", filepath.Join(dir, "etc/conf"))
	_, err := Pack(t.Context(), dirSourceOf(t, dir, DirOptions{OneFileSystem: true}), &memOut{}, Options{})
	if err == nil || !strings.Contains(err.Error(), "etc/conf: another file is mounted over it") {
		t.Errorf("error %v", err)
	}
}

func TestOtherMount(t *testing.T) {
	const d, f = unix.S_IFDIR, unix.S_IFREG
	for i, c := range []struct {
		root, st unix.Statx_t
		want     bool
	}{
		{unix.Statx_t{Mask: statMask, Mnt_id: 1}, unix.Statx_t{Mask: statMask, Mnt_id: 1, Mode: d, Dev_minor: 9}, false}, // btrfs subvolume
		{unix.Statx_t{Mask: statMask, Mnt_id: 1}, unix.Statx_t{Mask: statMask, Mnt_id: 2, Mode: f}, true},
		{unix.Statx_t{Dev_minor: 1}, unix.Statx_t{Dev_minor: 1, Mode: d}, false},
		{unix.Statx_t{Dev_minor: 1}, unix.Statx_t{Dev_minor: 2, Mode: d}, true},
		{unix.Statx_t{Dev_minor: 1}, unix.Statx_t{Dev_minor: 2, Mode: f}, false},
	} {
		if got := otherMount(&c.root, &c.st); got != c.want {
			t.Errorf("case %d: %v", i, got)
		}
	}
}

// Attributes that the caller does not want are left out, and can be asked for.
func TestDropXattr(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	treekit.Make(t, dir, "file a", "file b", "xattr a security.selinux=label", "xattr a user.mine=1", "xattr b user.mine=2")
	label := func(name string) bool { return name == "security.selinux" }
	for _, drop := range []func(string) bool{nil, label} {
		out, _ := packMem(t, dirSourceOf(t, dir, DirOptions{DropXattr: drop}), Options{})
		img := out.image(t)
		if has, err := img.HasXattr(label); err != nil || has != (drop == nil) {
			t.Errorf("label: %t, %v", has, err)
		}
		if has, err := img.HasXattr(func(name string) bool { return name == "user.mine" }); err != nil || !has {
			t.Errorf("user's: %t, %v", has, err)
		}
		if has, err := img.HasXattr(func(name string) bool { return name == "user.other" }); err != nil || has {
			t.Errorf("nobody's: %t, %v", has, err)
		}
	}
}

// What overlayfs keeps in its layers is not the image's.
func TestDirSourceOverlay(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	treekit.Make(t, dir, "file lower/etc/a", "file lower/usr/b", "hardlink lower/usr/c lower/usr/b", "dir upper", "dir work", "dir merged")
	at := func(p string) string { return filepath.Join(dir, p) }
	mounted(t, "-t", "overlay", "-o", "lowerdir="+at("lower")+",upperdir="+at("upper")+",workdir="+at("work"), "overlay", at("merged"))
	if err := errors.Join(os.RemoveAll(at("merged/etc")), os.Mkdir(at("merged/etc"), 0o755)); err != nil {
		t.Fatal(err)
	}
	treekit.Make(t, at("merged"), "file etc/new", "xattr etc user.mine=1")
	if n, err := unix.Lgetxattr(at("upper/etc"), "trusted.overlay.opaque", nil); err != nil || n == 0 {
		t.Fatalf("the upper layer has no overlay attribute to leave out: %v", err)
	}
	image, _ := packDir(t, at("merged"), Options{})
	judge(t, image, at("merged"))

	out, _ := packMem(t, dirSourceOf(t, at("upper"), DirOptions{}), Options{})
	img := out.image(t)
	ino, err := img.resolve("etc", true)
	if err != nil {
		t.Fatal(err)
	}
	if xs, err := img.Xattrs(ino); err != nil || len(xs) != 1 || xs[0].Name != "user.mine" {
		t.Errorf("xattrs of the layer: %v, %v", xs, err)
	}
}

// A volume that fills up, or must fill up: nothing is left on it, and an older
// image stays.
func TestPackFileVolumeFull(t *testing.T) {
	testkit.NeedRoot(t)
	dir, volume := plainTree(t), t.TempDir()
	treekit.Make(t, dir, "data large 0644 40000000 zero")
	mounted(t, "-t", "tmpfs", "-o", "size=1m", "none", volume)
	path := filepath.Join(volume, "image.sqsh")
	treekit.Make(t, volume, "file image.sqsh 0644 old")
	pack := func(want string) {
		t.Helper()
		_, err := PackFile(t.Context(), dirSourceOf(t, dir, DirOptions{}), path, Options{})
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v", err)
		}
		left, err := os.ReadDir(volume)
		old, _ := os.ReadFile(path)
		if err != nil || len(left) != 1 || string(old) != "old" {
			t.Errorf("left on the volume: %v, %v, an image %q", left, err, old)
		}
	}
	pack("bytes are needed, the volume has 1044480 left for an image of")
	if err := os.Truncate(filepath.Join(dir, "large"), 0); err != nil {
		t.Fatal(err)
	}
	pack("the image needs about")
}

// Large directories inside each other come sorted, also when their names do not
// fit in memory, as often as they are walked.
func TestDirSourceManyNames(t *testing.T) {
	dir := t.TempDir()
	at := dir
	for range 3 {
		for i := range 300 {
			name := filepath.Join(at, fmt.Sprintf("%d-%s", i*7919%300, strings.Repeat("n", 100+i%100)))
			if err := os.WriteFile(name, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		at = filepath.Join(at, "3-directory")
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	walk := func(src Source) (paths []string) {
		if err := src.Walk(t.Context(), func(e *Entry) error {
			paths = append(paths, e.Path)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return paths
	}
	want := walk(dirSourceOf(t, dir, DirOptions{}))
	src := dirSourceOf(t, dir, DirOptions{held: 1, SpoolDir: t.TempDir()})
	for range 2 {
		if got := walk(src); !slices.Equal(got, want) || len(want) != 1+3*301 {
			t.Errorf("%d names, want %d and the same", len(got), len(want))
		}
	}
	one, _ := packMem(t, src, Options{held: 1})
	other, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{})
	if diff := sameImage(t, one.image(t), other.image(t)); len(diff) > 0 {
		t.Error(diff)
	}
}

// Directories are held open on the way down, and closed.
func TestDirSourceDeep(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	const depth = 700 // longer than PATH_MAX
	for range depth {
		if err := unix.Mkdirat(fd, "directory", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := openDir(fd, "directory")
		unix.Close(fd)
		if fd = next; err != nil {
			t.Fatal(err)
		}
	}
	f, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(f, []byte("bottom")); err != nil {
		t.Fatal(err)
	}
	unix.Close(f)
	out, st := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{})
	if st.Inodes != depth+2 {
		t.Errorf("%d inodes", st.Inodes)
	}
	if err := Verify(t.Context(), out.image(t), false); err != nil {
		t.Error(err)
	}
}
