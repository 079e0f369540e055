// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
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

var editCases = flag.Int("edits", 100, "cases of TestDeltaEdits and TestLayersEdits")

// sameImage lists how the tree in one image differs from the one in another.
func sameImage(t testing.TB, got, want *Image) []string {
	t.Helper()
	return differences(describe(t, got, true), describe(t, want, true))
}

func differences(a, b map[string]string) []string {
	var diff []string
	for name, x := range a {
		if y, ok := b[name]; !ok {
			diff = append(diff, "only in the first: "+name)
		} else if x != y {
			diff = append(diff, fmt.Sprintf("%s: %s, want %s", name, x, y))
		}
	}
	for name := range b {
		if _, ok := a[name]; !ok {
			diff = append(diff, "missing: "+name)
		}
	}
	slices.Sort(diff)
	return diff
}

// describe says all of each name in an image. With links, a hard link is said to
// be one, to the first of the inode's names.
func describe(t testing.TB, img *Image, links bool) map[string]string {
	t.Helper()
	w, err := newWalker(img, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	w.named = true
	all := map[string]string{}
	note := func(name string, ino *Inode) {
		xattrs, err := img.Xattrs(ino)
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(xattrs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
		if !links && !ino.IsDir() {
			c := *ino
			c.NLink, ino = 1, &c
		}
		all[name] = fmt.Sprint(ino.Mode, ino.UID, ino.GID, ino.MTime, ino.NLink, ino.Size, ino.Target, ino.Rdev, xattrs)
		if ino.isFile() {
			content, err := fs.ReadFile(img, name)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			all[name] += fmt.Sprintf(" %.200q %x", content, sha256.Sum256(content))
		}
	}
	note(".", w.root.ino)
	err = w.walk(t.Context(), func(n *treeName) error {
		if n.link != nil && links {
			all[n.path()] = "link to " + n.link.dir.join(n.link.name)
			return nil
		}
		note(n.path(), n.ino)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// editor changes a tree at random, the same way for the same seed.
type editor struct {
	t    testing.TB
	rnd  *rand.Rand
	root string
	log  []string
}

// paths lists what is there, sorted, without the root.
func (e *editor) paths(want func(fs.FileMode) bool) []string {
	var list []string
	err := filepath.WalkDir(e.root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == e.root {
			return err
		}
		if want(d.Type()) {
			rel, _ := filepath.Rel(e.root, p)
			list = append(list, rel)
		}
		return nil
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return list
}

func anyType(fs.FileMode) bool { return true }

// pick returns a random path of the wanted kind, or "".
func (e *editor) pick(want func(fs.FileMode) bool) string {
	list := e.paths(want)
	if len(list) == 0 {
		return ""
	}
	return filepath.Join(e.root, list[e.rnd.IntN(len(list))])
}

// fresh is a path that is not there.
func (e *editor) fresh() string {
	dir := e.pick(fs.FileMode.IsDir)
	if dir == "" || e.rnd.IntN(4) == 0 {
		dir = e.root
	}
	return filepath.Join(dir, fmt.Sprintf("new%d", e.rnd.IntN(1e6)))
}

func (e *editor) bytes() []byte {
	sizes := []int{0, 1, 100, MinBlockSize - 1, MinBlockSize, MinBlockSize + 1, 3 * MinBlockSize, 5*MinBlockSize + 77}
	b := make([]byte, sizes[e.rnd.IntN(len(sizes))])
	for i := range b {
		b[i] = "aabcd\x00"[e.rnd.IntN(6)]
	}
	return b
}

// step makes one change.
func (e *editor) step() {
	file, any := e.pick(fs.FileMode.IsRegular), e.pick(anyType)
	ops := []struct {
		name string
		do   func() error
	}{
		{"add", func() error { return os.WriteFile(e.fresh(), e.bytes(), 0o644) }},
		{"remove", func() error { return os.RemoveAll(any) }},
		{"mkdir", func() error { return os.Mkdir(e.fresh(), 0o750) }},
		{"rename", func() error {
			to := e.fresh()
			if strings.HasPrefix(to, any+"/") {
				return nil
			}
			if info, err := os.Lstat(any); err != nil || !info.IsDir() {
				return os.Rename(any, to)
			}
			// A directory of a lower layer cannot be renamed; mv copies it.
			run(e.t, "cp", "-a", any, to)
			return os.RemoveAll(any)
		}},
		{"rename over", func() error {
			if other := e.pick(fs.FileMode.IsRegular); file != "" {
				return os.Rename(file, other)
			}
			return nil
		}},
		{"truncate", func() error { return os.Truncate(file, int64(e.rnd.IntN(3*MinBlockSize))) }},
		{"append", func() error {
			f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(e.bytes())
			f.Close()
			return err
		}},
		{"rewrite with the same", func() error {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			info, err := os.Stat(file)
			if err == nil {
				err = os.Remove(file)
			}
			if err == nil {
				err = os.WriteFile(file, b, info.Mode().Perm())
			}
			return err
		}},
		{"flip a byte, and the time back", func() error {
			info, err := os.Stat(file)
			if err != nil || info.Size() == 0 {
				return err
			}
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			at := e.rnd.Int64N(info.Size())
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, at); err != nil {
				return err
			}
			b[0] ^= 0x55
			if _, err := f.WriteAt(b, at); err != nil {
				return err
			}
			return os.Chtimes(file, time.Time{}, info.ModTime())
		}},
		{"chmod", func() error {
			if info, err := os.Lstat(any); err != nil || info.Mode().Type() == fs.ModeSymlink {
				return err
			}
			return os.Chmod(any, fs.FileMode(e.rnd.IntN(0o1000))|0o700)
		}},
		{"chown", func() error { return os.Lchown(any, e.rnd.IntN(3), e.rnd.IntN(3)) }},
		{"setxattr", func() error { return unix.Lsetxattr(any, "trusted.edit", e.bytes()[:0], 0) }},
		{"hard link", func() error { return os.Link(file, e.fresh()) }},
		{"symlink", func() error { return os.Symlink("there", e.fresh()) }},
		{"touch back", func() error {
			ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: int64(e.rnd.IntN(1e9))}}
			return unix.UtimesNanoAt(unix.AT_FDCWD, any, ts, unix.AT_SYMLINK_NOFOLLOW)
		}},
		{"replace by a directory", func() error {
			if err := os.Remove(file); err != nil {
				return err
			}
			return os.Mkdir(file, 0o755)
		}},
		{"replace by a fifo", func() error {
			if err := os.RemoveAll(any); err != nil {
				return err
			}
			return unix.Mkfifo(any, 0o600)
		}},
		{"empty a directory", func() error {
			dir := e.pick(fs.FileMode.IsDir)
			if dir == "" {
				return nil
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "again"), e.bytes(), 0o600)
		}},
		{"copy", func() error {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			return os.WriteFile(e.fresh(), b, 0o600)
		}},
	}
	op := ops[e.rnd.IntN(len(ops))]
	if any == "" || file == "" {
		op = ops[0]
	}
	err := op.do()
	e.log = append(e.log, fmt.Sprintf("%s (%s, %s): %v", op.name, file, any, err))
}

// deltaTree is small, with blocks of 4 KiB, and has of everything.
func deltaTree(t testing.TB) string {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	lines := []string{"dir etc", "dir usr/lib/deep/er", "dir var/log", "dir empty", "symlink lnk etc/conf0", "fifo var/fifo", "char null 1 3",
		"file zero", "data exact 0644 4096 random:1", "data two 0644 8192 text", "data tail 0600 9000 random:3", "data big 0644 70000 text", "sparse holes 0644 50000 20000:x", "sparse allholes 0644 30000",
		"file long 0644 " + strings.Repeat("z", 5000), "hardlink etc/link big"}
	for i := range 12 {
		lines = append(lines, fmt.Sprintf("file etc/conf%d 0644 %s", i, strings.Repeat(fmt.Sprint("conf", i), 1+i*i)),
			fmt.Sprintf("data usr/lib/deep/er/d%d 0644 %d random:%d", i, 100+i*777, i))
	}
	lines = append(lines, "file etc/same 0644 same", "file var/same 0644 same", "xattr etc/same user.x=1", "mtime big 1000000000", "mtime etc 1000000001",
		"hardlink var/link2 etc/conf0")
	treekit.Make(t, dir, lines...)
	return dir
}

// layoutsOf packs a changed tree in all layouts and returns the images.
func layoutsOf(t testing.TB, src Source, base *Image, epoch *time.Time) map[Layout]*Image {
	t.Helper()
	images := map[Layout]*Image{}
	for _, l := range []Layout{LayoutAuto, LayoutAppend, LayoutCompact} {
		out, st := packMem(t, src, Options{Base: &Base{Image: base, Layout: l}, Epoch: epoch})
		if st.Base == nil || st.Base.Refused != "" {
			t.Fatalf("base refused: %+v", st.Base)
		}
		img, err := open(out.b)
		if err == nil {
			err = Verify(t.Context(), img, false)
		}
		if err != nil {
			t.Fatalf("%v: %v", l, err)
		}
		for _, x := range st.Base.Shared {
			a, b := make([]byte, x.Bytes), out.b[x.To:x.To+x.Bytes]
			if err := base.readAt(a, x.From); err != nil || !bytes.Equal(a, b) {
				t.Fatalf("%v: %+v is not the base's: %v", l, x, err)
			}
		}
		images[l] = img
	}
	return images
}

// A delta image holds exactly what a full image of the same tree holds, however
// the tree was changed, whoever made the base, in every layout.
func TestDeltaEdits(t *testing.T) {
	testkit.NeedRoot(t)
	origin := deltaTree(t)
	bases := []string{
		packFileOf(t, origin, Options{BlockSize: MinBlockSize}),
		packFileOf(t, origin, Options{BlockSize: MinBlockSize, Compressor: Zstd}),
		mksquashfs(t, origin, "-b", "4096"),
		mksquashfs(t, origin, "-b", "4096", "-comp", "zstd", "-always-use-fragments"),
		mksquashfs(t, origin, "-b", "4096", "-no-fragments", "-noI"),
		gensquashfs(t, origin, "-b", "4096"),
		appended(t, origin),
	}
	for i := range *editCases {
		ok := t.Run(fmt.Sprint(i), func(t *testing.T) {
			base := openImage(t, bases[i%len(bases)])
			work := t.TempDir()
			dir, index := filepath.Join(work, "root"), filepath.Join(work, "index")
			if _, err := Unpack(t.Context(), base, dir, UnpackOptions{Workers: 1}); err != nil {
				t.Fatal(err)
			}
			if err := WriteIndex(t.Context(), base, dir, index); err != nil {
				t.Fatal(err)
			}
			e := &editor{t: t, rnd: rand.New(rand.NewPCG(1, uint64(i))), root: dir}
			for range 1 + e.rnd.IntN(12) {
				e.step()
			}
			x, err := OpenIndex(index, base)
			if err != nil {
				t.Fatal(err)
			}
			src := dirSourceOf(t, dir, DirOptions{Index: x})
			full, _ := packMem(t, dirSourceOf(t, dir, DirOptions{}), Options{BlockSize: MinBlockSize})
			want := full.image(t)
			images := layoutsOf(t, src, base, nil)
			for l, got := range images {
				if diff := sameImage(t, got, want); len(diff) > 0 {
					t.Fatalf("%v of %s:\n%s\nafter\n%s", l, bases[i%len(bases)], strings.Join(diff, "\n"), strings.Join(e.log, "\n"))
				}
			}
			// What our reader takes for the same, the kernel must, too.
			mounted := kernelMount(t, fileOf(t, images[Layout(i%len(images))]))
			treekit.Equal(t, dir, mounted, treekit.Seconds)
			if t.Failed() {
				t.Logf("%s after\n%s", bases[i%len(bases)], strings.Join(e.log, "\n"))
			}
		})
		if !ok {
			break
		}
	}
}

// fileOf is an image in a file, padded for the kernel's loop device.
func fileOf(t testing.TB, img *Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.sqsh")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(img.r, 0, int64(img.sb.BytesUsed))); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate((int64(img.sb.BytesUsed) + 4095) / 4096 * 4096); err != nil {
		t.Fatal(err)
	}
	return path
}

func packFileOf(t testing.TB, dir string, opt Options) string {
	image, _ := packDir(t, dir, opt)
	return image
}

func gensquashfs(t testing.TB, dir string, args ...string) string {
	t.Helper()
	testkit.NeedTool(t, "gensquashfs")
	path := filepath.Join(t.TempDir(), "image.sqsh")
	run(t, "gensquashfs", append([]string{"-D", dir, path, "-q", "-x"}, args...)...)
	return path
}

// appended is an image that mksquashfs has appended to.
func appended(t testing.TB, dir string) string {
	t.Helper()
	image := mksquashfs(t, dir, "-b", "4096")
	more := t.TempDir()
	treekit.Make(t, more, "data extra/one 0644 20000 random:9", "file extra/two 0644 two")
	run(t, "mksquashfs", more, image, "-quiet", "-no-progress")
	return image
}
