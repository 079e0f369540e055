// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// batch is sftp(1) with commands that all have to succeed, but for those with a leading -.
func (g *gateway) batch(t *testing.T, lines string) string {
	t.Helper()
	cmd := g.tool(t, "sftp", "-q", "-b", "-", "job")
	cmd.Stdin = strings.NewReader(lines)
	return must(t, cmd)
}

func TestSFTP(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		local := t.TempDir()
		tree.Make(t, local, "data from 0751 3000000 random:5", "file old 0640 old", "file tree/sub/x 0644 x", "symlink tree/link ../../usr/./lib", "mtime from 1000000000")
		g.batch(t, fmt.Sprintf(`put -p %[1]s/from %[2]s/a
put %[1]s/old %[2]s/b
-rename -l %[2]s/a %[2]s/b
put -Rp %[1]s/tree %[2]s/
chmod 4755 %[2]s/a
chmod 2711 %[2]s/tree
symlink ../x/.//y %[2]s/link
symlink /etc/absolute %[2]s/absolute
ln %[2]s/b %[2]s/hard
get -p %[2]s/a %[1]s/back
`, local, there))
		same(t, filepath.Join(here, "b"), []byte("old")) // the old rename does not replace
		snap, err := tree.Take(here)
		if err != nil {
			t.Fatal(err)
		}
		if e := snap["a"]; e.Mode&0o7777 != 0o4755 || e.Mtime.Sec != 1000000000 {
			t.Errorf("a: %o, %d", e.Mode, e.Mtime.Sec)
		}
		if e := snap["tree"]; e.Mode&0o7777 != 0o2711 {
			t.Errorf("tree: %o", e.Mode)
		}
		if a, b := snap["link"].Target, snap["absolute"].Target; a != "../x/.//y" || b != "/etc/absolute" {
			t.Errorf("links to %q and %q", a, b)
		}
		if len(snap["hard"].Peers) != 1 {
			t.Errorf("the hard link: %+v", snap["hard"])
		}
		must(t, exec.Command("cmp", filepath.Join(local, "from"), filepath.Join(local, "back")))
		g.batch(t, fmt.Sprintf("rename %[1]s/a %[1]s/b\n", there)) // posix-rename does
		must(t, exec.Command("cmp", filepath.Join(local, "from"), filepath.Join(here, "b")))
	})
}

func TestLargeListing(t *testing.T) {
	g := common(t, chroot)
	here, there := g.space(t)
	const n = 50000
	for i := range n {
		if err := os.Link(filepath.Join(g.root, "etc/hostname"), filepath.Join(here, strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
	}
	for command, want := range map[string]int{"ls -1f": n, "ls -l": n, "ls -1fa": n + 2} {
		out := g.batch(t, command+" "+there+"\n")
		if got := strings.Count(out, "\n") - 1; got != want { // the command itself is a line
			t.Errorf("%s: %d names, want %d", command, got, want)
		}
	}
}

// A full disk is called that, and costs neither the session nor the file's space.
func TestDiskFull(t *testing.T) {
	g := own(t, settings{level: chroot, root: func(root string) {
		small := filepath.Join(root, "small")
		if err := os.Mkdir(small, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", small, "tmpfs", 0, "size=2m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	}})
	f, err := sftp.NewClient(g.dial(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := f.Create("/small/file")
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.ReadFrom(strings.NewReader(strings.Repeat("x", 4<<20)))
	var status *sftp.StatusError
	if !errors.As(err, &status) || !strings.Contains(status.Error(), "no space left on device") && !strings.Contains(status.Error(), "No space left on device") {
		t.Errorf("a full disk: %v", err)
	}
	w.Close()
	if err := f.Remove("/small/file"); err != nil {
		t.Error(err)
	}
	if out, errs, code := run(t, g.tool(t, "ssh", "job", "head -c 4000000 /dev/zero > /small/other")); code == 0 || !strings.Contains(errs, "No space left") {
		t.Errorf("a command on a full disk: %q, %q, %d", out, errs, code)
	}
}

// descendants are the processes below pid.
func descendants(t testing.TB, pid int) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	children := map[int][]int{}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var parent, child int
		fmt.Sscan(string(text), &child)
		fmt.Sscanf(string(text[strings.LastIndexByte(string(text), ')')+1:]), " %c %d", new(rune), &parent)
		children[parent] = append(children[parent], child)
	}
	for next := []int{pid}; len(next) > 0; next = next[1:] {
		next = append(next, children[next[0]]...)
		pids = append(pids, children[next[0]]...)
	}
	return pids
}

// memory is a line of /proc/PID/status in KiB.
func memory(t testing.TB, pid int, key string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in\n%s", key, text)
	return 0
}

// A large file costs the server's processes no memory, and no offset is cut to 32 bits.
func TestLargePut(t *testing.T) {
	size := int64(256 << 20)
	if soak() {
		size = 4<<30 + 1
	}
	g := own(t, settings{level: chroot})
	here, there := g.space(t)
	f, err := sftp.NewClient(g.dial(t), sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(256))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := f.Create(there + "/file")
	if err != nil {
		t.Fatal(err)
	}
	pids := append(descendants(t, g.cmd.Process.Pid), g.cmd.Process.Pid)
	if len(pids) < 3 {
		t.Fatalf("sshd, the jail's init and the SFTP server are %d processes", len(pids))
	}
	before := map[int]int{}
	for _, pid := range pids {
		before[pid] = memory(t, pid, "VmRSS")
	}
	if _, err := w.ReadFromWithConcurrency(io.LimitReader(zeros{}, size), 256); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("island"), 5<<30); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		grown := memory(t, pid, "VmHWM") - before[pid]
		t.Logf("process %d: %d KiB, then at most %d more", pid, before[pid], grown)
		if grown > 64<<10 {
			t.Errorf("process %d has grown by %d KiB", pid, grown)
		}
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	b := make([]byte, 7)
	local, err := os.Open(filepath.Join(here, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if n, err := local.ReadAt(b, 5<<30); string(b[:n]) != "island" || err != io.EOF {
		t.Errorf("at 5 GiB: %q, %v", b[:n], err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
