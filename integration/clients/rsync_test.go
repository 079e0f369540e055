// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// Everything a root file system holds goes there and comes back the same.
func TestRsync(t *testing.T) {
	local := t.TempDir()
	lines := []string{"dir t 0755", "data t/big 0600 3000000 random:4", "data t/text 0644 200000 text", "file t/suid 4755 x", "file t/d/sgid 2711 y", "dir t/sticky 1777",
		"hardlink t/hard t/big", "hardlink t/d/hard2 t/big", "symlink t/link /etc/absolute", "symlink t/dangling ../../nowhere", "fifo t/fifo 0640",
		"xattr t/text user.note=a value", "xattr t/d user.dir=0x00ff", "owner t/d 1000:1001", "owner t/link 5:6", `file "t/odd \n name" 0600 z`,
		"sparse t/sparse 0644 20000000 9000000:island", "mtime t/text 1000000000", "mtime t/d 1000000001", "mtime t/link 1000000002"}
	devices := []string{"char t/char 1 3 0666", "block t/block 7 200 0600"}
	tree.Make(t, local, lines...)
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		from := filepath.Join(local, "t")
		var but []tree.Option
		if g.level != chroot { // which may not make device nodes in a container that could open them
			from = filepath.Join(t.TempDir(), "t")
			must(t, exec.Command("cp", "-a", filepath.Join(local, "t"), from))
			tree.Make(t, filepath.Dir(from), devices...)
			but = append(but, tree.NoMtime) // rsync leaves the times of devices
		}
		rsync := func(args ...string) string {
			t.Helper()
			cmd := client("rsync", append([]string{"-e", "ssh -S none -F " + g.config}, args...)...)
			return must(t, cmd)
		}
		back := filepath.Join(t.TempDir(), "t")
		rsync("-aHAXS", "--numeric-ids", from+"/", "job:"+there+"/to/")
		tree.Equal(t, from, filepath.Join(here, "to"), but...)
		rsync("-aHAXS", "--numeric-ids", "job:"+there+"/to/", back+"/")
		tree.Equal(t, from, back, but...)
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(here, "to/sparse"), &st); err != nil || st.Blocks > 1000 {
			t.Errorf("the hole was filled: %d blocks, %v", st.Blocks, err)
		}
		if out := rsync("-aHAXSi", "--numeric-ids", "--delete", from+"/", "job:"+there+"/to/"); out != "" {
			t.Errorf("a second run finds to do:\n%s", out)
		}

		// What was broken off goes on, in place and from a partial file.
		data, err := os.ReadFile(filepath.Join(from, "big"))
		if err != nil {
			t.Fatal(err)
		}
		for _, how := range []string{"--inplace", "--partial", "--append-verify"} {
			save(t, filepath.Join(here, "part"), data[:2<<20])
			rsync(how, filepath.Join(from, "big"), "job:"+there+"/part")
			same(t, filepath.Join(here, "part"), data)
			save(t, filepath.Join(back, "part"), data[:1<<20])
			rsync(how, "job:"+there+"/part", filepath.Join(back, "part"))
			same(t, filepath.Join(back, "part"), data)
		}
	})
}

// A file that is nearly all hole on both disks, and no hole on its way.
func TestRsyncLarge(t *testing.T) {
	g := common(t, chroot)
	here, there := g.space(t)
	local := t.TempDir()
	size := int64(64 << 20)
	if soak() {
		size = 1 << 30
	}
	tree.Make(t, local, fmt.Sprintf("sparse file 0644 %d 30000000:island", size))
	rsh := "ssh -S none -F " + g.config
	must(t, client("rsync", "-aSW", "-e", rsh, filepath.Join(local, "file"), "job:"+there+"/file"))
	must(t, client("rsync", "-aSW", "-e", rsh, "job:"+there+"/file", filepath.Join(local, "back")))
	for _, path := range []string{filepath.Join(here, "file"), filepath.Join(local, "back")} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Size != size || st.Blocks > 10000 {
			t.Errorf("%s: %d bytes in %d blocks, %v", path, st.Size, st.Blocks, err)
		}
		must(t, exec.Command("cmp", path, filepath.Join(local, "file")))
	}
}
