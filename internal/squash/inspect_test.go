// SPDX-License-Identifier: Apache-2.0

package squash

import (
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

// Info says of an image what unsquashfs says, whoever made it.
func TestInfoLikeUnsquashfs(t *testing.T) {
	testkit.NeedTool(t, "unsquashfs")
	dir := edgeTree(t)
	ours, _ := packDir(t, dir, Options{Compressor: Zstd, Level: 3, BlockSize: 64 << 10})
	for _, image := range []string{ours, mksquashfs(t, dir), mksquashfs(t, dir, "-comp", "lz4", "-no-exports", "-no-xattrs", "-no-fragments")} {
		cmd := exec.Command("unsquashfs", "-s", "-UTC", image)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		info := openImage(t, image).Info()
		want := []string{
			info.Created.Format("Creation or last append time Mon Jan _2 15:04:05 2006"),
			fmt.Sprintf("Filesystem size %d bytes", info.BytesUsed),
			fmt.Sprintf("Compression %v", info.Compressor),
			fmt.Sprintf("Block size %d", info.BlockSize),
			fmt.Sprintf("Number of fragments %d", info.Fragments),
			fmt.Sprintf("Number of inodes %d", info.Inodes),
			fmt.Sprintf("Number of ids %d", info.IDs),
		}
		for flag, line := range map[string]string{"exportable": "Filesystem is exportable via NFS", "duplicates": "Duplicates are removed"} {
			if slices.Contains(info.Flags, flag) != strings.Contains(string(out), line) {
				t.Errorf("flags %q, unsquashfs says\n%s", info.Flags, out)
			}
		}
		if info.XattrIDs > 0 {
			want = append(want, fmt.Sprintf("Number of xattr ids %d", info.XattrIDs))
		}
		for _, line := range want {
			if !strings.Contains(string(out), line) {
				t.Errorf("unsquashfs does not say %q, but\n%s", line, out)
			}
		}
	}
}

// A file the disk cannot give back ends packing with its path. Here the disk is
// an image with a damaged block.
func TestDirSourceUnreadable(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	treekit.Make(t, dir, "file etc/first", "data lib/damaged 0644 131072 text")
	image := mksquashfs(t, dir, "-no-fragments")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, 8), openDamaged(t, image))
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image.sqsh")
	_, err = PackFile(t.Context(), dirSourceOf(t, kernelMount(t, image), DirOptions{}), path, Options{})
	if !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "lib/damaged") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an image is there: %v", err)
	}
}

// openDamaged returns where in an image the data of lib/damaged begins.
func openDamaged(t *testing.T, image string) int64 {
	t.Helper()
	ino, err := openImage(t, image).resolve("lib/damaged", true)
	if err != nil || ino.Blocks[0]&(1<<24) != 0 {
		t.Fatalf("%v, or the block is not compressed", err)
	}
	return ino.Start
}
