// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

var edits = flag.Int("edits", 20, "random edit scripts of TestCompareEdits")

// packed packs a directory and opens the image.
func packed(t testing.TB, dir string, opt squash.Options) *squash.Image {
	t.Helper()
	src, err := squash.DirSource(dir, squash.DirOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	name := filepath.Join(t.TempDir(), "image")
	if _, err := squash.PackFile(t.Context(), src, name, opt); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	img, err := squash.Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func compare(t testing.TB, old, next *squash.Image) *Report {
	t.Helper()
	r, err := Compare(t.Context(), Side{"old", old}, Side{"new", next}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// flat is a report as one line per name that differs; a renamed file is two.
func flat(r *Report) map[string]string {
	all := map[string]string{}
	for _, c := range r.Changes {
		switch c.Kind {
		case Renamed:
			all[string(*c.From)], all[string(c.Path)] = "removed", "added"
		case Modified:
			all[string(c.Path)] = strings.Join(c.How, " ")
		default:
			all[string(c.Path)] = string(c.Kind)
		}
	}
	return all
}

// expected is what two snapshots of directories say.
func expected(old, next treekit.Snapshot) map[string]string {
	all := map[string]string{}
	for name := range old {
		if _, ok := next[name]; !ok {
			all[name] = "removed"
		}
	}
	for name, b := range next {
		a, ok := old[name]
		if !ok {
			all[name] = "added"
			continue
		}
		if a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT {
			all[name] = HowType
			continue
		}
		var how []string
		for _, x := range []struct {
			differs bool
			how     string
		}{
			{a.SHA256 != b.SHA256, HowContent},
			{a.Mode != b.Mode, HowMode},
			{a.UID != b.UID || a.GID != b.GID, HowOwner},
			{!maps.Equal(a.Xattrs, b.Xattrs), HowXattrs},
			{a.Target != b.Target, HowTarget},
			{a.Rdev != b.Rdev, HowDevice},
			{!slices.Equal(a.Peers, b.Peers), HowLinks},
			{a.Mtime.Sec != b.Mtime.Sec, HowTime},
		} {
			if x.differs {
				how = append(how, x.how)
			}
		}
		if len(how) > 0 {
			all[name] = strings.Join(how, " ")
		}
	}
	return all
}

func take(t testing.TB, dir string) treekit.Snapshot {
	t.Helper()
	s, err := treekit.Take(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bytesOf is the content of a tree, each inode once.
func bytesOf(s treekit.Snapshot) (n int64) {
	for name, e := range s {
		if e.Mode&unix.S_IFMT == unix.S_IFREG && !slices.ContainsFunc(e.Peers, func(p string) bool { return p < name }) {
			n += e.Size
		}
	}
	return n
}

const block = squash.MinBlockSize

// edit makes one random change.
func edit(rnd *rand.Rand, root string) error {
	var names, files, dirs []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.Type().IsRegular():
			files = append(files, p)
		case d.IsDir():
			dirs = append(dirs, p)
		}
		if p != root {
			names = append(names, p)
		}
		return nil
	})
	if err != nil {
		return err
	}
	content := make([]byte, []int{0, 1, 100, block - 1, block, block + 1, 3*block + 5}[rnd.IntN(7)])
	for i := range content {
		content[i] = "aabcd\x00"[rnd.IntN(6)]
	}
	fresh := filepath.Join(dirs[rnd.IntN(len(dirs))], fmt.Sprintf("n%d", rnd.IntN(1e9)))
	if len(files) == 0 {
		return os.WriteFile(fresh, content, 0o644)
	}
	file, any := files[rnd.IntN(len(files))], names[rnd.IntN(len(names))]
	info, err := os.Lstat(file)
	if err != nil {
		return err
	}
	switch rnd.IntN(15) {
	case 0:
		return os.WriteFile(fresh, content, 0o644)
	case 1:
		return os.RemoveAll(any)
	case 2:
		return os.Mkdir(fresh, 0o750)
	case 3:
		if !strings.HasPrefix(fresh, any+"/") {
			return os.Rename(any, fresh)
		}
	case 4:
		return os.Rename(file, files[rnd.IntN(len(files))])
	case 5:
		return os.Truncate(file, rnd.Int64N(3*block))
	case 6: // other content of the same length at the same time
		b, err := os.ReadFile(file)
		if err != nil || len(b) == 0 {
			return err
		}
		b[rnd.IntN(len(b))] ^= 0x55
		if err := os.WriteFile(file, b, 0); err != nil {
			return err
		}
		return os.Chtimes(file, time.Time{}, info.ModTime())
	case 7:
		if info, err := os.Lstat(any); err != nil || info.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		return unix.Chmod(any, uint32(rnd.IntN(0o10000))|0o700)
	case 8:
		return os.Lchown(any, rnd.IntN(3), rnd.IntN(3))
	case 9:
		return unix.Lsetxattr(any, "trusted.edit", fmt.Append(nil, rnd.IntN(3)), 0)
	case 10:
		return os.Link(file, fresh)
	case 11:
		return os.Symlink(fmt.Sprint("to", rnd.IntN(3)), fresh)
	case 12:
		return unix.UtimesNanoAt(unix.AT_FDCWD, any, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: rnd.Int64N(1e9)}}, unix.AT_SYMLINK_NOFOLLOW)
	case 13:
		if err := os.RemoveAll(any); err != nil {
			return err
		}
		if rnd.IntN(2) == 0 {
			return os.Symlink("elsewhere", any)
		}
		return unix.Mknod(any, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(rnd.IntN(3)))))
	case 14:
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		return os.WriteFile(fresh, b, 0o600)
	}
	return nil
}

// TestCompareEdits changes trees at random and takes snapshots of the directories
// for judge. The new image is packed in full, also in a form of its own, and as
// a delta in both layouts.
func TestCompareEdits(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	lines := []string{"dir etc", "dir usr/lib/deep/er", "dir a", "dir a-b", "file a/x", "file a-b/y", "file a.c", "dir empty", "symlink lnk etc/conf0",
		"fifo fifo", "char null 1 3", "data two 0644 8192 text", "data big 0644 70000 text", "sparse holes 0644 50000 20000:x",
		"sparse allholes 0644 30000", "hardlink etc/link big", "hardlink zz big", "xattr big user.x=1", "mtime big 1000000000"}
	for i := range 12 {
		lines = append(lines, fmt.Sprintf("file etc/conf%d 0644 %s", i, strings.Repeat(fmt.Sprint("conf", i), 1+i*i)),
			fmt.Sprintf("data usr/lib/deep/er/d%d 0644 %d random:%d", i, 100+i*777, i))
	}
	treekit.Make(t, dir, append(lines, "hardlink two2 etc/conf0")...)
	small := squash.Options{BlockSize: block}
	base := packed(t, dir, small)
	old := take(t, dir)
	if r := compare(t, base, packed(t, dir, squash.Options{Compressor: squash.Zstd})); len(r.Changes) > 0 || r.Summary != (Summary{ImageGrowth: r.Summary.ImageGrowth}) {
		t.Fatalf("the same tree differs: %+v", r)
	}
	kinds := map[Kind]int{}
	for seed := range *edits {
		rnd := rand.New(rand.NewPCG(uint64(seed), 1))
		now := filepath.Join(t.TempDir(), "now")
		if err := copyTree(dir, now); err != nil {
			t.Fatal(err)
		}
		for range 1 + rnd.IntN(8) {
			if err := edit(rnd, now); err != nil {
				t.Logf("edit: %v", err)
			}
		}
		next := take(t, now)
		want := expected(old, next)
		forms := map[string]squash.Options{
			"full":    small,
			"form":    {Compressor: squash.LZ4, BlockSize: 4 * block},
			"append":  {Base: &squash.Base{Image: base, Layout: squash.LayoutAppend}},
			"compact": {Base: &squash.Base{Image: base, Layout: squash.LayoutCompact}},
		}
		for name, opt := range forms {
			r := compare(t, base, packed(t, now, opt))
			got := flat(r)
			if !maps.Equal(got, want) {
				for path := range maps.Keys(want) {
					if got[path] != want[path] {
						t.Errorf("%s: got %q, want %q", path, got[path], want[path])
					}
				}
				for path := range maps.Keys(got) {
					if want[path] == "" {
						t.Errorf("%s: got %q, want nothing", path, got[path])
					}
				}
				t.Fatalf("seed %d, %s", seed, name)
			}
			if growth := bytesOf(next) - bytesOf(old); r.Summary.ContentGrowth != growth {
				t.Fatalf("seed %d, %s: growth %d, want %d", seed, name, r.Summary.ContentGrowth, growth)
			}
			for _, d := range r.Directories[:min(1, len(r.Directories))] {
				if d.Path != "." || d.Growth != r.Summary.ContentGrowth || d.Added != r.Summary.Added || d.AddedBytes != r.Summary.AddedBytes {
					t.Fatalf("seed %d, %s: the root's sums are %+v, the image's %+v", seed, name, d, r.Summary)
				}
			}
			for _, c := range r.Changes {
				if kinds[c.Kind]++; c.Kind == Renamed && old[string(*c.From)].SHA256 != next[string(c.Path)].SHA256 {
					t.Fatalf("seed %d: %s is not what %s was", seed, c.Path, *c.From)
				}
			}
		}
	}
	for _, k := range []Kind{Added, Removed, Modified, Renamed} {
		if kinds[k] == 0 && *edits >= 20 {
			t.Errorf("no edit made a change of kind %s", k)
		}
	}
}

// copyTree copies all of a tree.
func copyTree(from, to string) error {
	return runTool("cp", "-a", from, to)
}

// TestCompareTrustsNothing has two images of one layout, time and size, in which
// a byte differs: in a block, in a tail, in a block after a hole.
func TestCompareTrustsNothing(t *testing.T) {
	for _, c := range []struct {
		compressor squash.Compressor
		size, at   int
	}{{squash.None, 3 * block, 5000}, {squash.None, 3*block + 7, 3*block + 3}, {squash.None, 10, 9}, {squash.Gzip, 3 * block, 1}, {squash.Zstd, 10, 0}} {
		dir := t.TempDir()
		name := filepath.Join(dir, "f")
		b := bytes.Repeat([]byte("x"), c.size)
		epoch := time.Unix(1e9, 0)
		write := func() *squash.Image {
			if err := os.WriteFile(name, b, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{name, dir} {
				if err := os.Chtimes(p, epoch, epoch); err != nil {
					t.Fatal(err)
				}
			}
			return packed(t, dir, squash.Options{Compressor: c.compressor, BlockSize: block, Epoch: &epoch})
		}
		old := write()
		same := write()
		b[c.at] = 'y'
		got := flat(compare(t, old, write()))
		if want := map[string]string{"f": HowContent}; !maps.Equal(got, want) {
			t.Errorf("%+v: got %v, want %v", c, got, want)
		}
		if got := flat(compare(t, old, same)); len(got) > 0 {
			t.Errorf("%+v: the same image differs: %v", c, got)
		}
	}
}

func TestRenames(t *testing.T) {
	old, next := t.TempDir(), t.TempDir()
	treekit.Make(t, old, "file a/one 0644 same", "file b/two 0644 same", "file gone 0644 x", "data big 0600 300000 random:1", "file empty1", "file stays 0644 keep")
	treekit.Make(t, next, "file c/two 0644 same", "file c/one 0644 same", "file new 0644 y", "data moved 0644 300000 random:1", "file empty2", "file stays 0644 keep", "file copy 0644 keep")
	r := compare(t, packed(t, old, squash.Options{}), packed(t, next, squash.Options{}))
	var got []string
	for _, c := range r.Changes {
		if c.Kind == Renamed {
			got = append(got, c.names()+": "+c.detail())
		}
	}
	want := []string{"a/one -> c/one: ", "b/two -> c/two: ", "big -> moved: mode 0600 -> 0644"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := r.Summary; got.Renamed != 3 || got.Added != 4 || got.Removed != 4 {
		t.Errorf("%+v", got)
	}
}

func TestTooManyChanges(t *testing.T) {
	old, next := t.TempDir(), t.TempDir()
	treekit.Make(t, next, "file a", "file b", "file c", "file d")
	_, err := Compare(t.Context(), Side{"old", packed(t, old, squash.Options{})}, Side{"new", packed(t, next, squash.Options{})}, Options{MaxChanges: 3})
	if err == nil || !strings.Contains(err.Error(), "too many changes to report: more than 3") {
		t.Errorf("got %v", err)
	}
}
