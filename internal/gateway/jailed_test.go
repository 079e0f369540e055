// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// imageRoot makes a small image root of the host's own programs, more among them, and their libraries.
func imageRoot(t testing.TB, more ...string) string {
	t.Helper()
	testkit.NeedRoot(t)
	tools := []string{"bash", "sh", "cat", "env", "touch", "ls", "tty", "stty", "sleep", "mount", "head", "ln", "mkdir", "rmdir"}
	tools = append(tools, more...)
	testkit.NeedTool(t, append(tools, "ldd")...)
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, root,
		"dir etc 0755", "dir root 0700", "dir tmp 1777", "dir usr 0755", "dir usr/bin 0755", "symlink bin usr/bin",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/bash\n", "file etc/group 0644 root:x:0:\ntty:x:5:\n",
		"file etc/hostname 0644 the-image\n", "symlink etc/absolute /etc/hostname",
	)
	copyIn := func(path string) {
		b, err := os.ReadFile(path)
		if err == nil {
			os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755)
			err = os.WriteFile(filepath.Join(root, path), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	programs := []string{}
	for _, name := range tools {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(filepath.Join(root, "usr/bin", name), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		programs = append(programs, path)
	}
	self, err := os.Executable() // a test binary may be linked with the C library; sshd is not
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range append(programs, self) {
		f, err := elf.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		libs, _ := f.ImportedLibraries()
		f.Close()
		if len(libs) == 0 {
			continue
		}
		out, err := exec.Command("ldd", p).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", p, err)
		}
		for _, w := range strings.Fields(string(out)) {
			if strings.HasPrefix(w, "/") {
				copyIn(w)
			}
		}
	}
	return root
}

func TestJailed(t *testing.T) {
	j := start(t, options{root: imageRoot(t)})
	c := j.dial()
	for _, tt := range []struct{ command, out string }{
		{"cat /etc/hostname", "the-image\n"},
		{"echo ~root && sleep 0", "/root\n"},
		{"ls /mnt " + j.parent + " 2>/dev/null | head -1; echo end", "end\n"},
		{"echo $IMS_JOB_ID $IMS_ARCH", "11111111-2222-3333-4444-555555555555 x86_64\n"},
		{"pwd; echo $HOME $SHELL $USER", "/root\n/root /bin/bash root\n"},
		{"exec 3</dev/null && echo null", "null\n"},
	} {
		if out, code := execute(t, c, tt.command); out != tt.out || code != 0 {
			t.Errorf("%s: %q, %d; want %q", tt.command, out, code, tt.out)
		}
	}
	s := newSession(t, c)
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Output("tty; echo $SSH_TTY; echo to the terminal >/dev/tty"); err != nil || !strings.HasSuffix(string(out), "to the terminal\r\n") ||
		strings.Count(string(out), "/dev/pts/") != 2 {
		t.Errorf("terminal: %q, %v", out, err)
	}
	// Sessions on other connections share one view.
	execute(t, c, "echo shared > /tmp/file")
	if out, _ := execute(t, j.dial(), "cat /tmp/file"); out != "shared\n" {
		t.Errorf("another connection sees %q", out)
	}
	dir := t.TempDir()
	j.write(filepath.Join(dir, "up"), "uploaded\n")
	batch := filepath.Join(dir, "batch")
	j.write(batch, fmt.Sprintf("get /etc/absolute %[1]s/down\nput %[1]s/up /tmp/up\nsymlink ../up /tmp/link\n", dir))
	if out, errs, code := run(t, j.tool("sftp", "-b", batch, host)); code != 0 {
		t.Fatalf("sftp: %d %s%s", code, out, errs)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "down")); string(got) != "the-image\n" {
		t.Errorf("an absolute link over sftp gave %q", got)
	}
	if out, _ := execute(t, c, "cat /tmp/up"); out != "uploaded\n" {
		t.Errorf("the uploaded file holds %q", out)
	}
	// No shell stands between the client and SFTP: what root's shell or its profile says would be taken for the protocol.
	passwd := filepath.Join(j.parent, "image-root/etc/passwd")
	was, err := os.ReadFile(passwd)
	if err != nil {
		t.Fatal(err)
	}
	noisy := "#!/bin/sh\necho welcome\nexec /bin/sh \"$@\"\n"
	if err := os.WriteFile(filepath.Join(j.parent, "image-root/usr/bin/noisy"), []byte(noisy), 0o755); err != nil {
		t.Fatal(err)
	}
	j.write(passwd, "root:x:0:0:root:/root:/bin/noisy\n")
	if out, _ := execute(t, c, "echo command"); out != "welcome\ncommand\n" {
		t.Errorf("the noisy shell: %q", out)
	}
	j.write(batch, fmt.Sprintf("get /tmp/up %s/back\n", dir))
	if out, errs, code := run(t, j.tool("sftp", "-b", batch, host)); code != 0 {
		t.Errorf("sftp with a noisy shell: %d %s%s", code, out, errs)
	}
	j.write(passwd, string(was))
	if st, err := os.Stat(j.parent); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the parent: %v, %v", st.Mode(), err)
	}
	if out, code := execute(t, c, "touch /tmp/complete; echo touched"); out != "touched\n" || code != 0 {
		t.Errorf("%q, %d", out, code)
	}
	if err := j.await(); err != nil || j.flags() != "ready exiting" {
		t.Errorf("%v, flags %q", err, j.flags())
	}
}

// The flag of a jailed job counts where the sessions see /tmp, also when that is a link or
// a mount; the plain mode's flag does not count.
func TestJailedFlags(t *testing.T) {
	for _, tt := range []struct{ name, command, left string }{
		{"link", "mkdir /var /var/tmp && rmdir /tmp && ln -s /var/tmp /tmp && touch /tmp/complete", "ready exiting"},
		{"failed", "touch /tmp/failed", "ready exiting image-root/tmp/failed"},
		{"both", "touch /tmp/complete /tmp/failed", "ready exiting image-root/tmp/failed"},
		{"failed on a mount", "touch /tmp/failed", "ready exiting image-root/tmp/failed"},
		{"complete on a mount", "touch /tmp/complete", "ready exiting"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := start(t, options{root: imageRoot(t)})
			if strings.Contains(tt.name, "mount") {
				mountInJail(t, j, "/tmp")
			}
			j.flag("complete") // the plain mode's place
			c := j.dial()
			if out, code := execute(t, c, tt.command); code != 0 {
				t.Fatalf("%q, %d", out, code)
			}
			c.Close()
			if err := j.await(); err != nil {
				t.Error(err)
			}
			os.Remove(filepath.Join(j.parent, "complete"))
			if got := j.flags(); got != tt.left {
				t.Errorf("flags left: %q, want %q", got, tt.left)
			}
		})
	}
}

// mountInJail mounts a tmpfs where only the sessions see it.
func mountInJail(t *testing.T, j *job, dir string) {
	t.Helper()
	if !strings.Contains(j.log.String(), "level=namespaces") {
		t.Skip("this machine does not allow the jail a mount namespace")
	}
	testkit.NeedTool(t, "nsenter")
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, l := range lists {
		pids, _ := os.ReadFile(l)
		for _, pid := range strings.Fields(string(pids)) {
			theirs, err := os.Readlink("/proc/" + pid + "/ns/mnt")
			if err != nil || theirs == ours {
				continue
			}
			if out, err := exec.Command("nsenter", "-t", pid, "-m", "-r", "-w", "mount", "-t", "tmpfs", "none", dir).CombinedOutput(); err != nil {
				t.Fatalf("mount in the jail: %v: %s", err, out)
			}
			return
		}
	}
	t.Fatal("the jail's init was not found")
}
