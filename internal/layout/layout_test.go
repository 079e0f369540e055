// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no record: %v", err)
	}
	want := Record{URLPath: "/boot-images/x/rootfs", Size: 5, MD5: "00ff"}
	for range 2 { // a second one replaces the first
		if err := Write(dir, want); err != nil {
			t.Fatal(err)
		}
		if got, err := Read(dir); err != nil || got != want {
			t.Errorf("%+v %v", got, err)
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Errorf("%v %v", names, err)
	}
	if info, err := os.Stat(filepath.Join(dir, recordFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

// What the user put there is not followed, waited for, or believed.
func TestOpenRefuses(t *testing.T) {
	for name, put := range map[string]func(string) error{
		"link":      func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"nonsense":  func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) },
		"endless":   func(p string) error { return os.WriteFile(p, []byte(`"`+strings.Repeat("x", 1<<20)), 0o600) },
	} {
		dir := t.TempDir()
		if err := put(filepath.Join(dir, recordFile)); err != nil {
			t.Fatal(err)
		}
		if r, err := Read(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v %v", name, r, err)
		}
	}
}

// FuzzRead reads what anybody may have put in the record's place: what is taken can be written and read again.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"urlPath":"/boot-images/x/rootfs","size":5,"md5":"00ff"}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(filepath.Join(dir, recordFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Read(dir)
		if err != nil {
			return
		}
		if err := Write(dir, r); err != nil {
			t.Fatal(err)
		}
		if again, err := Read(dir); err != nil || again != r {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}
