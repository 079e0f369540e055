// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// unpacked lays an image out, with an index.
func unpacked(t testing.TB, img *Image) (dir, index string) {
	t.Helper()
	work := t.TempDir()
	dir, index = filepath.Join(work, "root"), filepath.Join(work, "index")
	if _, err := Unpack(t.Context(), img, dir, UnpackOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := WriteIndex(t.Context(), img, dir, index); err != nil {
		t.Fatal(err)
	}
	return dir, index
}

func indexed(t testing.TB, dir, index string, img *Image) Source {
	t.Helper()
	x, err := OpenIndex(index, img)
	if err != nil {
		t.Fatal(err)
	}
	return dirSourceOf(t, dir, DirOptions{Index: x})
}

// Without a change nothing is compressed, and nothing is even read: the content
// of the files on disk is not what the image holds.
func TestDeltaOfNothing(t *testing.T) {
	origin := deltaTree(t)
	image, st := packDir(t, origin, Options{BlockSize: MinBlockSize, Compressor: Zstd})
	base := openImage(t, image)
	dir, index := unpacked(t, base)
	src := indexed(t, dir, index, base)
	err := src.Walk(t.Context(), func(e *Entry) error {
		if _, ok := e.Content.(*baseContent); e.Content != nil && !ok {
			return fmt.Errorf("%s would be read", e.Path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for l, img := range layoutsOf(t, src, base, nil) {
		if diff := sameImage(t, img, base); len(diff) > 0 {
			t.Errorf("%v: %s", l, strings.Join(diff, "\n"))
		}
		if got := img.Info().BytesUsed; got > st.BytesOut {
			t.Errorf("%v: grew from %d to %d bytes", l, st.BytesOut, got)
		}
	}
	out, st := packMem(t, src, Options{Base: &Base{Image: base}})
	if b := st.Base; b.Layout != LayoutAppend || b.DeadBytes != 0 || b.Files != st.Files || b.Bytes != st.BytesIn || st.Compressor != Zstd || st.BlockSize != MinBlockSize {
		t.Errorf("%+v of %+v", b, st)
	}
	judge(t, out.onDisk(t), dir)
}

// The volume fills up with what is taken over from the base, while new blocks
// are being written behind it.
func TestDeltaNoSpace(t *testing.T) {
	old := memFile("old", noise(1<<20))
	out, _ := packMem(t, memSource{old}, Options{BlockSize: MinBlockSize})
	base := out.image(t)
	src := memSource{}
	for i := range 200 {
		src = append(src, memFile(fmt.Sprintf("new%03d", i), noise(2*MinBlockSize+i)))
	}
	info, err := base.Lstat("old")
	if err != nil {
		t.Fatal(err)
	}
	old.Content = &baseContent{img: base, ref: info.Sys().(*Inode).ref}
	_, err = Pack(t.Context(), append(src, old), slowlyFull{&memOut{}, int64(base.sb.InodeTable)}, Options{Base: &Base{Image: base, Layout: LayoutAppend}})
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("error %v", err)
	}
	// Noise takes what it is long, and what is taken over says nothing of the rest.
	_, forecast, _ := strings.Cut(err.Error(), "the image needs about ")
	var need int64
	if _, err := fmt.Sscan(strings.TrimSuffix(strings.Fields(forecast + " ?")[0], ":"), &need); err != nil {
		t.Fatalf("%v in %q", err, forecast)
	}
	if want := int64(base.sb.InodeTable) + 200*2*MinBlockSize + 200*199/2; need < want || need > want+want/100 {
		t.Errorf("it is said to need %d bytes, not %d", need, want)
	}
}

// slowlyFull is a volume where writing before an offset takes its time, and fails.
type slowlyFull struct {
	*memOut
	room int64
}

func (f slowlyFull) WriteAt(p []byte, off int64) (int, error) {
	if len(p) > 0 && off >= superblockSize && off < f.room {
		time.Sleep(20 * time.Millisecond)
		return 0, unix.ENOSPC
	}
	return f.memOut.WriteAt(p, off)
}

// Directories with an index stand in the way of reading the inodes one by one.
func TestDeltaLargeDirectories(t *testing.T) {
	origin := t.TempDir()
	var lines []string
	for i := range 3000 {
		lines = append(lines, fmt.Sprintf("file d%d/%s%d 0644 %d", i%3, strings.Repeat("n", 40), i, i))
	}
	treekit.Make(t, origin, lines...)
	for _, image := range []string{packFileOf(t, origin, Options{}), mksquashfs(t, origin)} {
		base := openImage(t, image)
		dir, index := unpacked(t, base)
		if err := os.Remove(filepath.Join(dir, "d1", strings.Repeat("n", 40)+"1")); err != nil {
			t.Fatal(err)
		}
		out, st := packMem(t, indexed(t, dir, index, base), Options{Base: &Base{Image: base}})
		if st.Base.Bytes != st.BytesIn {
			t.Errorf("%+v of %+v", st.Base, st)
		}
		judge(t, out.onDisk(t), dir)
	}
}

// What was written again with the same content, renamed, linked or given other
// metadata costs nothing; what is new is compressed.
func TestDeltaReuse(t *testing.T) {
	origin := deltaTree(t)
	base := openImage(t, packFileOf(t, origin, Options{BlockSize: MinBlockSize}))
	dir, index := unpacked(t, base)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"big", "usr/lib/deep/er/d3", "etc/conf5"} { // installed again
		b, err := os.ReadFile(at(name))
		if err == nil {
			err = os.WriteFile(at(name+".dpkg-new"), b, 0o600)
		}
		if err == nil {
			err = os.Rename(at(name+".dpkg-new"), at(name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Rename(at("usr/lib/deep"), at("usr/shallow")), os.Link(at("tail"), at("etc/tail")), os.Chmod(at("two"), 0o700),
		os.Chtimes(at("exact"), time.Time{}, time.Unix(5, 0)), unix.Setxattr(at("zero"), "user.new", nil, 0),
		os.WriteFile(at("new"), noise(3*MinBlockSize), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	src := indexed(t, dir, index, base)
	for _, l := range []Layout{LayoutAppend, LayoutCompact} {
		out, st := packMem(t, src, Options{Base: &Base{Image: base, Layout: l}})
		b := st.Base
		if fresh := st.BytesIn - b.Bytes; fresh != 3*MinBlockSize || b.DeadBytes != 0 {
			t.Errorf("%v: %d bytes were compressed, want the new file's %d: %+v", l, fresh, 3*MinBlockSize, b)
		}
		judge(t, out.onDisk(t), dir)
	}
}

// With no index and no layer everything is read, and nothing is compressed that
// the base has.
func TestDeltaWithoutIndex(t *testing.T) {
	origin := deltaTree(t)
	for _, image := range []string{mksquashfs(t, origin, "-b", "4096", "-comp", "xz"), gensquashfs(t, origin, "-b", "4096", "-c", "lz4")} {
		base := openImage(t, image)
		out, st := packMem(t, dirSourceOf(t, origin, DirOptions{}), Options{Base: &Base{Image: base}})
		if st.Base.Refused != "" || st.Base.Bytes != st.BytesIn {
			t.Errorf("%+v of %+v", st.Base, st)
		}
		judge(t, out.onDisk(t), origin)
	}
}

// Where blocks of the base cannot stand in the new image, it is said, and the
// image is made all the same, also from the base's own content.
func TestDeltaRefused(t *testing.T) {
	origin := deltaTree(t)
	base := openImage(t, mksquashfs(t, origin, "-b", "4096", "-comp", "xz"))
	dict := openImage(t, mksquashfs(t, origin, "-comp", "xz", "-Xdict-size", "32K"))
	lzo := openImage(t, mksquashfs(t, origin, "-b", "4096", "-comp", "lzo"))
	for _, c := range []struct {
		base *Image
		opt  Options
		want string
	}{
		{base, Options{Compressor: Zstd}, "compressed with xz, the new image with zstd"},
		{base, Options{BlockSize: 8192}, "blocks of 4096 bytes, the new image of 8192"},
		{dict, Options{DictSize: 64 << 10}, "dictionaries of 32768 bytes, the new image of 65536"},
		{lzo, Options{}, "compressed with lzo, the new image with gzip"},
	} {
		dir, index := unpacked(t, c.base)
		c.opt.Base = &Base{Image: c.base}
		out, st := packMem(t, indexed(t, dir, index, c.base), c.opt)
		if st.Base == nil || !strings.Contains(st.Base.Refused, c.want) || st.Base.CopiedBytes != 0 {
			t.Errorf("%+v, want %q", st.Base, c.want)
		}
		judge(t, out.onDisk(t), dir)
	}
}

// A chain of customizations, each of another small part, stays within the bound
// of dead data, in size too, and every link of it verifies.
func TestDeltaChain(t *testing.T) {
	for _, maker := range []string{"ours", "gensquashfs"} {
		origin := t.TempDir()
		var lines []string
		for i := range 300 {
			lines = append(lines, fmt.Sprintf("data d%d/f%d 0644 %d random:%d", i%7, i, 200+i*37, i))
		}
		treekit.Make(t, origin, lines...)
		image := packFileOf(t, origin, Options{BlockSize: MinBlockSize})
		if maker != "ours" {
			image = gensquashfs(t, origin, "-b", "4096")
		}
		layouts := map[Layout]int{}
		for i := range 50 {
			base := openImage(t, image)
			dir, index := unpacked(t, base)
			for j := range 3 {
				n := (i*3 + j) * 2 % 300
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("d%d/f%d", n%7, n)), noise(200+n*37+i), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			path, st := packSource(t, indexed(t, dir, index, base), Options{Base: &Base{Image: base}})
			layouts[st.Base.Layout]++
			if share := float64(st.Base.DeadBytes) / float64(st.BytesOut); share > maxDead {
				t.Errorf("link %d: %.0f %% of the image is dead", i, 100*share)
			}
			img := openImage(t, path)
			if err := Verify(t.Context(), img, false); err != nil {
				t.Fatalf("link %d: %v", i, err)
			}
			full, fst := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{BlockSize: MinBlockSize})
			if diff := sameImage(t, img, full.image(t)); len(diff) > 0 {
				t.Fatalf("link %d: %q", i, diff)
			}
			if float64(st.BytesOut) > 1.15*float64(fst.BytesOut) {
				t.Errorf("link %d: %d bytes, a full image has %d", i, st.BytesOut, fst.BytesOut)
			}
			image = path
		}
		if layouts[LayoutAppend] < 25 || layouts[LayoutCompact] == 0 {
			t.Errorf("layouts: %v", layouts)
		}
	}
}

// Promise: a write is caught even in the tick of the clock in which the index was
// made, where it leaves no trace in size, mtime or ctime.
func TestIndexRacy(t *testing.T) {
	origin := t.TempDir()
	treekit.Make(t, origin, "file a 0644 before")
	base := openImage(t, packFileOf(t, origin, Options{}))
	dir, index := unpacked(t, base)
	x, err := OpenIndex(index, base)
	if err != nil {
		t.Fatal(err)
	}
	stat := func() (st unix.Statx_t) {
		if err := unix.Statx(unix.AT_FDCWD, filepath.Join(dir, "a"), 0, statMask, &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	was := stat()
	if x.unchanged(&was) == nil {
		t.Fatal("the file is not known although the clock has moved on")
	}
	for _, c := range []struct {
		after time.Duration
		known bool
	}{{0, false}, {clockTick, false}, {clockTick + 1, true}, {time.Hour, true}, {-time.Hour, false}} {
		x.clock = ctimeOf(&was).add(c.after)
		if got := x.unchanged(&was) != nil; got != c.known {
			t.Errorf("with the index made %v after the last change: known %v, want %v", c.after, got, c.known)
		}
	}
	x.clock = changeTime{} // a file system without unnamed files: nothing is trusted
	if x.unchanged(&was) != nil {
		t.Error("known without a clock")
	}
	// Whole seconds could hide a write for longer.
	was.Ctime.Nsec = 0
	copy(x.records[8:], ctimeOf(&was).append(nil))
	if x.clock = ctimeOf(&was).add(time.Second); x.unchanged(&was) != nil {
		t.Error("known one second later on a file system of whole seconds")
	}

	// The same with real writes, as quickly as they can be made.
	for i := range 50 {
		image := openImage(t, packFileOf(t, origin, Options{}))
		dir, index := unpacked(t, image)
		name := filepath.Join(dir, "a")
		info, err := os.Stat(name)
		if err == nil {
			err = os.WriteFile(name, []byte("after!"), 0o644)
		}
		if err == nil {
			err = os.Chtimes(name, time.Time{}, info.ModTime())
		}
		if err != nil {
			t.Fatal(err)
		}
		out, _ := packMem(t, indexed(t, dir, index, image), Options{Base: &Base{Image: image}})
		f, err := out.image(t).Open("a")
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 6)
		if _, err := f.Read(b); err != nil || string(b) != "after!" {
			t.Fatalf("try %d: the image holds %q: %v", i, b, err)
		}
	}
}

// An index is a stranger's, too.
func TestIndexRefused(t *testing.T) {
	origin := deltaTree(t)
	base := openImage(t, packFileOf(t, origin, Options{BlockSize: MinBlockSize}))
	other := openImage(t, packFileOf(t, origin, Options{BlockSize: 8192}))
	dir, index := unpacked(t, base)
	good, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(name string, b []byte, img *Image, want string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "index")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenIndex(path, img); !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)/2] ^= 1
	refused("empty", nil, base, "no index")
	refused("short", good[:len(good)-1], base, "no index")
	refused("cut at a record", good[:len(good)-indexRecordSize], base, "damaged")
	refused("flipped", flipped, base, "damaged")
	refused("of another image", good, other, "another image")
	if _, err := OpenIndex(filepath.Join(dir, "missing"), base); !errors.Is(err, ErrIndex) || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if info, err := os.Stat(index); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}

	// A tree that is not what the image holds cannot be indexed.
	if err := os.WriteFile(filepath.Join(dir, "big"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WriteIndex(t.Context(), base, dir, index); err == nil || !strings.Contains(err.Error(), "big: is not what the image holds") {
		t.Error(err)
	}

	// References that lead anywhere make files unknown, and nothing else.
	x, err := OpenIndex(filepath.Join(filepath.Dir(index), "index"), base)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(x.records); at += indexRecordSize {
		copy(x.records[at+20:], "\xff\xff\xff\xff\x00\x00\x00\x00")
	}
	src := dirSourceOf(t, dir, DirOptions{Index: x})
	full, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{BlockSize: MinBlockSize})
	for l, got := range layoutsOf(t, src, base, nil) {
		if diff := sameImage(t, got, full.image(t)); len(diff) > 0 {
			t.Errorf("%v: %q", l, diff)
		}
	}
}
