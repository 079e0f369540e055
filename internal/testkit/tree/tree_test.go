// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

var plain = []string{
	"dir etc 0755",
	"file etc/passwd 0644 root:x:0:0::/root:/bin/sh",
	"file bin/su 4755 x",
	"data var/blob 0600 100000 random:1",
	"data var/text 0600 5000 text",
	"sparse var/hole 0644 1048576 500000:island",
	"symlink boot/vmlinuz /boot/vmlinuz-6.4",
	"hardlink bin/sudo bin/su",
	"fifo run/pipe 0600",
	"sock run/sock",
	`file "odd name\n" 0644 text`,
	"mtime etc/passwd 1700000000.5",
	"mtime boot/vmlinuz 2024-01-02T03:04:05Z",
}

// TestDiffSeesEachProperty changes one thing at a time and wants exactly that reported.
func TestDiffSeesEachProperty(t *testing.T) {
	cases := map[string]struct {
		change string
		want   string
	}{
		"mode":        {"mode bin/su 0755", "bin/su: mode"},
		"mtime":       {"mtime etc/passwd 1700000000.25", "etc/passwd: mtime"},
		"new file":    {"file etc/new 0644", "etc/new: only in the second tree"},
		"setuid peer": {"mode bin/su 0755", "bin/sudo: mode"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			Make(t, dir, plain...)
			before, err := Take(dir)
			if err != nil {
				t.Fatal(err)
			}
			Make(t, dir, c.change)
			after, err := Take(dir)
			if err != nil {
				t.Fatal(err)
			}
			if d := before.Diff(after); !slices.ContainsFunc(d, func(s string) bool { return strings.HasPrefix(s, c.want) }) {
				t.Errorf("difference not seen: want %q in %q", c.want, d)
			}
		})
	}
}

func TestSameLinesSameTree(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	Make(t, a, plain...)
	Make(t, b, plain...)
	Equal(t, a, b, NoMtime)
	if d := Diff(a, b, Seconds, NoOwner); len(d) > 0 && !strings.Contains(d[0], "mtime") {
		t.Error(d)
	}
	if err := os.WriteFile(filepath.Join(b, "var/blob"), make([]byte, 100000), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := Diff(a, b, NoMtime); len(d) != 1 || !strings.HasPrefix(d[0], "var/blob: sha256") {
		t.Errorf("content change not seen: %q", d)
	}
	if err := os.Remove(filepath.Join(b, "bin/sudo")); err != nil {
		t.Fatal(err)
	}
	d := strings.Join(Diff(a, b, NoMtime), "\n")
	if !strings.Contains(d, "bin/su: hard links") || !strings.Contains(d, "bin/sudo: only in the first tree") {
		t.Errorf("lost hard link not seen: %s", d)
	}
}

func TestRootOnlyInodes(t *testing.T) {
	testkit.NeedRoot(t)
	a, b := t.TempDir(), t.TempDir()
	lines := []string{"char dev/null 1 3 0666", "block dev/loop0 7 0", "file f 0644 x", "owner f 12:34",
		"xattr f user.note=some text", "xattr f trusted.raw=0x0001ff", "symlink l f", "owner l 5:6"}
	Make(t, a, lines...)
	Make(t, b, lines...)
	Equal(t, a, b, NoMtime)
	Make(t, b, "owner l 5:7", "xattr f trusted.raw=0x00")
	if d := Diff(a, b, NoMtime); len(d) != 2 {
		t.Errorf("want two differences, got %q", d)
	}
}

func TestPlaceRefusesToLeave(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	Make(t, dir, "symlink out "+outside)
	if err := makeOne(dir, "file out/x 0644 escaped"); err == nil {
		t.Error("a file was written through a symlink that leaves the tree")
	}
	if err := makeOne(dir, "file ../../x 0644 y"); err != nil {
		t.Errorf("dot-dot must stop at the top: %v", err)
	}
}
