// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/squashfs"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

var long = flag.Bool("long", false, "make the edge tree as large as it is meant to be; takes minutes and some GiB of memory")

// edgeSizes is what makes the edge tree large or not.
type edgeSizes struct {
	names  int   // in one directory
	sparse int64 // bytes
	ids    int
}

// makeEdgeTree makes what is hard to pack in a directory whose file system
// holds large attributes and any time. It returns what changes when packed: a
// warning for each, which is undone in the tree.
func makeEdgeTree(t *testing.T, dir string, size edgeSizes) (warnings []string, undo func()) {
	value := strings.Repeat("a value of sixty kilobytes ", 60<<10/27)
	lines := []string{
		"file cap 0755 x", "xattr cap security.capability=0x0100000202200000000000000000000000000000",
		"xattr cap trusted.large=" + value, "file cap2 0755 y", "xattr cap2 trusted.large=" + value, "xattr cap2 trusted.mine=1",
		fmt.Sprintf("sparse sparse 0600 %d %d:island", size.sparse, size.sparse-100_000), "hardlink sparse-too sparse",
		"symlink long " + strings.Repeat("/4000", 800), "file none 0", "dir shut 0", "file shut/in 0400 hidden", "file suid 06755 x",
		"char null 1 3", "block loop 7 4095", "fifo pipe", "sock sock", "owner sock 4294967294:4294967294",
		"mtime null 0", "mtime pipe 4294967295",
		"file early", "mtime early -1", "file late", "mtime late 4294967296", "file later", "mtime later 9200000000",
		"file acl 0644 x", "dir opaque", "xattr opaque trusted.overlay.opaque=y", "xattr opaque trusted.kept=1",
	}
	odd := make([]byte, 0, 254)
	for c := byte(1); c != 0; c++ {
		if c != '/' {
			odd = append(odd, c)
		}
	}
	for _, name := range []string{string(odd), "-rf", "...", " ", "\n", "\xff\xfe", strings.Repeat("ä", 127), "\x1b[31m", `back\slash`, "CON", "*"} {
		lines = append(lines, fmt.Sprintf("file %q 0644 odd", "odd/"+name))
	}
	for i := range size.ids {
		lines = append(lines, fmt.Sprintf("file ids/%d 0644 %d", i, i), fmt.Sprintf("owner ids/%d %d:%d", i, i*65537, 4294967290-i))
	}
	treekit.Make(t, dir, lines...)
	if err := os.Mkdir(filepath.Join(dir, "many"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range size.names {
		if err := os.WriteFile(filepath.Join(dir, "many", fmt.Sprintf("%d-of-a-large-directory", i*7919%size.names)), fmt.Append(nil, i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const acl = "system.posix_acl_access"
	entries := []byte("\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" +
		"\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff")
	if err := unix.Setxattr(filepath.Join(dir, "acl"), acl, entries, 0); err != nil {
		t.Fatal(err)
	}
	warnings = []string{
		"acl: extended attribute system.posix_acl_access left out: SquashFS holds user., trusted. and security. only",
		"early: modification time -1 s became 0: SquashFS holds 1970 to 2106 only",
		"late: modification time 4294967296 s became 4294967295: SquashFS holds 1970 to 2106 only",
		"later: modification time 9200000000 s became 4294967295: SquashFS holds 1970 to 2106 only",
	}
	return warnings, func() {
		err := errors.Join(unix.Removexattr(filepath.Join(dir, "acl"), acl), unix.Removexattr(filepath.Join(dir, "opaque"), "trusted.overlay.opaque"))
		if err != nil {
			t.Fatal(err)
		}
		treekit.Make(t, dir, "mtime early 0", fmt.Sprintf("mtime late %d", uint32(math.MaxUint32)), fmt.Sprintf("mtime later %d", uint32(math.MaxUint32)))
	}
}

// A tree with everything in it survives, judged by the kernel, unsquashfs, our
// own reader and rdsquashfs; what the format cannot hold is reported by path.
func TestPackEdgeTree(t *testing.T) {
	testkit.NeedRoot(t)
	size := edgeSizes{names: 2000, sparse: 20 << 20, ids: 300}
	if *long {
		size = edgeSizes{names: 70_000, sparse: 5 << 30, ids: 6000}
	}
	volume := t.TempDir()
	mounted(t, "-t", "tmpfs", "none", volume) // ext4 holds no attributes of 60 KiB
	t.Setenv("TMPDIR", volume)
	for _, opt := range []Options{{}, {Compressor: Zstd, BlockSize: MaxBlockSize}} {
		t.Run(fmt.Sprint(opt.BlockSize), func(t *testing.T) {
			dir := t.TempDir()
			want, undo := makeEdgeTree(t, dir, size)
			image, st := packDir(t, dir, opt)
			if !slices.Equal(st.Warnings, want) {
				t.Errorf("warnings %q", st.Warnings)
			}
			undo()
			judge(t, image, dir)
		})
	}
}

// go-diskfs has a reader of its own, which is able to read trees without
// attributes, links and special bits, in all compressors but lz4; so it is one
// more judge of those.
func TestPackJudgedByDiskfs(t *testing.T) {
	dir := t.TempDir()
	treekit.Make(t, dir, "file etc/passwd 0644 root", "file etc/empty 0600", "data lib/random 0644 300000 random:1",
		"data lib/text 0644 500000 text", "data lib/exact 0644 131072 text", "sparse lib/sparse 0644 400000 200000:island", "dir none")
	for i := range 700 {
		treekit.Make(t, dir, fmt.Sprintf("file many/with-a-rather-long-name-%04d 0644 %d", i, i))
	}
	for _, opt := range []Options{{}, {BlockSize: MinBlockSize}, {Compressor: Zstd}, {Compressor: XZ}} {
		t.Run(fmt.Sprintf("%v-%d", opt.Compressor, opt.BlockSize), func(t *testing.T) {
			image, st := packDir(t, dir, opt)
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			theirs, err := squashfs.Read(file.New(f, true), st.BytesOut, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if err != nil || p == dir {
					return err
				}
				name, _ := filepath.Rel(dir, p)
				if d.IsDir() {
					want, err := os.ReadDir(p)
					if err != nil {
						return err
					}
					if got, err := theirs.ReadDir(name); err != nil || len(got) != len(want) {
						t.Errorf("%s: %d names of %d, %v", name, len(got), len(want), err)
					}
					return nil
				}
				want, err := os.ReadFile(p)
				if err != nil {
					return err
				}
				if got, err := theirs.ReadFile(name); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
