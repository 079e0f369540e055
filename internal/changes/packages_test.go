// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	treekit "github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

var versions = strings.Fields(`1 1.0 1.00 1.0-1 1.0-2 1.0-10 1:0.1 0:1.0 2:1 10:1 1.0~rc1 1.0~rc1-1 1.0~~ 1.0~ 1.0+b1 1.0a 1.0b 1.0.1 1.a 1.0-1~bpo1
	1.0-1+deb12u1 1.0-1+deb12u10 7 7a a7 a 1.0z 1.10 1.9 1.09 99999999999999999999.1 99999999999999999998.1 1.0^git1 1.0^ 1.0^git1.1 1..0 1.0. 5.fc40 5.el9`)

// judged compares all pairs of versions with what a tool says: -1, 0 or 1 a line.
func judged(t *testing.T, list []string, compare func(a, b string) int, out []byte, err error) {
	t.Helper()
	said := strings.Fields(string(out))
	if err != nil || len(said) != len(list)*len(list) {
		t.Fatalf("%d answers: %v", len(said), err)
	}
	for i, a := range list {
		for j, b := range list {
			if got, want := fmt.Sprint(compare(a, b)), said[i*len(list)+j]; got != want {
				t.Errorf("%q and %q: got %s, want %s", a, b, got, want)
			}
		}
	}
}

func TestDpkgVersions(t *testing.T) {
	testkit.NeedTool(t, "dpkg", "sh")
	list := slices.DeleteFunc(slices.Clone(versions), func(v string) bool { return v[0] == 'a' || strings.Contains(v, "^") })
	script := `for a; do for b; do if dpkg --compare-versions "$a" lt "$b"; then echo -1; elif dpkg --compare-versions "$a" eq "$b"; then echo 0; else echo 1; fi; done; done`
	list = list[:14]
	out, err := exec.Command("sh", append([]string{"-c", script, "sh"}, list...)...).Output()
	judged(t, list, compareDpkgVersions, out, err)
}

func TestRPMVersions(t *testing.T) {
	testkit.NeedTool(t, "rpm")
	var lua strings.Builder
	fmt.Fprintf(&lua, "%%{lua:\nlocal l = {\"%s\"}\nfor i = 1, #l do for j = 1, #l do print(rpm.vercmp(l[i], l[j]) .. \" \") end end}", strings.Join(versions, `","`))
	out, err := exec.Command("rpm", "--eval", lua.String()).Output()
	judged(t, versions, compareRPMVersions, out, err)
}

func TestDpkg(t *testing.T) {
	old, next := t.TempDir(), t.TempDir()
	status := func(dir, name, text string) {
		treekit.Make(t, dir, "dir "+filepath.Dir(name))
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	entry := func(name, arch, version, state string) string {
		return fmt.Sprintf("Package: %s\nStatus: install ok %s\nArchitecture: %s\nDescription: x\n Package: not\n .\nVersion: %s\n\n", name, state, arch, version)
	}
	status(old, "var/lib/dpkg/status", entry("gone", "all", "1", "installed")+entry("up", "amd64", "1.0-1", "installed")+entry("up", "i386", "1.0-1", "installed")+
		entry("down", "all", "2:1", "installed")+entry("conf", "all", "1", "installed")+entry("same", "all", "1", "installed"))
	status(next, "var/lib/dpkg/status", entry("up", "amd64", "1.0-10", "installed")+entry("up", "i386", "1.0-1", "installed")+
		entry("down", "all", "1:9", "unpacked")+entry("conf", "all", "1", "config-files")+entry("same", "all", "1", "installed"))
	status(next, "var/lib/dpkg/status.d/base", "Package: <b>x\x1b[2J\nVersion: 1\nArchitecture: all\n")
	status(next, "var/lib/dpkg/status.d/base.md5sums", "Package: no\nVersion: 1\n")
	r := compare(t, packed(t, old, squash.Options{}), packed(t, next, squash.Options{}))
	want := []PackageChange{
		{"dpkg", "<b>x\x1b[2J", "all", "added", "", "1"},
		{"dpkg", "conf", "all", "removed", "1", ""},
		{"dpkg", "down", "all", "downgraded", "2:1", "1:9"},
		{"dpkg", "gone", "all", "removed", "1", ""},
		{"dpkg", "up", "amd64", "upgraded", "1.0-1", "1.0-10"},
	}
	if !slices.Equal(r.Packages, want) {
		t.Errorf("got %+v", r.Packages)
	}
	if len(r.Notes) > 0 || r.Old.Packages != 6 || r.New.Packages != 5 {
		t.Errorf("%d and %d packages, notes %q", r.Old.Packages, r.New.Packages, r.Notes)
	}
}

// rpmPackages builds a package with an epoch and forty of growing size.
func rpmPackages(t *testing.T, dir string, release int) []string {
	t.Helper()
	var spec strings.Builder
	fmt.Fprintf(&spec, "Name: alpha\nEpoch: 2\nVersion: 1.0\nRelease: %d\nSummary: s\nLicense: none\nBuildArch: noarch\n%%description\nd\n%%files\n", release)
	for i := range 40 {
		fmt.Fprintf(&spec, "%%package -n sub%d\nSummary: s\n%%description -n sub%d\n%s\n%%files -n sub%d\n", i, i, strings.Repeat("x", 1+i*400), i)
	}
	file := filepath.Join(dir, "p.spec")
	if err := os.WriteFile(file, []byte(spec.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := runTool("rpmbuild", "-bb", "--define", "_topdir "+dir, "--define", "_rpmdir "+dir+"/rpms", file); err != nil {
		t.Fatal(err)
	}
	list, err := filepath.Glob(dir + "/rpms/noarch/*.rpm")
	if err != nil || len(list) != 41 {
		t.Fatalf("%d packages: %v", len(list), err)
	}
	slices.Sort(list)
	return list
}

// queryRPM lists a database with rpm itself.
func queryRPM(t *testing.T, dir, backend string) []string {
	t.Helper()
	out, err := exec.Command("rpm", "--dbpath", dir, "--define", "_db_backend "+backend, "-qa", "--qf",
		`%{NAME} %{ARCH} %|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}\n`).Output()
	if err != nil {
		t.Fatal(err)
	}
	list := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(list)
	return list
}

// readerOf opens a file for one of the database readers.
func readerOf(t testing.TB, name string) (*bytes.Reader, int64) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.NewReader(b), int64(len(b))
}

// writeNDB writes headers as rpm's NDB backend does, with a removed one before
// the last.
func writeNDB(name string, headers [][]byte) error {
	const pages = 1
	b := make([]byte, pages*4096)
	copy(b, "RpmP")
	binary.LittleEndian.PutUint32(b[12:], pages)
	for at := 32; at < len(b); at += 16 {
		copy(b[at:], "Slot")
	}
	for i, h := range headers {
		slot := b[32+16*i:]
		if i == len(headers)-1 {
			slot = slot[16:] // leaves an empty one
		}
		binary.LittleEndian.PutUint32(slot[4:], uint32(i+1))
		binary.LittleEndian.PutUint32(slot[8:], uint32(len(b)/16))
		blob := append([]byte("BlbS"), make([]byte, 12)...)
		binary.LittleEndian.PutUint32(blob[4:], uint32(i+1))
		binary.LittleEndian.PutUint32(blob[12:], uint32(len(h)))
		blob = append(append(blob, h...), make([]byte, 16)...)
		b = append(b, append(blob, make([]byte, -len(blob)&15)...)...)
	}
	return os.WriteFile(name, b, 0o644)
}

// writeBDB has Berkeley DB's own tool make the hash.
func writeBDB(t *testing.T, name, pageSize string, headers [][]byte) {
	t.Helper()
	var dump strings.Builder
	fmt.Fprintf(&dump, "VERSION=3\nformat=bytevalue\ntype=hash\ndb_pagesize=%s\nHEADER=END\n 00000000\n 29000000\n", pageSize)
	for i, h := range headers {
		fmt.Fprintf(&dump, " %08x\n %x\n", binary.LittleEndian.AppendUint32(nil, uint32(i+1)), h)
	}
	dump.WriteString("DATA=END\n")
	cmd := exec.Command("db5.3_load", name)
	cmd.Stdin = strings.NewReader(dump.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("db5.3_load: %v\n%s", err, out)
	}
}

// TestRPM has rpm make a database, and db5.3_load a hash of the same headers,
// which rpm must read as we do.
func TestRPM(t *testing.T) {
	testkit.NeedTool(t, "rpm", "rpmbuild", "db5.3_load")
	t.Setenv("HOME", t.TempDir())
	work := t.TempDir()
	install := func(db string, files []string) {
		args := []string{"--dbpath", db, "--define", "_db_backend sqlite", "-i", "--justdb", "--nodeps", "--noscripts"}
		if err := runTool("rpm", append(args, files...)...); err != nil {
			t.Fatal(err)
		}
	}
	files := rpmPackages(t, work, 1)
	sqlite := filepath.Join(work, "sqlite")
	install(sqlite, files)
	var headers [][]byte
	f, size := readerOf(t, sqlite+"/rpmdb.sqlite")
	if err := readSQLite(t.Context(), f, size, func(h []byte) error {
		headers = append(headers, bytes.Clone(h))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := queryRPM(t, sqlite, "sqlite")
	if len(want) != 41 {
		t.Fatalf("rpm lists %d packages", len(want))
	}
	for _, page := range []string{"512", "4096"} {
		dir := filepath.Join(work, "bdb"+page)
		treekit.Make(t, work, "dir bdb"+page)
		writeBDB(t, dir+"/Packages", page, headers)
		if got := queryRPM(t, dir, "bdb_ro"); !slices.Equal(got, want) {
			t.Fatalf("rpm reads another list from the hash: %q", got)
		}
	}
	treekit.Make(t, work, "dir ndb")
	if err := writeNDB(work+"/ndb/Packages.db", headers); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		sqlite + "/rpmdb.sqlite":        "usr/lib/sysimage/rpm/rpmdb.sqlite",
		work + "/ndb/Packages.db":       "usr/lib/sysimage/rpm/Packages.db",
		work + "/bdb512/Packages":       "var/lib/rpm/Packages",
		work + "/bdb4096/Packages":      "var/lib/rpm/Packages",
		work + "/sqlite/./rpmdb.sqlite": "var/lib/rpm/rpmdb.sqlite",
	} {
		root := t.TempDir()
		treekit.Make(t, root, "dir "+filepath.Dir(to))
		if err := runTool("cp", from, filepath.Join(root, to)); err != nil {
			t.Fatal(err)
		}
		list, err := readRPM(t.Context(), packed(t, root, squash.Options{}))
		if err != nil {
			t.Fatalf("%s: %v", to, err)
		}
		var got []string
		for _, p := range list {
			got = append(got, p.name+" "+p.arch+" "+p.version)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", to, got, want)
		}
	}
	t.Run("log", func(t *testing.T) {
		root := t.TempDir()
		treekit.Make(t, root, "dir usr/lib/sysimage/rpm", "symlink var/lib/rpm ../../usr/lib/sysimage/rpm", "file usr/lib/sysimage/rpm/rpmdb.sqlite 0644 x", "file usr/lib/sysimage/rpm/rpmdb.sqlite-wal 0644 x")
		img := packed(t, root, squash.Options{})
		r := compare(t, packed(t, t.TempDir(), squash.Options{}), img)
		if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "write-ahead log") || len(r.Packages) > 0 {
			t.Errorf("notes %q", r.Notes)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		for _, name := range []string{sqlite + "/rpmdb.sqlite", work + "/ndb/Packages.db", work + "/bdb512/Packages", work + "/bdb4096/Packages"} {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			for range 30 {
				c := bytes.Clone(b)
				for range 1 + rnd.IntN(40) {
					// Headers of pages are near their beginning, and pages are many.
					c[min(len(c)-1, rnd.IntN(len(c)/512)*512+rnd.IntN(64))] = byte([]int{0, 1, 2, 7, 13, 255, rnd.IntN(256)}[rnd.IntN(7)])
				}
				if rnd.IntN(8) == 0 {
					c = c[:rnd.IntN(len(c))]
				}
				readAll(c)
			}
		}
	})
}

// readAll gives bytes to every reader; that none panics or goes on for ever is all
// that is asked of them.
func readAll(b []byte) {
	for _, db := range rpmDatabases {
		_ = db.read(context.Background(), bytes.NewReader(b), int64(len(b)), func(h []byte) error {
			_, err := parseRPMHeader(h)
			return err
		})
	}
	_, _ = parseRPMHeader(b)
}

func FuzzPackageDatabases(f *testing.F) {
	var ndb bytes.Buffer
	ndb.WriteString("RpmP\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00")
	ndb.Write(make([]byte, 16))
	ndb.WriteString(strings.Repeat("Slot\x01\x00\x00\x00\x00\x01\x00\x00\x01\x00\x00\x00", 254))
	ndb.WriteString("BlbS\x01\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00")
	ndb.WriteString("\x00\x00\x00\x00\x00\x00\x00\x00.......")
	f.Add(ndb.Bytes())
	sqlite := make([]byte, 1024)
	copy(sqlite, "SQLite format 3\x00\x02\x00")
	copy(sqlite[100:], "\x0d\x00\x00\x00\x01\x01\x00\x00\x01\x00")
	copy(sqlite[256:], "\x20\x01\x06\x17\x1d\x1d\x01\x00tablePackagesPackages\x02")
	copy(sqlite[512:], "\x0d\x00\x00\x00\x01\x00\x40\x00\x00\x40")
	f.Add(sqlite)
	bdb := make([]byte, 1536)
	copy(bdb[12:], "\x61\x15\x06\x00\x09\x00\x00\x00\x00\x02\x00\x00\x00\x08")
	copy(bdb[512+16:], "\x00\x00\x00\x00\x02\x00\x00\x00\x00\x0d\xfb\x01\xe0\x01")
	copy(bdb[512+480:], "\x03\x00\x00\x00\x02\x00\x00\x00\x20\x00\x00\x00")
	copy(bdb[1024+16:], "\x00\x00\x00\x00\x01\x00\x20\x00\x00\x07")
	f.Add(bdb)
	f.Add([]byte("Package: a\nVersion: 1:2-3\nStatus: install ok installed\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		readAll(b)
		list, _ := parseDpkg(t.Context(), bytes.NewReader(b), nil)
		for i := range list[:max(0, len(list)-1)] {
			a, b := list[i].version, list[i+1].version
			if compareDpkgVersions(a, b) != -compareDpkgVersions(b, a) || compareRPMVersions(a, b) != -compareRPMVersions(b, a) {
				t.Errorf("%q and %q have no order", a, b)
			}
		}
	})
}

func TestManyVersionsOfAPackage(t *testing.T) {
	kernel := func(versions ...string) (list []pkg) {
		for _, v := range versions {
			list = append(list, pkg{"rpm", "kernel", "x86_64", v})
		}
		return list
	}
	got := packageChanges(kernel("5", "6"), kernel("6", "7", "8"), cmp.Compare[string])
	want := []PackageChange{{"rpm", "kernel", "x86_64", "added", "", "7"}, {"rpm", "kernel", "x86_64", "added", "", "8"}, {"rpm", "kernel", "x86_64", "removed", "5", ""}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
	got = packageChanges(kernel("5", "6"), kernel("6", "7"), cmp.Compare[string])
	if want := []PackageChange{{"rpm", "kernel", "x86_64", "upgraded", "5", "7"}}; !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
}
