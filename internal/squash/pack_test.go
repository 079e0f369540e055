// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The same tree and epoch make the same bytes, whatever the workers do.
func TestPackReproducible(t *testing.T) {
	dir := plainTree(t)
	epoch := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	var first *memOut
	for _, opt := range []Options{
		{Workers: 1}, {Workers: 2}, {Workers: 13}, {Workers: 3, MemoryLimit: 1}, {Workers: 1}, {Workers: 8, MemoryLimit: 3 << 20},
		{Workers: 2, held: 1}, {Workers: 4, held: 300},
	} {
		opt.Epoch, opt.BlockSize = &epoch, 16<<10
		out, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), opt)
		if first == nil {
			first = out
		} else if !bytes.Equal(first.b, out.b) {
			t.Errorf("%d workers, limit %d: another image", opt.Workers, opt.MemoryLimit)
		}
	}
	img := first.image(t)
	if got := int64(img.sb.ModTime); got != epoch.Unix() {
		t.Errorf("image time %d, want %d", got, epoch.Unix())
	}
	for name, want := range map[string]time.Time{
		"usr/lib/big": epoch, // newer than the epoch
		"etc/passwd":  time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC),
	} {
		if info, err := img.Lstat(name); err != nil || !info.ModTime().Equal(want) {
			t.Errorf("%s: %v, %v: want %v", name, info.ModTime(), err, want)
		}
	}
}

func TestPackReadBack(t *testing.T) {
	dir := plainTree(t)
	out, st := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{BlockSize: 8 << 10})
	img := out.image(t)
	names := 0
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		names++
		name, _ := filepath.Rel(dir, p)
		want, err := os.Lstat(p)
		if err != nil {
			return err
		}
		got, err := img.Lstat(name)
		if err != nil {
			return err
		}
		if got.Mode() != want.Mode() || got.ModTime().Unix() != want.ModTime().Unix() || d.Type().IsRegular() && got.Size() != want.Size() {
			t.Errorf("%s: %v, want %v", name, fs.FormatFileInfo(got), fs.FormatFileInfo(want))
		}
		if !d.Type().IsRegular() {
			return nil
		}
		wantBytes, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if gotBytes, err := fs.ReadFile(img, name); err != nil || !bytes.Equal(gotBytes, wantBytes) {
			t.Errorf("%s: other content, %v", name, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if st.Inodes != int64(names-2) { // two more names of usr/lib/text
		t.Errorf("%d inodes for %d names", st.Inodes, names)
	}
}

// Export table entries lead to the inodes with their numbers; nothing but NFS
// would notice otherwise.
func TestPackExportTable(t *testing.T) {
	out, st := packMem(t, dirSourceOf(t, plainTree(t), DirOptions{}), Options{})
	img := out.image(t)
	if root, err := img.Root(); err != nil || root.parent != uint32(st.Inodes)+1 {
		t.Errorf("the root's parent is %v, %v", root, err)
	}
	pointer := func(i uint32) int64 {
		return int64(le64(out.b[img.sb.ExportTable+uint64(i/1024)*8:]))
	}
	for n := uint32(0); n < uint32(st.Inodes); n++ {
		b, err := img.metaBlockAt(pointer(n), int64(img.sb.ExportTable))
		if err != nil {
			t.Fatal(err)
		}
		ino, err := img.inode(inodeRef(le64(b.data[n%1024*8:])))
		if err != nil || ino.Number != n+1 {
			t.Fatalf("export entry %d leads to inode %v, %v", n, ino, err)
		}
	}
}

func le64(b []byte) (v uint64) {
	for i := range 8 {
		v |= uint64(b[i]) << (8 * i)
	}
	return v
}

func TestPackDuplicates(t *testing.T) {
	const bs = DefaultBlockSize
	rng := rand.NewChaCha8([32]byte{1})
	random := func(n int) []byte {
		b := make([]byte, n)
		rng.Read(b)
		return b
	}
	altered := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at]++
		return b
	}
	small, large := random(5000), random(5*bs+99)
	src := memSource{
		memFile("a", large), memFile("b", small), memFile("c", altered(large, 3*bs)), memFile("d", large),
		memFile("e", altered(small, 4999)), memFile("f", small), memFile("g", altered(large, 0)), memFile("h", altered(large, 3*bs)),
		memFile("i", altered(large, 5*bs+98)), memFile("j", large[:2*bs]),
		// The same zeroes: once as a hole, once to be read.
		memHollow("k", 40*bs+1, "x"), memFile("l", append(make([]byte, 40*bs), 'x')), memFile("m", append(make([]byte, 40*bs), 'y')),
		memFile("r", slices.Concat(large[:bs], make([]byte, bs), large[bs:2*bs])),
		memFile("s", slices.Concat(large[:bs], large[bs:2*bs], make([]byte, bs))),
		memFile("t", make([]byte, 40*bs+1)), memHollow("u", 40*bs+1, ""), memFile("v", nil), memFile("w", nil),
	}
	out, st := packMem(t, src, Options{held: 1})
	if inMemory, _ := packMem(t, src, Options{}); !bytes.Equal(out.b[superblockSize:], inMemory.b[superblockSize:]) {
		t.Error("another image when the records of the tree are in memory")
	}
	if want := int64(5*bs+99)*2 + 5000 + (40*bs+1)*2; st.Duplicates != 5 || st.DuplicateBytes != want {
		t.Errorf("%d duplicates of %d bytes, want 5 of %d", st.Duplicates, st.DuplicateBytes, want)
	}
	if unique := int64(4*len(large) + 2*len(small) + 6*bs); st.BytesOut > unique+16<<10 {
		t.Errorf("image of %d bytes for %d different ones", st.BytesOut, unique)
	}
	img := out.image(t)
	for _, e := range src {
		r, _ := e.Content.Open()
		want := make([]byte, e.Size)
		if h, ok := r.(hollow); ok {
			copy(want[h.size-int64(len(h.data)):], h.data)
		} else {
			copy(want, r.(memContent))
		}
		if got, err := fs.ReadFile(img, e.Path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes of %d, %v", e.Path, len(got), len(want), err)
		}
	}
}

// What the format cannot hold is refused, by path and limit, or reported.
func TestPackLimits(t *testing.T) {
	link := func(n int) memSource {
		return memSource{{Path: "link", Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", n)}}
	}
	device := func(major, minor uint32) memSource {
		return memSource{{Path: "dev", Mode: unix.S_IFCHR, Major: major, Minor: minor}}
	}
	xattr := func(xs ...Xattr) memSource {
		return memSource{{Path: "x", Mode: unix.S_IFIFO, Xattrs: xs}}
	}
	for name, c := range map[string]struct {
		src  memSource
		opt  Options
		want string // in the error; empty: works
	}{
		"name of 256":       {src: memSource{memFile(strings.Repeat("n", 256), nil)}},
		"name of 257":       {src: memSource{memFile(strings.Repeat("n", 257), nil)}, want: "name of 257 bytes: the limit is 256"},
		"symlink of 65535":  {src: link(65535)},
		"symlink of 65536":  {src: link(65536), want: "link: symlink target of 65536 bytes: want 1 to 65535"},
		"symlink to none":   {src: link(0), want: "link: symlink target of 0 bytes"},
		"largest device":    {src: device(4095, 1048575)},
		"major 4096":        {src: device(4096, 0), want: "dev: device 4096:0: the limits are 4095:1048575"},
		"minor 2^20":        {src: device(1, 1<<20), want: "dev: device 1:1048576"},
		"unknown type":      {src: memSource{{Path: "u", Mode: 0o644}}, want: "u: mode 0644 is of no known type"},
		"2 TiB":             {src: memSource{memHollow("h", 2<<40, "x")}, opt: Options{BlockSize: MaxBlockSize}},
		"2 TiB and a byte":  {src: memSource{memHollow("h", 2<<40+1, "x")}, want: "h: size 2199023255553: the limit is 2199023255552"},
		"2^63-1 bytes":      {src: memSource{memHollow("h", math.MaxInt64, "x")}, want: "h: size 9223372036854775807"},
		"negative size":     {src: memSource{memHollow("h", -1, "")}, want: "h: size -1"},
		"xattr of 65536":    {src: xattr(Xattr{"user.x", make([]byte, 65536)})},
		"xattr of 65537":    {src: xattr(Xattr{"user.x", make([]byte, 65537)}), want: "x: extended attribute user.x"},
		"xattr twice":       {src: xattr(Xattr{"user.x", nil}, Xattr{"user.x", nil}), want: "x: extended attribute user.x is given twice"},
		"no content":        {src: memSource{{Path: "f", Mode: unix.S_IFREG}}, want: "f: the source gave no content"},
		"unsorted":          {src: memSource{memFile("b", nil), memFile("a", nil)}, want: `a: came after "b" in the walk`},
		"same name":         {src: memSource{memFile("a", nil), memFile("a", nil)}, want: `a: came after "a" in the walk`},
		"signed bytes":      {src: memSource{memFile("\xff", nil), memFile("a", nil)}, want: `a: came after`},
		"no directory":      {src: memSource{memFile("a/b", nil)}, want: "a/b: came before its directory"},
		"in a file":         {src: memSource{memFile("a", nil), memFile("a/b", nil)}, want: "a/b: came before its directory"},
		"in another dir":    {src: memSource{memDir("a"), memDir("b"), memFile("a/b", nil)}, want: "a/b: walked out of order"},
		"dot dot":           {src: memSource{memFile("..", nil)}, want: `".." cannot be a name`},
		"absolute":          {src: memSource{memFile("/a", nil)}, want: "/a: came before its directory"},
		"NUL":               {src: memSource{memFile("a\x00b", nil)}, want: "cannot be a name"},
		"root is a file":    {src: memSource{memFile(".", nil)}, want: "the root must come first in the walk, and be a directory"},
		"linked directory":  {src: memSource{{Path: "d", Mode: unix.S_IFDIR, Link: LinkID{1, 1}}}, want: "d: a directory cannot have hard links"},
		"block size":        {opt: Options{BlockSize: 5000}, want: "block size 5000"},
		"epoch":             {opt: Options{Epoch: new(time.Unix(1<<32, 0))}, want: "epoch 4294967296"},
		"workers":           {opt: Options{Workers: -1}, want: "-1 workers"},
		"compressor":        {opt: Options{Compressor: LZMA}, want: "writing lzma is not built in"},
		"compression level": {opt: Options{Level: 99}, want: "gzip level 99"},
	} {
		t.Run(name, func(t *testing.T) {
			out := &memOut{}
			_, err := Pack(t.Context(), c.src, out, c.opt)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				out.image(t)
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestPackWarnings(t *testing.T) {
	old := memFile("old", nil)
	old.Mtime = -1
	future := memFile("future", nil)
	future.Mtime = 1 << 32
	limit := memFile("limit", nil)
	limit.Mtime = 1<<32 - 1
	acl := memFile("acl", nil)
	acl.Xattrs = []Xattr{{"system.posix_acl_access", []byte("a")}, {"user.kept", []byte("k")}}
	out, st := packMem(t, memSource{acl, future, limit, old}, Options{})
	want := []string{
		"acl: extended attribute system.posix_acl_access left out: SquashFS holds user., trusted. and security. only",
		"future: modification time 4294967296 s became 4294967295: SquashFS holds 1970 to 2106 only",
		"old: modification time -1 s became 0: SquashFS holds 1970 to 2106 only",
	}
	if !slices.Equal(st.Warnings, want) {
		t.Errorf("warnings %q", st.Warnings)
	}
	img := out.image(t)
	ino, err := img.resolve("acl", true)
	if err != nil {
		t.Fatal(err)
	}
	if xs, err := img.Xattrs(ino); err != nil || len(xs) != 1 || xs[0].Name != "user.kept" {
		t.Errorf("xattrs %v, %v", xs, err)
	}

	var many memSource
	for i := range 1234 {
		e := memFile(fmt.Sprintf("%04d", i), nil)
		e.Note = "noted"
		many = append(many, e)
	}
	if _, st := packMem(t, many, Options{}); len(st.Warnings) != 1001 || st.Warnings[1000] != "234 more of this kind" {
		t.Errorf("%d warnings, last %q", len(st.Warnings), st.Warnings[len(st.Warnings)-1])
	}
}

// failing is a content that goes wrong in one way.
type failing struct {
	memContent
	open, read, close error
	panics            bool
}

func (f failing) Open() (ContentReader, error) { return f, f.open }
func (f failing) Close() error                 { return f.close }
func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if f.panics {
		panic("at the disco")
	}
	if f.read != nil {
		return 0, f.read
	}
	return f.memContent.ReadAt(p, off)
}

// Whatever goes wrong ends in its own error, with the path, and no image.
func TestPackFailures(t *testing.T) {
	eio := &fs.PathError{Op: "read", Path: "x", Err: unix.EIO}
	for _, size := range []int{10, DefaultBlockSize, 50 * DefaultBlockSize} {
		content := make(memContent, size)
		for name, c := range map[string]struct {
			f    failing
			want string
		}{
			"open":  {failing{open: eio}, "input/output error"},
			"read":  {failing{read: eio}, "dir/bad: read at 0: read x: input/output error"},
			"short": {failing{memContent: content[:size/2]}, "dir/bad: read at 0: EOF"},
			"close": {failing{memContent: content, close: ErrChanged}, ErrChanged.Error()},
			"panic": {failing{memContent: content, panics: true}, "internal error: at the disco"},
		} {
			t.Run(fmt.Sprintf("%s-%d", name, size), func(t *testing.T) {
				if name == "short" && size > DefaultBlockSize {
					// Several workers are beyond the end at once; any of them may be the first to say so.
					c.want = "dir/bad: read at [3-6][0-9]{6}: EOF"
				}
				src := memSource{memFile("a", bytes.Repeat([]byte("a"), 3*DefaultBlockSize)), memDir("dir"),
					{Path: "dir/bad", Mode: unix.S_IFREG, Size: int64(size), Content: c.f}, memFile("dir/c", []byte("c")),
					memFile("x", make([]byte, size))} // company of the same size
				dir := t.TempDir()
				path := filepath.Join(dir, "image.sqsh")
				if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
					t.Fatal(err)
				}
				_, err := PackFile(t.Context(), src, path, Options{Workers: 3})
				if err == nil || !regexp.MustCompile(c.want).MatchString(err.Error()) {
					t.Errorf("error %v, want it to match %q", err, c.want)
				}
				left, _ := filepath.Glob(filepath.Join(dir, "*"))
				hidden, _ := filepath.Glob(filepath.Join(dir, ".*"))
				if b, _ := os.ReadFile(path); string(b) != "before" || len(left)+len(hidden) != 1 {
					t.Errorf("left behind: %q %q with %q", left, hidden, b)
				}
			})
		}
	}
}

// full is a volume with room for so many bytes.
type full struct {
	memOut
	room int64
}

func (f *full) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.room {
		return 0, &fs.PathError{Op: "write", Path: "image", Err: unix.ENOSPC}
	}
	return f.memOut.WriteAt(p, off)
}

func TestPackNoSpace(t *testing.T) {
	dir := plainTree(t)
	whole, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{})
	for _, room := range []int64{0, 1 << 20, int64(len(whole.b)) - 9000, int64(len(whole.b)) - 1} {
		_, err := Pack(t.Context(), dirSourceOf(t, dir, DirOptions{}), &full{room: room}, Options{})
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "the image needs about") {
			t.Errorf("room for %d: %v", room, err)
		}
	}
}

func TestPackCancelled(t *testing.T) {
	dir := plainTree(t)
	cause := errors.New("told to stop")
	for _, after := range []int64{0, 1, 100, 500} {
		ctx, cancel := context.WithCancelCause(t.Context())
		calls := int64(0)
		_, err := Pack(ctx, dirSourceOf(t, dir, DirOptions{}), &memOut{}, Options{Progress: func(done, total int64) {
			if calls++; calls > after {
				cancel(cause)
			}
		}})
		if !errors.Is(err, cause) && !errors.Is(err, context.Canceled) {
			t.Errorf("after %d calls: %v", after, err)
		}
		cancel(nil)
	}
}

func TestPackProgress(t *testing.T) {
	var last int64
	_, st := packMem(t, dirSourceOf(t, plainTree(t), DirOptions{}), Options{Progress: func(done, total int64) {
		if done < last || done > total {
			t.Errorf("progress from %d to %d of %d", last, done, total)
		}
		last = done
	}})
	if last != st.BytesIn || last == 0 {
		t.Errorf("progress ended at %d of %d", last, st.BytesIn)
	}
}

var _ io.ReaderAt = memContent(nil)

func TestParseBlockSize(t *testing.T) {
	for s, want := range map[string]int{"4096": 4096, "128K": 128 << 10, "1m": 1 << 20, "1M": 1 << 20} {
		if got, err := ParseBlockSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "K", "1G", "-4K", "1KM", "0", "9999999999K", "4 K", "3", "2K", "2M", "96K"} {
		if got, err := ParseBlockSize(s); err == nil {
			t.Errorf("%q gave %d", s, got)
		}
	}
}
