// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// tarEpoch is later than any time in the trees packed here.
var tarEpoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

func tarSourceOf(t testing.TB, r io.Reader, opt TarOptions) Source {
	t.Helper()
	if opt.SpoolDir == "" {
		opt.SpoolDir = t.TempDir()
	}
	src, err := TarSource(t.Context(), r, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	return src
}

// noReadAt hides that a reader is a file.
type noReadAt struct{ io.Reader }

// What GNU tar makes of a tree, however it is written and compressed, packs to
// the bytes that the tree itself does.
func TestTarSameBytes(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "tar", "gzip", "xz", "zstd")
	dir := fullTree(t)
	// tar stores no sockets, and ustar neither xattrs nor large numbers.
	// Nor does GNU tar see that devices and fifos have several names.
	for _, name := range []string{"run/sock", "run/sock2", "run/fifo2", "dev/null2"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	treekit.Make(t, dir, "file "+strings.Repeat("n", 255)+" 0644 long name", "mtime run 1000000000", "mtime etc/empty 1234567890.987654321",
		fmt.Sprintf("sparse sparse2 0644 %d %d:island", 3<<20, 1<<20+17), "mtime sparse2 1")
	opt := Options{Epoch: &tarEpoch, BlockSize: 16 << 10}
	want, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), opt)
	archive := filepath.Join(t.TempDir(), "a.tar")
	for _, c := range []struct {
		name string
		argv []string
	}{
		{"pax", []string{"--format=posix"}},
		{"pax sparse 0.0", []string{"--format=posix", "--sparse", "--sparse-version=0.0"}},
		{"pax sparse 0.1", []string{"--format=posix", "--sparse", "--sparse-version=0.1"}},
		{"pax sparse 1.0", []string{"--format=posix", "--sparse", "--sparse-version=1.0"}},
		{"gzip", []string{"--format=posix", "--gzip"}},
		{"xz", []string{"--format=posix", "--xz"}},
		{"zstd", []string{"--format=posix", "--zstd", "--sparse"}},
		{"unsorted", []string{"--format=posix", "--sort=none"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			run(t, "tar", append(c.argv, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", dir, "-cf", archive, ".")...)
			f, err := os.Open(archive)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got, _ := packMem(t, tarSourceOf(t, f, TarOptions{}), opt); !bytes.Equal(got.b, want.b) {
				t.Errorf("from a file: %d other bytes, want %d", len(got.b), len(want.b))
				treeOf(t, got, dir)
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			if got, _ := packMem(t, tarSourceOf(t, noReadAt{f}, TarOptions{held: 1}), opt); !bytes.Equal(got.b, want.b) {
				t.Errorf("from a stream: %d other bytes, want %d", len(got.b), len(want.b))
			}
		})
	}
	t.Run("gnu", func(t *testing.T) { // has no xattrs
		run(t, "tar", "--format=gnu", "--sparse", "--numeric-owner", "-C", dir, "-cf", archive, ".")
		back := t.TempDir()
		run(t, "tar", "--numeric-owner", "-C", back, "-xpf", archive)
		want, _ := packMem(t, dirSourceOf(t, back, DirOptions{}), opt)
		f, err := os.Open(archive)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, _ := packMem(t, tarSourceOf(t, f, TarOptions{}), opt); !bytes.Equal(got.b, want.b) {
			t.Errorf("%d other bytes, want %d", len(got.b), len(want.b))
			treeOf(t, got, back)
		}
	})
}

// treeOf reports how the tree in an image differs from the one at want.
func treeOf(t testing.TB, image *memOut, want string) {
	out, _ := unpackTo(t, image.image(t), UnpackOptions{})
	diff := treekit.Diff(want, out, treekit.NoMtime) // times end at the epoch
	t.Errorf("the trees differ in %d points: %q", len(diff), diff[:min(len(diff), 10)])
}

// entry is a header with content.
type tarEntry struct {
	tar.Header
	data string
}

func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.Size == 0 {
			e.Size = int64(len(e.data))
		}
		if e.Mode == 0 && e.Typeflag != tar.TypeXGlobalHeader {
			e.Mode = 0o644
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tarFile(name, data string) tarEntry { return tarEntry{tar.Header{Name: name}, data} }
func tarDir(name string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}
func tarSymlink(name, target string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}, ""}
}
func tarLink(name, target string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}, ""}
}

// Archives with oddities give what tar itself extracts from them.
func TestTarLikeTar(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "tar")
	root := tarDir("./")
	root.ModTime = tarEpoch.Add(-time.Hour)
	touched := tarDir("usr/lib")
	touched.ModTime = tarEpoch.Add(time.Hour) // tar leaves it the time of the file that comes later
	for name, entries := range map[string][]tarEntry{
		"last wins":          {root, tarFile("f", "first"), tarFile("g", "x"), tarFile("./f", "second")},
		"no directories":     {root, tarFile("a/b/c", "x")},
		"no root":            {tarFile("f", "x")},
		"directory twice":    {root, tarDir("d"), tarFile("d/f", "x"), {tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700}, ""}},
		"file to directory":  {root, tarFile("d", "x"), tarDir("d"), tarFile("d/f", "x")},
		"directory to file":  {root, tarDir("d"), tarFile("d", "x")},
		"symlink to file":    {root, tarFile("t", "x"), tarSymlink("l", "t"), tarFile("l", "y")},
		"through a symlink":  {root, touched, tarSymlink("lib", "usr/lib"), tarFile("lib/f", "x")},
		"hard links":         {root, tarFile("a", "x"), tarLink("b", "a"), tarLink("c", "./b")},
		"link then replaced": {root, tarFile("a", "x"), tarLink("b", "a"), tarFile("a", "y")},
		"link over file":     {root, tarFile("a", "x"), tarFile("b", "y"), tarLink("b", "a")},
		"link to symlink":    {root, tarSymlink("s", "nowhere"), tarLink("b", "s")},
		"link to itself":     {root, tarFile("a", "x"), tarLink("a", "a")},
		"absolute":           {root, tarFile("/etc/passwd", "x")},
		"times":              {root, {tar.Header{Name: "f", ModTime: time.Unix(99, 999999999), Format: tar.FormatPAX}, ""}},
	} {
		t.Run(name, func(t *testing.T) {
			archive := makeTar(t, entries...)
			back := t.TempDir()
			cmd := exec.Command("tar", "--numeric-owner", "-C", back, "-xpf", "-")
			cmd.Stdin = bytes.NewReader(archive)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			opt := Options{Epoch: &tarEpoch}
			if entries[0].Name != "./" { // tar leaves a root without entry alone
				run(t, "chmod", "755", back)
			}
			want, _ := packMem(t, dirSourceOf(t, back, DirOptions{}), opt)
			for _, held := range []int{0, 1} {
				got, _ := packMem(t, tarSourceOf(t, bytes.NewReader(archive), TarOptions{held: held}), opt)
				if !bytes.Equal(got.b, want.b) {
					t.Errorf("other bytes, %d held", held)
					treeOf(t, got, back)
				}
			}
		})
	}
}

func TestTarRefuses(t *testing.T) {
	ok := makeTar(t, tarFile("f", "data"))
	odd := tarEntry{tar.Header{Name: "odd", Typeflag: 'V'}, ""}
	loop := []tarEntry{tarSymlink("a", "b"), tarSymlink("b", "a"), tarFile("a/f", "x")}
	for name, c := range map[string]struct {
		archive []byte
		want    string
	}{
		"empty":                {nil, "it is empty"},
		"text":                 {bytes.Repeat([]byte("not an archive\n"), 100), "invalid tar header"},
		"dot dot":              {makeTar(t, tarFile("a/../../etc/passwd", "x")), `a/../../etc/passwd: a name with ".."`},
		"below a file":         {makeTar(t, tarFile("f", "x"), tarFile("f/g", "x")), "f/g: it lies below f, which is not a directory"},
		"symlink out":          {makeTar(t, tarSymlink("l", "../.."), tarFile("l/f", "x")), "l/f: it lies behind the symlink l -> ../.., which is not followed"},
		"symlink to root":      {makeTar(t, tarSymlink("l", "/etc"), tarFile("l/f", "x")), "l/f: it lies behind the symlink l -> /etc"},
		"symlink loop":         {makeTar(t, loop...), "a/f: it lies behind the symlink"},
		"link to nothing":      {makeTar(t, tarLink("l", "f")), "l: hard link to f, which is not in front of it"},
		"link forward":         {makeTar(t, tarLink("l", "f"), tarFile("f", "x")), "l: hard link to f, which is not in front of it"},
		"link to dot dot":      {makeTar(t, tarLink("l", "../f")), `l: hard link to ../f: a name with ".."`},
		"link to a directory":  {makeTar(t, tarDir("d"), tarLink("l", "d")), "l: hard link to d, which is a directory"},
		"file over directory":  {makeTar(t, tarFile("d/f", "x"), tarFile("d", "x")), "d: it would replace a directory that is not empty"},
		"root is a file":       {makeTar(t, tarFile("./.", "x")), "the root is not a directory"},
		"volume label":         {oddTar(t, odd), "odd: entry of type 'V'"},
		"cut short":            {makeTar(t, tarFile("f", strings.Repeat("x", 5000)))[:3000], "unexpected EOF"},
		"damaged header":       {append([]byte{ok[0] ^ 1}, ok[1:]...), "invalid tar header"},
		"bzip2":                {[]byte("BZh91AY&SY"), "bzip2"},
		"deep":                 {makeTar(t, tarEntry{tar.Header{Name: strings.Repeat("d/", 5000) + "f", Format: tar.FormatPAX}, ""}), "nested more than 4096 deep"},
		"long name":            {makeTar(t, tarEntry{tar.Header{Name: "d/" + strings.Repeat("n", 257), Format: tar.FormatPAX}, ""}), "name of 257 bytes: the limit is 256"},
		"global xattr":         {makeTar(t, tarEntry{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "1"}}, ""}), "global attribute"},
		"gzip with wrong sums": {damagedGzip(t, ok), "gzip"},
	} {
		t.Run(name, func(t *testing.T) {
			spool := t.TempDir()
			file := filepath.Join(t.TempDir(), "a.tar")
			if err := os.WriteFile(file, c.archive, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for _, r := range []io.Reader{bytes.NewReader(c.archive), f} {
				_, err := TarSource(t.Context(), r, TarOptions{SpoolDir: spool})
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%T: error %v, want it to say %q", r, err, c.want)
				}
			}
			if left, err := os.ReadDir(spool); err != nil || len(left) > 0 {
				t.Errorf("left in the spool: %v, %v", left, err)
			}
		})
	}
}

// oddTar writes an entry of a type the library would not write.
func oddTar(t testing.TB, e tarEntry) []byte {
	kind := e.Typeflag
	e.Typeflag = tar.TypeReg
	b := makeTar(t, e)
	b[156] = kind
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func damagedGzip(t testing.TB, b []byte) []byte {
	t.Helper()
	testkit.NeedTool(t, "gzip")
	cmd := exec.Command("gzip", "-c")
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	out[len(out)-8] ^= 1
	return out
}

// An archive that is written to while it is packed.
func TestTarChanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(file, makeTar(t, tarFile("a", "data"), tarFile("b", strings.Repeat("x", 500000))), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	src := between{Source: tarSourceOf(t, f, TarOptions{}), tamper: func() { os.Truncate(file, 1<<20) }}
	if _, err := Pack(t.Context(), src, &memOut{}, Options{}); !errors.Is(err, ErrChanged) {
		t.Errorf("error %v", err)
	}
}

func TestTarExclude(t *testing.T) {
	archive := makeTar(t, tarFile("keep/a", "x"), tarFile("tmp/b", "y"), tarLink("keep/b", "tmp/b"))
	out, _ := packMem(t, tarSourceOf(t, bytes.NewReader(archive), TarOptions{Exclude: func(p string) bool { return p == "tmp" }}), Options{})
	var got []string
	if err := fs.WalkDir(out.image(t), ".", func(p string, _ fs.DirEntry, err error) error {
		got = append(got, p)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := []string{".", "keep", "keep/a", "keep/b"}; !slices.Equal(got, want) {
		t.Errorf("packed %q, want %q", got, want)
	}
	if b, err := fs.ReadFile(out.image(t), "keep/b"); err != nil || string(b) != "y" {
		t.Errorf("%q, %v", b, err)
	}
}

// FuzzTar reads archives; what they hold packs or is refused.
func FuzzTar(f *testing.F) {
	f.Add(makeTar(f, tarDir("./"), tarFile("a", "x"), tarLink("b", "a"), tarSymlink("c", "a"), tarFile("c/d", "")))
	f.Add(makeTar(f, tarEntry{tar.Header{Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.x": "1", "LIBARCHIVE.xattr.user.y": "eA"}}, "data"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		src, err := TarSource(t.Context(), bytes.NewReader(b), TarOptions{SpoolDir: t.TempDir()})
		if err != nil {
			return
		}
		defer src.Close()
		out := &memOut{}
		if _, err := Pack(t.Context(), src, out, Options{Workers: 1}); err != nil {
			return
		}
		if err := Verify(t.Context(), out.image(t), false); err != nil {
			t.Error(err)
		}
	})
}
