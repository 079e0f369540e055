// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"debug/elf"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// programs are what an image holds for the clients' sake and for these tests.
var programs = []string{
	"bash", "cat", "chmod", "cp", "date", "dd", "echo", "env", "flock", "git", "head", "id", "ln", "ls", "mkdir", "mkfifo", "mktemp", "mv", "nohup",
	"printf", "pwd", "python3", "rm", "rsync", "scp", "setsid", "sha256sum", "sleep", "sort", "stat", "stty", "tail", "touch", "true", "tty", "wc",
}

// imageRoot makes, once, a root of the machine's own programs with what they need, which
// is less than any package manager installs. Gateways share its files by hard links.
func imageRoot(t testing.TB) string {
	t.Helper()
	if shared.template != "" {
		return shared.template
	}
	testkit.NeedTool(t, append(programs, "ldd", "cp")...)
	root := filepath.Join(shared.dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, root,
		"dir dev 0755", "dir etc 0755", "dir proc 0755", "dir root 0700", "dir run 0755", "dir sys 0755", "dir tmp 1777", "dir usr/bin 0755", "dir usr/lib 0755",
		"dir usr/lib64 0755", "symlink bin usr/bin", "symlink lib usr/lib", "symlink lib64 usr/lib64", "symlink usr/bin/sh bash",
		"symlink usr/bin/git-upload-pack git", "symlink usr/bin/git-receive-pack git",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/:/bin/sh\n", "file etc/group 0644 root:x:0:\ntty:x:5:\nuser:x:1000:\n",
		"file etc/hostname 0644 the-image\n", "file tmp/.keep")
	need := map[string]bool{}
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		must(t, exec.Command("cp", "-L", path, filepath.Join(root, "usr/bin", name)))
		libraries(t, path, need)
	}
	modules := strings.TrimSpace(must(t, exec.Command("python3", "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))")))
	err := filepath.WalkDir(modules, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch d.Name() {
		case "__pycache__", "test", "idlelib", "lib2to3", "pydoc_data", "ensurepip", "tkinter", "dist-packages":
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ".so") {
			libraries(t, path, need)
		}
		if d.Type().IsRegular() {
			need[path] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for path := range need {
		all = append(all, path)
	}
	must(t, exec.Command("cp", append([]string{"-L", "--parents", "-t", root}, all...)...))
	shared.template = root
	return root
}

// libraries adds what a program is linked with.
func libraries(t testing.TB, path string, need map[string]bool) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	imported, _ := f.ImportedLibraries()
	f.Close()
	if len(imported) == 0 {
		return
	}
	for _, word := range strings.Fields(must(t, exec.Command("ldd", path))) {
		if strings.HasPrefix(word, "/") {
			need[word] = true
		}
	}
}
