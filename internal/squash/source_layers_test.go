// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// overlay is an image with a writable layer on it, as the kernel shows it.
type overlay struct{ dir, upper, work string }

// mountOverlay mounts one until unmount is called, at the latest until the test
// ends.
func mountOverlay(t testing.TB, lower, options string) (o overlay, unmount func()) {
	t.Helper()
	dir := t.TempDir()
	o = overlay{filepath.Join(dir, "merged"), filepath.Join(dir, "upper"), filepath.Join(dir, "work")}
	for _, d := range []string{o.dir, o.upper, o.work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyDirMeta(t, lower, o.upper)
	data := "lowerdir=" + lower + ",upperdir=" + o.upper + ",workdir=" + o.work + options
	if err := unix.Mount("overlay", o.dir, "overlay", 0, data); err != nil {
		t.Fatalf("mount overlay %s: %v", data, err)
	}
	done := false
	unmount = func() {
		if done {
			return
		}
		done = true
		if err := unix.Unmount(o.dir, 0); err != nil {
			t.Errorf("unmount overlay: %v", err)
			unix.Unmount(o.dir, unix.MNT_DETACH)
		}
	}
	t.Cleanup(unmount)
	return o, unmount
}

func copyDirMeta(t testing.TB, from, to string) {
	t.Helper()
	var st unix.Stat_t
	err := unix.Stat(from, &st)
	if err == nil {
		err = os.Chown(to, int(st.Uid), int(st.Gid))
	}
	if err == nil {
		err = unix.Chmod(to, st.Mode&0o7777)
	}
	if err == nil {
		err = os.Chtimes(to, time.Time{}, time.Unix(st.Mtim.Unix()))
	}
	if err != nil {
		t.Fatal(err)
	}
}

const stockOptions = ",userxattr,index=on"

// The tree of base and upper layer is the one the kernel shows, and the image
// packed from it is, byte for byte, the one packed from an unpacked tree with
// the same changes.
func TestLayersEdits(t *testing.T) {
	testkit.NeedRoot(t)
	origin := deltaTree(t)
	images := []string{
		packFileOf(t, origin, Options{BlockSize: MinBlockSize}),
		mksquashfs(t, origin, "-b", "4096", "-comp", "zstd"),
		gensquashfs(t, origin, "-b", "4096"),
	}
	var lowers []string
	for _, image := range images {
		lowers = append(lowers, kernelMount(t, image))
	}
	for i := range *editCases {
		ok := t.Run(fmt.Sprint(i), func(t *testing.T) {
			n := i % len(images)
			base := openImage(t, images[n])
			options := stockOptions
			if i%4 == 3 {
				options = ",index=off,redirect_dir=off,metacopy=off" // as root mounts it by hand
			}
			o, unmount := mountOverlay(t, lowers[n], options)
			edit := func(dir string) *editor {
				e := &editor{t: t, rnd: rand.New(rand.NewPCG(2, uint64(i))), root: dir}
				for range 1 + e.rnd.IntN(15) {
					e.step()
				}
				return e
			}
			e := edit(o.dir)
			epoch := time.Unix(1_700_000_000, 0) // hides when the changes were made
			merged, err := DirSource(o.dir, DirOptions{})
			if err != nil {
				t.Fatal(err)
			}
			full, _ := packMem(t, merged, Options{BlockSize: MinBlockSize, Epoch: &epoch})
			merged.Close()
			want := full.image(t)
			unmount()

			src, err := LayersSource(base, o.upper, LayersOptions{Work: o.work})
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			for l, got := range layoutsOf(t, src, base, &epoch) {
				// Names that were linked to a file of the image have several inode
				// numbers in the kernel's view, so hard links are not compared here.
				if diff := differences(describe(t, got, false), describe(t, want, false)); len(diff) > 0 {
					t.Fatalf("%v of %s:\n%s\nafter\n%s", l, images[n], strings.Join(diff, "\n"), strings.Join(e.log, "\n"))
				}
			}
			if !strings.HasPrefix(options, stockOptions) {
				return // without the index changed hard links come apart
			}
			dir, index := unpacked(t, base)
			edit(dir)
			for _, l := range []Layout{LayoutAppend, LayoutCompact} {
				opt := Options{Base: &Base{Image: base, Layout: l}, Epoch: &epoch}
				a, _ := packMem(t, src, opt)
				b, _ := packMem(t, indexed(t, dir, index, base), opt)
				if !bytes.Equal(a.b, b.b) {
					t.Fatalf("%v: %d bytes from the layers, %d from the unpacked tree: %s\nafter\n%s", l, len(a.b), len(b.b),
						strings.Join(sameImage(t, a.image(t), b.image(t)), "\n"), strings.Join(e.log, "\n"))
				}
			}
		})
		if !ok {
			break
		}
	}
}

// What the tree is made of is judged by others, too; nothing of overlayfs is in it.
func TestLayersJudged(t *testing.T) {
	origin := deltaTree(t)
	image := packFileOf(t, origin, Options{BlockSize: MinBlockSize})
	o, unmount := mountOverlay(t, kernelMount(t, image), stockOptions)
	treekit.Make(t, o.dir, "file new 0644 new", "dir etc/made", "xattr etc/conf3 user.mine=1", "owner var 3:4")
	for _, name := range []string{"usr/lib/deep", "etc/conf1"} {
		if err := os.RemoveAll(filepath.Join(o.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	treekit.Make(t, o.dir, "dir usr/lib/deep", "file usr/lib/deep/only 0644 x") // opaque
	if err := os.WriteFile(filepath.Join(o.dir, "var/link2"), []byte("changed by one of two names"), 0); err != nil {
		t.Fatal(err)
	}
	merged := filepath.Join(t.TempDir(), "copy")
	run(t, "cp", "-a", o.dir, merged)
	unmount()
	base := openImage(t, image)
	src, err := LayersSource(base, o.upper, LayersOptions{Work: o.work})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	for _, l := range []Layout{LayoutAppend, LayoutCompact} {
		out, st := packMem(t, src, Options{Base: &Base{Image: base, Layout: l}})
		if st.Base.Bytes < st.BytesIn*9/10 {
			t.Errorf("%+v of %+v", st.Base, st)
		}
		judge(t, out.onDisk(t), merged)
	}
}

func TestLayersRefused(t *testing.T) {
	testkit.NeedRoot(t)
	origin := deltaTree(t)
	base := openImage(t, packFileOf(t, origin, Options{}))
	for xattr, want := range map[string]string{"user.overlay.redirect": "etc: overlayfs was mounted with redirect_dir", "trusted.overlay.metacopy": "etc: overlayfs was mounted with metacopy"} {
		upper := t.TempDir()
		treekit.Make(t, upper, "dir etc", "xattr etc "+xattr+"=x")
		src, err := LayersSource(base, upper, LayersOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Pack(t.Context(), src, &memOut{}, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		src.Close()
	}
	if _, err := LayersSource(base, filepath.Join(t.TempDir(), "missing"), LayersOptions{}); err == nil {
		t.Error("an upper layer that is not there")
	}
}

// FuzzOriginNumber reads any name as one of the overlay's index, where whoever has
// the volume can put files.
func FuzzOriginNumber(f *testing.F) {
	f.Add("00fb1d0001" + strings.Repeat("00", 16) + "0100000000000000")
	f.Fuzz(func(t *testing.T, name string) {
		if number, ok := IndexedInode(name); ok {
			b, err := hex.DecodeString(name)
			if err != nil || binary.NativeEndian.Uint32(b[21:]) != number {
				t.Errorf("%q: %d", name, number)
			}
		}
	})
}
