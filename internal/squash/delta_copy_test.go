// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// xfs is an empty file system whose files can share blocks.
func xfs(t *testing.T) string {
	t.Helper()
	testkit.NeedTool(t, "mkfs.xfs")
	disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 512<<20)); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", "-m", "reflink=1", disk)
	mounted(t, "-t", "xfs", "-o", "loop", disk, dir)
	return dir
}

// What is taken over takes no room where files can share blocks.
func TestDeltaSharesBlocks(t *testing.T) {
	dir := xfs(t)
	old := memFile("old", noise(8<<20))
	if _, err := PackFile(t.Context(), memSource{old}, filepath.Join(dir, "old.sqsh"), Options{}); err != nil {
		t.Fatal(err)
	}
	base := openImage(t, filepath.Join(dir, "old.sqsh"))
	info, err := base.Lstat("old")
	if err != nil {
		t.Fatal(err)
	}
	old.Content = &baseContent{img: base, ref: info.Sys().(*Inode).ref}
	free := func() int64 {
		t.Helper()
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		var st unix.Statfs_t
		if err := errors.Join(unix.Syncfs(int(d.Fd())), unix.Fstatfs(int(d.Fd()), &st)); err != nil {
			t.Fatal(err)
		}
		return int64(st.Bavail) * st.Bsize
	}
	before := free()
	path := filepath.Join(dir, "new.sqsh")
	st, err := PackFile(t.Context(), memSource{memFile("new", noise(100_000)), old}, path, Options{Base: &Base{Image: base}})
	if err != nil {
		t.Fatal(err)
	}
	if took := before - free(); st.Base.CopiedBytes < 8<<20 || took > 1<<20 {
		t.Errorf("an image of %d bytes, %d of them taken over, takes %d bytes", st.BytesOut, st.Base.CopiedBytes, took)
	}
	if err := Verify(t.Context(), openImage(t, path), false); err != nil {
		t.Error(err)
	}
}

// Runs longer than a step arrive whole, wherever they go, and out of memory.
func TestCopyRuns(t *testing.T) {
	dir := xfs(t)
	const size, shift = 3*copyStep + 12345, 777
	want := make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{})
	for off := 0; off < size; off += copyStep / 4 {
		rnd.Read(want[off:min(off+9000, size)])
	}
	name := filepath.Join(dir, "from")
	if err := os.WriteFile(name, want, 0o600); err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for _, runs := range [][]relocation{
		{{96, 96, size - 96}},
		{{1000, 96, 500}, {1000 + shift, 596, size - 1000 - shift}},
	} {
		to, err := os.OpenFile(filepath.Join(dir, "to"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer to.Close()
		r := reuse{base: &Image{r: from}, runs: runs}
		if err := r.copyRuns(t.Context(), to, true); err != nil {
			t.Fatal(err)
		}
		var page [1]byte
		if _, err := unix.Preadv2(int(to.Fd()), [][]byte{page[:]}, copyStep/2, unix.RWF_NOWAIT); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("what was copied first is in memory: %v", err)
		}
		for _, x := range runs {
			got := make([]byte, x.n)
			if _, err := to.ReadAt(got, x.to); err != nil || !bytes.Equal(got, want[x.from:x.from+x.n]) {
				t.Errorf("%+v: other bytes, %v", x, err)
			}
		}
	}
}
