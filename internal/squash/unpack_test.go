// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// edgeTree is plainTree and what only root can make.
func edgeTree(t testing.TB) string {
	t.Helper()
	testkit.NeedRoot(t)
	dir := brokenTree(t)
	lines := []string{
		"char dev/null 1 3 0666", "block dev/sda1 8 1 0660", "char dev/wide 4000 1000000 0600", "owner dev/sda1 0:6",
		"file bin/ping 04755 ping", "owner bin/ping 0:0", "mode bin/ping 04755",
		"xattr bin/ping security.capability=0x0100000200200000000000000000000000000000",
		"file bin/sg 02755 sg", "owner bin/sg 12:34567", "mode bin/sg 02755", "dir tmp 01777", "dir secret 0000", "file secret/key 0000 k",
		"owner secret 4294967294:65536", "owner many 1000:1000", "dir setgid 02775", "mode setgid 02775",
		"symlink owned target", "owner owned 7:8", "xattr owned trusted.link=on a symlink", "mtime owned 1234567890",
		"xattr etc trusted.dir=on a directory", "xattr run/fifo trusted.fifo=on a fifo", "xattr dev/null security.x=on a device",
		"mtime run/fifo 1000000000", "mtime dev/null 1000000001", "mtime . 1111111111", "mtime etc/empty 4294967295", "mtime etc/empty.d 0",
		"hardlink run/fifo2 run/fifo",
	}
	// One value in many places, many on one inode, and an empty one.
	shared := strings.Repeat("shared value ", 50)
	for i := range 20 {
		lines = append(lines, fmt.Sprintf("xattr many/file-%04d user.shared=%s", i, shared))
	}
	for i := range 30 {
		lines = append(lines, fmt.Sprintf("xattr usr/lib/big user.n%02d=value %d", i, i))
	}
	lines = append(lines, "xattr usr/lib/text user.empty=", "xattr usr/lib/text trusted.t=t")
	for i := range 300 {
		lines = append(lines, fmt.Sprintf("file ids/%d 0644 x", i), fmt.Sprintf("owner ids/%d %d:%d", i, i+100000, i+200000))
	}
	treekit.Make(t, dir, lines...)
	return dir
}

// unpackTo unpacks an image with options into a new directory.
func unpackTo(t testing.TB, img *Image, opt UnpackOptions) (string, UnpackStats) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	st, err := Unpack(context.Background(), img, dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	return dir, st
}

// blocksOf returns how many 512-byte blocks a file takes.
func blocksOf(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

func TestUnpackUnprivileged(t *testing.T) {
	dir := brokenTree(t)
	img := openImage(t, mksquashfs(t, dir))
	var calls int
	out, st := unpackTo(t, img, UnpackOptions{Progress: func(done, total int64) {
		if calls++; done > total {
			t.Errorf("%d of %d bytes done", done, total)
		}
	}})
	treekit.Equal(t, dir, out, treekit.Seconds)
	if calls == 0 || st.Files != 613 || st.HardLinks != 2 || st.Symlinks != 6 || st.Specials != 2 || st.Dirs != 9 {
		t.Errorf("%d progress calls, stats %+v", calls, st)
	}
	if st.Written >= st.Bytes {
		t.Errorf("holes were written: stats %+v", st)
	}
	for name, most := range map[string]int64{"hole": 0, "zero": 0, "sparse": 300 * 2} {
		if n := blocksOf(t, filepath.Join(out, "usr/lib", name)); n > most {
			t.Errorf("%s takes %d blocks, want %d at most", name, n, most)
		}
	}
}

// Every option that changes the layout, judged by comparing the unpacked tree
// with the one that was packed.
func TestUnpackMksquashfs(t *testing.T) {
	dir := edgeTree(t)
	for _, args := range [][]string{
		{}, {"-b", "4096"}, {"-b", "1M", "-always-use-fragments"}, {"-no-fragments"}, {"-always-use-fragments"},
		{"-comp", "zstd"}, {"-comp", "xz"}, {"-comp", "lz4"}, {"-comp", "lzo"}, {"-comp", "lzma"}, {"-comp", "xz", "-Xbcj", "x86,arm"},
		{"-noI", "-noD", "-noF", "-noX", "-noId"},
		{"-no-exports", "-nopad", "-no-duplicates"}, {"-no-sparse"},
	} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			if slices.Contains(args, "-Xbcj") && !strings.HasPrefix(xzImplementation, "liblzma") {
				t.Skip("filters need liblzma")
			}
			img := openImage(t, mksquashfs(t, dir, args...))
			if err := Verify(t.Context(), img, false); err != nil {
				t.Fatal(err)
			}
			out, _ := unpackTo(t, img, UnpackOptions{Workers: 3})
			treekit.Equal(t, dir, out, treekit.Seconds)
		})
	}
}

func TestUnpackNoXattrs(t *testing.T) {
	dir := edgeTree(t)
	img := openImage(t, mksquashfs(t, dir, "-no-xattrs"))
	if err := Verify(t.Context(), img, false); err != nil {
		t.Fatal(err)
	}
	out, _ := unpackTo(t, img, UnpackOptions{})
	treekit.Equal(t, dir, out, treekit.Seconds, treekit.NoXattrs)
}

// An image mksquashfs appended a second tree to has dead blocks and tables.
func TestUnpackAppended(t *testing.T) {
	dir := edgeTree(t)
	path := mksquashfs(t, dir)
	more := t.TempDir()
	treekit.Make(t, more, "data new 0644 300000 random:9", "file small 0600 s", "hardlink again small")
	run(t, "mksquashfs", more, path, "-quiet", "-no-progress", "-no-recovery", "-root-becomes", "old")
	img := openImage(t, path)
	if err := Verify(t.Context(), img, false); err != nil {
		t.Fatal(err)
	}
	out, _ := unpackTo(t, img, UnpackOptions{})
	treekit.Equal(t, dir, filepath.Join(out, "old"), treekit.Seconds)
}

func TestUnpackGensquashfs(t *testing.T) {
	testkit.NeedTool(t, "gensquashfs")
	dir := edgeTree(t)
	for _, args := range [][]string{{}, {"-c", "zstd"}, {"-c", "xz"}, {"-b", "4096"}, {"-T"}, {"-e"}} {
		t.Run(fmt.Sprint(args), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.sqsh")
			run(t, "gensquashfs", append([]string{"-q", "-x", "-k", "-D", dir}, append(args, path)...)...)
			img := openImage(t, path)
			if err := Verify(t.Context(), img, false); err != nil {
				t.Fatal(err)
			}
			// gensquashfs loses hard links and the root's owner and time, so
			// unsquashfs is the judge here.
			want := filepath.Join(t.TempDir(), "root")
			testkit.NeedTool(t, "unsquashfs")
			run(t, "unsquashfs", "-quiet", "-no-progress", "-dest", want, path)
			out, _ := unpackTo(t, img, UnpackOptions{})
			treekit.Equal(t, want, out, treekit.Seconds)
		})
	}
}

// The kernel is the judge of what the fs.FS shows and of what is unpacked.
func TestUnpackKernel(t *testing.T) {
	dir := edgeTree(t)
	testkit.NeedTool(t, "mount", "umount")
	path := mksquashfs(t, dir)
	mnt := t.TempDir()
	if out, err := exec.Command("mount", "-t", "squashfs", "-o", "loop,ro", path, mnt).CombinedOutput(); err != nil {
		if testkit.InCI() {
			t.Fatalf("mount: %v: %s", err, out)
		}
		t.Skipf("this machine cannot mount: %v: %s", err, out)
	}
	t.Cleanup(func() { run(t, "umount", mnt) })
	out, _ := unpackTo(t, openImage(t, path), UnpackOptions{})
	treekit.Equal(t, mnt, out)
}

func TestUnpackLargeDirectory(t *testing.T) {
	n := 5000
	dir := t.TempDir()
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("a rather long name for a file, number %06d", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	img := openImage(t, mksquashfs(t, dir))
	root, err := img.Root()
	if err != nil {
		t.Fatal(err)
	}
	if root.indexCount == 0 {
		t.Fatal("mksquashfs made no directory index")
	}
	if err := Verify(t.Context(), img, true); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 255, 256, 257, 2500, n - 1} {
		if _, err := img.Stat(fmt.Sprintf("a rather long name for a file, number %06d", i)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"a", "a rather long name for a file, number 002500x", "z", "A"} {
		if _, err := img.Stat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	out, _ := unpackTo(t, img, UnpackOptions{})
	treekit.Equal(t, dir, out, treekit.Seconds)
}

func TestUnpackRefusals(t *testing.T) {
	img := openImage(t, mksquashfs(t, plainTree(t)))
	full := t.TempDir()
	treekit.Make(t, full, "file precious 0644 x")
	_, err := Unpack(t.Context(), img, full, UnpackOptions{})
	if err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("into a directory that is not empty: %v", err)
	}
	if left, _ := os.ReadDir(full); len(left) != 1 {
		t.Errorf("%d entries where one was", len(left))
	}
	missing := filepath.Join(t.TempDir(), "root")
	if _, err = Unpack(t.Context(), img, missing, UnpackOptions{MaxBytes: 1 << 20}); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("more than the limit: %v", err)
	}
	if _, err := os.Lstat(missing); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was written: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if _, err = Unpack(ctx, img, missing, UnpackOptions{}); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
}

// mountTmpfs mounts a tmpfs until the test ends.
func mountTmpfs(t testing.TB, options string) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "umount")
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, options); err != nil {
		if testkit.InCI() {
			t.Fatalf("mount a tmpfs: %v", err)
		}
		t.Skipf("this machine cannot mount: %v", err)
	}
	t.Cleanup(func() { run(t, "umount", mnt) })
	return mnt
}

// Values larger than a metadata block, which ext4 cannot hold.
func TestUnpackLargeXattrs(t *testing.T) {
	mnt := mountTmpfs(t, "")
	dir := filepath.Join(mnt, "source")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		for j := range 5 {
			value := bytes.Repeat([]byte{byte(i / 4), byte(j)}, 30000+100*j)
			if err := unix.Lsetxattr(name, fmt.Sprintf("trusted.large%d", j), value, 0); err != nil {
				t.Skipf("this tmpfs has no large extended attributes: %v", err)
			}
		}
	}
	for _, args := range [][]string{{}, {"-noX"}, {"-comp", "zstd"}} {
		img := openImage(t, mksquashfs(t, dir, args...))
		if err := Verify(t.Context(), img, false); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(mnt, "root"+strings.Join(args, ""))
		if _, err := Unpack(t.Context(), img, out, UnpackOptions{}); err != nil {
			t.Fatal(err)
		}
		treekit.Equal(t, dir, out, treekit.Seconds)
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// That the content cannot fit is found before anything is written; what ends
// for want of room later, here because files take whole pages, names the file.
// No file stays open.
func TestUnpackNoSpace(t *testing.T) {
	img := openImage(t, mksquashfs(t, plainTree(t)))
	st, err := img.survey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ options, want string }{
		{"size=1m", fmt.Sprintf("at least %d bytes are needed, the volume has 1048576 left: free space, or unpack to another volume; nothing was written", st.Written)},
		{"nr_inodes=300", "inodes are needed, the volume has 29"},
		{fmt.Sprintf("size=%d", st.Written+64<<10), "it stopped after"},
	} {
		mnt := mountTmpfs(t, c.options)
		before := openFDs(t)
		_, err := Unpack(t.Context(), img, filepath.Join(mnt, "root"), UnpackOptions{})
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.options, err)
		}
		if after := openFDs(t); after != before {
			t.Errorf("%s: %d files open, %d were before", c.options, after, before)
		}
	}
}

// Directories that give new files other modes than those asked for.
func TestUnpackDefaultACL(t *testing.T) {
	dir := plainTree(t)
	out := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	// acl(5) as the kernel stores it: version 2; u::rwx, g::---, o::---.
	acl := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x04\x00\x00\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	if err := unix.Setxattr(out, "system.posix_acl_default", []byte(acl), 0); err != nil {
		t.Skipf("this file system has no ACLs: %v", err)
	}
	if _, err := Unpack(t.Context(), openImage(t, mksquashfs(t, dir)), out, UnpackOptions{}); err != nil {
		t.Fatal(err)
	}
	treekit.Equal(t, dir, out, treekit.Seconds, treekit.NoXattrs) // the ACL itself stays
}

// Duplicates of files whose fragments were done with batches ago.
func TestUnpackStrays(t *testing.T) {
	dir := t.TempDir()
	for i := range 2000 {
		n := i
		if i >= 1000 && i%20 == 0 {
			n -= 1000
		}
		content := bytes.Repeat(fmt.Append(nil, n, " "), 100)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d", i)), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, st := unpackTo(t, openImage(t, mksquashfs(t, dir, "-b", "4096")), UnpackOptions{})
	treekit.Equal(t, dir, out, treekit.Seconds)
	if st.Files != 2000 {
		t.Errorf("%d files, want 2000", st.Files)
	}
}
