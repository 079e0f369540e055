// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// fullTree has every kind of inode, with and without what makes it extended.
func fullTree(t testing.TB) string {
	testkit.NeedRoot(t)
	dir := brokenTree(t)
	treekit.Make(t, dir,
		"char dev/null 1 3 0666", "char dev/tty63 4 63 0620", "char dev/big 4095 1048575", "block dev/sda 8 0 0660", "block dev/nvme 259 1048575 0660",
		"file bin/su 04755 setuid", "file bin/wall 02755 setgid", "dir tmp 01777", "dir mail 02775", "file shadow 0 secret", "dir closed 0",
		"owner bin/su 0:0", "owner mail 8:12", "owner shadow 0:42", "file nobody 0600 x", "owner nobody 65534:4294967294",
		"symlink owned target", "symlink long "+strings.Repeat("/4000", 800), "owner owned 1000:1000",
		"xattr bin/su security.capability=0x0100000202200000000000000000000000000000",
		"xattr etc/passwd user.comment=hello", "xattr etc/passwd user.empty=", "xattr etc/passwd trusted.t=0x00ff",
		"xattr etc/mtab trusted.onlink=yes", "xattr dev/null trusted.ondev=1", "xattr dev/sda trusted.ondev=1",
		"xattr run/fifo trusted.onfifo=1", "xattr run/sock trusted.onsock=1", "xattr etc user.ondir=1", "xattr . user.onroot=1",
		"xattr usr/lib/big user.long="+strings.Repeat("v", 2000), "xattr usr/lib/copy user.long="+strings.Repeat("v", 2000),
		"xattr usr/lib/exact user.long="+strings.Repeat("v", 2000), "xattr usr/lib/exact user.other=1",
		"hardlink run/fifo2 run/fifo", "hardlink run/sock2 run/sock", "hardlink dev/null2 dev/null", "hardlink etc/mtab2 etc/mtab",
		"hardlink many/link bin/su", "hardlink a bin/su", "hardlink zz etc/empty",
		"mtime run/fifo 1970-01-01T00:00:00Z", "mtime dev/null 2106-02-07T06:28:15Z", "mtime owned 0", "mtime . 2020-02-02T02:02:02Z",
	)
	for _, suffix := range []string{"0", "1"} { // deep, and directories that share their metadata block
		treekit.Make(t, dir, "dir "+strings.Repeat("d"+suffix+"/", 60)+"end", "file "+strings.Repeat("d"+suffix+"/", 30)+"f")
	}
	return dir
}

func TestPackJudged(t *testing.T) {
	dir := fullTree(t)
	for _, opt := range []Options{
		{}, {BlockSize: MinBlockSize}, {BlockSize: MaxBlockSize}, {Level: maxGzipLevel, Workers: 7},
		{Compressor: Zstd}, {Compressor: Zstd, Level: 1}, {Compressor: Zstd, Level: 15}, {Compressor: Zstd, Level: 19, BlockSize: MinBlockSize},
		{Compressor: Zstd, Level: 22, BlockSize: MaxBlockSize}, {Compressor: LZ4}, {Compressor: LZ4, Level: maxLZ4Level},
		{Compressor: XZ}, {Compressor: XZ, Level: 9, BlockSize: MaxBlockSize}, {Compressor: XZ, BlockSize: MinBlockSize},
		{Compressor: XZ, DictSize: 96 << 10}, {Compressor: None}, {Compressor: None, BlockSize: MinBlockSize},
	} {
		t.Run(fmt.Sprintf("%v-%d-%d-%d", opt.Compressor, opt.Level, opt.BlockSize, opt.DictSize), func(t *testing.T) {
			image, st := packDir(t, dir, opt)
			if len(st.Warnings) > 0 {
				t.Errorf("warnings: %q", st.Warnings)
			}
			judge(t, image, dir)
		})
	}
}

func TestPackEmptyTree(t *testing.T) {
	dir := t.TempDir()
	image, st := packDir(t, dir, Options{})
	if st.Inodes != 1 || st.Fragments != 0 {
		t.Errorf("%+v", st)
	}
	judge(t, image, dir)
}

// Directory headers hold 256 entries; an index is for the listings that do not
// fit one metadata block. A missing name in a large directory only shows when
// it is looked up, which Take does for each.
func TestPackDirectorySizes(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	for _, n := range []int{1, 255, 256, 257, 511, 512, 513, 3000} {
		sub := filepath.Join(dir, fmt.Sprint(n))
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			name := filepath.Join(sub, fmt.Sprintf("%x-%d", i*7919%n, i))
			var err error
			switch {
			case i%50 == 0:
				err = os.Mkdir(name, 0o700)
			case i%3 == 0:
				err = os.Symlink("busybox", name)
			default:
				err = unix.Mknod(name, unix.S_IFIFO|0o600, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	// Long names: a header's run is then limited by bytes.
	for i := range 400 {
		treekit.Make(t, dir, fmt.Sprintf("file long/%03d%s", i, strings.Repeat("\xff", 252)))
	}
	// All of a directory's names belong to inodes that lie elsewhere.
	for i := range 40 {
		treekit.Make(t, dir, fmt.Sprintf("hardlink links/%02d long/%03d%s", i, i*10, strings.Repeat("\xff", 252)))
	}
	image, _ := packDir(t, dir, Options{})
	judge(t, image, dir)
}

func TestPackLargeDirectory(t *testing.T) {
	testkit.NeedTool(t, "unsquashfs")
	const names = 70000
	src := memSource{memDir("dir")}
	for i := range names {
		src = append(src, Entry{Path: fmt.Sprintf("dir/%05d", i), Mode: unix.S_IFIFO | 0o600})
	}
	// Neighbours in the inode table with numbers far from each other: numbers
	// go by directory, places by the first name in the walk.
	near := Entry{Mode: unix.S_IFIFO, Link: LinkID{1, 1}}
	far := Entry{Mode: unix.S_IFSOCK, Link: LinkID{1, 2}}
	for _, at := range []string{"dir/x near", "dir/y far", "far", "far/1 near", "far/2 far", "far/3 near", "root far"} {
		p, kind, _ := strings.Cut(at, " ")
		e := map[string]Entry{"near": near, "far": far, "": memDir("")}[kind]
		e.Path = p
		src = append(src, e)
	}
	image, _ := packSource(t, src, Options{})
	mounted := kernelMount(t, image)
	listed, err := os.ReadDir(filepath.Join(mounted, "dir"))
	if err != nil || len(listed) != names+2 {
		t.Errorf("%d of %d names listed, %v", len(listed), names, err)
	}
	for _, e := range src {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mounted, e.Path), &st); err != nil || st.Mode != e.Mode || e.Link.Ino > 0 && st.Nlink != 3 {
			t.Fatalf("%s: mode %#o, %d links, %v", e.Path, st.Mode, st.Nlink, err)
		}
	}
	run(t, "unsquashfs", "-ll", image)
}

func TestPackFileSizes(t *testing.T) {
	testkit.NeedRoot(t)
	for _, bs := range []int{MinBlockSize, DefaultBlockSize, MaxBlockSize} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) {
			dir := t.TempDir()
			for _, kind := range []string{"random:x", "text", "zero"} {
				for _, size := range []int{0, 1, bs - 1, bs, bs + 1, 2*bs - 1, 2 * bs, 2*bs + 1} {
					treekit.Make(t, dir, fmt.Sprintf("data %s/%d 0644 %d %s", kind[:4], size, size, kind))
				}
			}
			treekit.Make(t, dir,
				fmt.Sprintf("sparse sparse/start 0644 %d %d:end", 4*bs, 4*bs-3),
				fmt.Sprintf("sparse sparse/tail 0644 %d 0:start", 3*bs+5),
				fmt.Sprintf("sparse sparse/middle 0644 %d %d:x", 9*bs, 4*bs+17),
				fmt.Sprintf("sparse sparse/none 0644 %d", 2*bs+9),
				fmt.Sprintf("sparse sparse/small 0644 %d", bs-1))
			image, _ := packDir(t, dir, Options{BlockSize: bs})
			judge(t, image, dir)
			mounted := kernelMount(t, image)
			for name, allocated := range map[string]int{"start": bs, "tail": bs, "middle": bs, "none": 0} {
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(mounted, "sparse", name), &st); err != nil || st.Blocks != int64(allocated/512) {
					t.Errorf("sparse/%s: %d blocks of 512 bytes, want %d, %v", name, st.Blocks, allocated/512, err)
				}
			}
		})
	}
}

// A file beyond 4 GiB needs an extended inode, and one that is nearly all holes
// takes neither time nor space.
func TestPackHugeSparse(t *testing.T) {
	testkit.NeedRoot(t)
	const size = 5<<30 + 77
	dir := t.TempDir()
	treekit.Make(t, dir, fmt.Sprintf("sparse huge 0644 %d %d:island", size, int64(4)<<30+1000), "hardlink other huge")
	image, st := packDir(t, dir, Options{})
	if st.BytesOut > 64<<10 || st.BytesIn != size {
		t.Errorf("%d bytes in, %d out", st.BytesIn, st.BytesOut)
	}
	mounted := kernelMount(t, image)
	f, err := os.Open(filepath.Join(mounted, "huge"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got [8]byte
	if _, err := f.ReadAt(got[:], 4<<30+999); err != nil || string(got[:]) != "\x00island\x00" {
		t.Errorf("island reads as %q, %v", got, err)
	}
	var info unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &info); err != nil || info.Size != size || info.Nlink != 2 || info.Blocks > 2*DefaultBlockSize/512 {
		t.Errorf("stat %+v, %v", info, err)
	}
}

// Large and shared values stand out of line; most file systems cannot hold
// them, so the tree is a made-up one.
func TestPackXattrValues(t *testing.T) {
	value := func(n int, c string) []byte { return []byte(strings.Repeat(c, n)) }
	var src memSource
	for i, set := range [][]Xattr{
		{{Name: "user.a", Value: value(65536, "x")}},
		{{Name: "user.b", Value: value(65536, "x")}, {Name: "user.a", Value: nil}, {Name: "trusted.z", Value: value(128, "y")}},
		{{Name: "security.c", Value: value(129, "y")}, {Name: "user." + strings.Repeat("n", 250), Value: value(129, "y")}},
		{{Name: "user.b", Value: value(8192, "z")}, {Name: "user.c", Value: value(8191, "z")}, {Name: "user.d", Value: value(3, "z")}},
	} {
		for j := range 3 {
			e := memFile(fmt.Sprintf("%d-%d", i, j), nil)
			e.Xattrs = set
			src = append(src, e)
		}
	}
	// So many different sets that the id table takes two metadata blocks.
	for i := range 1100 {
		e := memFile(fmt.Sprintf("m-%04d", i), nil)
		e.Xattrs = []Xattr{{Name: "user.number", Value: []byte(fmt.Sprint(i))}}
		src = append(src, e)
	}
	out, _ := packMem(t, src, Options{})
	if len(out.b) > 80<<10 {
		t.Errorf("image of %d bytes: values are not shared", len(out.b))
	}
	mounted := kernelMount(t, out.onDisk(t))
	run(t, "unsquashfs", "-quiet", "-no-progress", "-strict-errors", "-dest", filepath.Join(t.TempDir(), "x"), "-excludes", out.onDisk(t), "0-*", "1-*", "3-*")
	for _, e := range src {
		for _, x := range e.Xattrs {
			buf := make([]byte, 70000)
			n, err := unix.Lgetxattr(filepath.Join(mounted, e.Path), x.Name, buf)
			if err != nil || string(buf[:n]) != string(x.Value) {
				t.Errorf("%s: %.20s has %d bytes of %d, %v", e.Path, x.Name, n, len(x.Value), err)
			}
		}
	}
}

// The id table's length is a 16-bit number, so 65,536 ids are already one too
// many (mksquashfs 4.5.1 then writes an image that says it has none).
func TestPackIDs(t *testing.T) {
	ids := func(n int) memSource {
		var src memSource // the root has id 0
		for i := 1; i < n; i++ {
			e := memFile(fmt.Sprintf("%05d", i), nil)
			e.UID, e.GID = uint32(i)<<15, uint32(i)<<15
			src = append(src, e)
		}
		return src
	}
	out, _ := packMem(t, ids(65535), Options{})
	mounted := kernelMount(t, out.onDisk(t))
	for _, i := range []int{1, 2047, 2048, 65533, 65534} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mounted, fmt.Sprintf("%05d", i)), &st); err != nil || st.Uid != uint32(i)<<15 || st.Gid != st.Uid {
			t.Errorf("%d: owner %d:%d, %v", i, st.Uid, st.Gid, err)
		}
	}
	for _, n := range []int{65536, 65537} {
		if _, err := Pack(t.Context(), ids(n), &memOut{}, Options{}); err == nil || !strings.Contains(err.Error(), "65535: user or group id 2147450880 is one too many") {
			t.Errorf("%d ids: %v", n, err)
		}
	}
}

// The options block is the one mksquashfs writes for the same wishes.
func TestPackCompressorOptions(t *testing.T) {
	testkit.NeedTool(t, "mksquashfs")
	dir := t.TempDir()
	treekit.Make(t, dir, "file f 0644 text")
	for _, c := range []struct {
		opt  Options
		argv []string
	}{
		{Options{}, []string{"-comp", "gzip"}},
		{Options{Level: 3}, []string{"-comp", "gzip", "-Xcompression-level", "3"}},
		{Options{Level: 9}, []string{"-comp", "gzip", "-Xcompression-level", "9"}},
		{Options{Compressor: Zstd, Level: 15}, []string{"-comp", "zstd"}},
		{Options{Compressor: Zstd, Level: 3}, []string{"-comp", "zstd", "-Xcompression-level", "3"}},
		{Options{Compressor: LZ4}, []string{"-comp", "lz4"}},
		{Options{Compressor: LZ4, Level: maxLZ4Level}, []string{"-comp", "lz4", "-Xhc"}},
		{Options{Compressor: XZ}, []string{"-comp", "xz"}},
		{Options{Compressor: XZ, DictSize: 64 << 10}, []string{"-comp", "xz", "-Xdict-size", "64K"}},
		{Options{Compressor: XZ, DictSize: 96 << 10}, []string{"-comp", "xz", "-Xdict-size", "96K"}},
		{Options{Compressor: None}, []string{"-noI", "-noD", "-noF", "-noX"}},
	} {
		theirs := filepath.Join(t.TempDir(), "theirs.sqsh")
		run(t, "mksquashfs", append([]string{dir, theirs, "-noappend", "-no-progress", "-quiet"}, c.argv...)...)
		want := openImage(t, theirs)
		image, _ := packDir(t, dir, c.opt)
		got := openImage(t, image)
		if got.sb.Compressor != want.sb.Compressor || (got.options == nil) != (want.options == nil) ||
			got.options != nil && *got.options != *want.options {
			t.Errorf("%q: %v with %+v, want %v with %+v", c.argv, got.sb.Compressor, got.options, want.sb.Compressor, want.options)
		}
		if stored := uint16(flagUncompressedInodes | flagUncompressedData | flagUncompressedFragments | flagUncompressedXattrs); got.sb.Flags&stored != want.sb.Flags&stored {
			t.Errorf("%q: flags %#x, want %#x", c.argv, got.sb.Flags, want.sb.Flags)
		}
	}
}
