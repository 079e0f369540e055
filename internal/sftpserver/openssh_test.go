// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// opensshServer is where Debian and SUSE have OpenSSH's server.
const opensshServer = "/usr/lib/openssh/sftp-server"

// step is one request to both servers, which have to answer alike, or with an answer of ours that is not theirs.
type step struct {
	typ    uint8
	fields []any
	ours   string // if not empty: our answer, which is another than OpenSSH's
}

func do(typ uint8, fields ...any) step { return step{typ: typ, fields: fields} }
func ext(name string, fields ...any) step {
	return step{typ: typeExtended, fields: append([]any{name}, fields...)}
}
func (s step) unlike(ours string) step { s.ours = ours; return s }

var none = attrs{}

func mode(m uint32) attrs { return attrs{flags: attrMode, mode: m} }

func handle(n uint32) string {
	return string([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// populate makes the same tree for both servers.
func populate(t *testing.T, dir string) {
	t.Helper()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"file", "other", "third", "empty-dir/../sparse", "dir/inner", "dir/sub/deep", "raw\xff\xfename"} {
		ok(os.MkdirAll(filepath.Dir(at(name)), 0o755))
		ok(os.WriteFile(at(name), []byte("content of "+name+"\n"), 0o644))
	}
	ok(os.Mkdir(at("empty"), 0o755))
	ok(os.Mkdir(at("empty2"), 0o755))
	for link, to := range map[string]string{"link": "file", "dirlink": "dir/sub", "dangling": "nowhere", "loop": "loop",
		"up": "../", "abs": "/etc", "rawlink": "\xff\xfe/\x01", "chain": "dirlink"} {
		ok(os.Symlink(to, at(link)))
	}
	ok(unix.Mkfifo(at("fifo"), 0o600))
	ok(os.Chmod(at("file"), 0o4751))
	ok(os.Chmod(at("third"), 0o7000))
	ok(os.Chmod(at("empty2"), 0o1777))
	for i, name := range []string{"file", "other", "third", "dir/inner"} {
		tm := unix.Timeval{Sec: int64(1e9 + i*86400*40)}
		ok(unix.Utimes(at(name), []unix.Timeval{tm, tm}))
	}
	ok(unix.Truncate(at("sparse"), 300<<10))
}

var script = []step{
	// Names and links.
	do(typeRealpath, ""), do(typeRealpath, "."), do(typeRealpath, "/"), do(typeRealpath, "//etc//"), do(typeRealpath, "../.."),
	do(typeRealpath, "link"), do(typeRealpath, "link/"), do(typeRealpath, "link/.."), do(typeRealpath, "dirlink/.."),
	do(typeRealpath, "chain/deep"), do(typeRealpath, "chain/missing"), do(typeRealpath, "chain/missing/"), do(typeRealpath, "missing/x"),
	do(typeRealpath, "missing"), do(typeRealpath, "missing/.."), do(typeRealpath, "dangling"), do(typeRealpath, "dangling/"),
	do(typeRealpath, "loop"), do(typeRealpath, "loop/x"), do(typeRealpath, "up"), do(typeRealpath, "up/x"), do(typeRealpath, "abs/passwd"),
	do(typeRealpath, "file/x"), do(typeRealpath, "file/.."), do(typeRealpath, "raw\xff\xfename"), do(typeRealpath, "file\x00"),
	do(typeRealpath, strings.Repeat("x", 300)), do(typeRealpath, strings.Repeat("x/", 3000)), do(typeRealpath, strings.Repeat("./", 2000)),
	do(typeReadlink, "link"), do(typeReadlink, "rawlink"), do(typeReadlink, "file"), do(typeReadlink, "missing"), do(typeReadlink, "up"),
	do(typeSymlink, "../a\xffb", "newlink"), do(typeReadlink, "newlink"), do(typeSymlink, "x", "link"), do(typeSymlink, "", "emptylink"),
	do(typeSymlink, "/abs/olute", "abslink"), do(typeReadlink, "abslink"),
	// Attributes.
	do(typeStat, "file"), do(typeLstat, "file"), do(typeStat, "link"), do(typeLstat, "link"), do(typeStat, "dangling"),
	do(typeLstat, "dangling"), do(typeStat, "loop"), do(typeStat, "file/x"), do(typeStat, ""), do(typeStat, "fifo"), do(typeStat, "/dev/null"),
	do(typeSetstat, "file", mode(0o6755)), do(typeStat, "file"), do(typeSetstat, "empty", mode(0o1777)), do(typeStat, "empty"),
	do(typeSetstat, "file", mode(0o177777)), do(typeStat, "file"),
	do(typeSetstat, "link", mode(0o640)), do(typeStat, "file"), do(typeLstat, "link"),
	do(typeSetstat, "file", attrs{flags: attrSize, size: 5}), do(typeStat, "file"),
	do(typeSetstat, "file", attrs{flags: attrSize, size: 1 << 63}), do(typeSetstat, "empty", attrs{flags: attrSize}),
	do(typeSetstat, "file", attrs{flags: attrTimes, atime: 1, mtime: 0xfffffffe}), do(typeStat, "file"),
	do(typeSetstat, "file", attrs{flags: attrOwner, uid: 12, gid: 34}), do(typeStat, "file"),
	do(typeSetstat, "file", attrs{flags: attrOwner, uid: 0xffffffff, gid: 7}), do(typeStat, "file"),
	do(typeSetstat, "missing", mode(0o600)), do(typeSetstat, "missing", none), do(typeSetstat, "file", none),
	ext("lsetstat@openssh.com", "link", attrs{flags: attrTimes, atime: 5, mtime: 6}), do(typeLstat, "link"),
	ext("lsetstat@openssh.com", "link", attrs{flags: attrOwner, uid: 3, gid: 4}), do(typeLstat, "link"),
	ext("lsetstat@openssh.com", "link", mode(0o600)), ext("lsetstat@openssh.com", "other", mode(0o4600)), do(typeLstat, "other"),
	ext("lsetstat@openssh.com", "other", attrs{flags: attrSize, size: 3}), ext("lsetstat@openssh.com", "missing", mode(0o600)),
	// Making, removing, renaming.
	do(typeMkdir, "made", none), do(typeStat, "made"), do(typeMkdir, "made2", mode(0o1770)), do(typeStat, "made2"),
	do(typeMkdir, "made3", mode(0o2777)), do(typeStat, "made3"), do(typeMkdir, "made", none), do(typeMkdir, "no/such", none), do(typeMkdir, "", none),
	do(typeRmdir, "other"), do(typeRmdir, "dir"), do(typeRmdir, "dirlink"), do(typeRmdir, "made"), do(typeRmdir, "made"),
	do(typeRemove, "empty"), do(typeRemove, "missing"), do(typeRemove, "newlink"), do(typeLstat, "newlink"), do(typeRemove, "file/x"),
	do(typeRename, "other", "third"), do(typeStat, "other"), do(typeRename, "other", "other2"), do(typeRename, "missing", "x"),
	do(typeRename, "other2", "no/such"), do(typeRename, "dir", "empty"), do(typeRename, "dir", "dir2"), do(typeRename, "dir2", "dir2/in"),
	do(typeRename, "dangling", "dangling2"), do(typeRename, "dangling2", "link"), do(typeRename, "other2", "dangling2"), do(typeRename, "third", "third"),
	do(typeRename, "empty2", "dangling2").unlike("status 4"), // rename(2) says ENOTDIR there
	ext("posix-rename@openssh.com", "other2", "third"), do(typeStat, "third"), ext("posix-rename@openssh.com", "third", "empty"),
	ext("posix-rename@openssh.com", "dir2", "dir"), ext("posix-rename@openssh.com", "missing", "y"), ext("posix-rename@openssh.com", "file", "dir"),
	ext("hardlink@openssh.com", "third", "hard"), do(typeStat, "hard"), ext("hardlink@openssh.com", "third", "hard"), ext("hardlink@openssh.com", "dir", "harddir"),
	ext("hardlink@openssh.com", "link", "hardlink"), do(typeLstat, "hardlink"),
	// Files.
	do(typeOpen, "file", uint32(openRead), none), do(typeRead, handle(0), uint64(0), uint32(100)), do(typeRead, handle(0), uint64(5), uint32(100)),
	do(typeRead, handle(0), uint64(2), uint32(0)), do(typeRead, handle(0), uint64(5), uint32(0)), do(typeRead, handle(0), uint64(1<<63), uint32(1)),
	do(typeWrite, handle(0), uint64(0), "x"), do(typeFstat, handle(0)), do(typeReaddir, handle(0)), do(typeRead, handle(7), uint64(0), uint32(1)),
	do(typeRead, "abc", uint64(0), uint32(1)), do(typeWrite, handle(9), uint64(0), "x"), do(typeFstat, handle(9)), do(typeFstat, ""),
	do(typeFsetstat, handle(9), none), do(typeClose, handle(9)), do(typeReaddir, handle(9)), ext("fsync@openssh.com", handle(9)), ext("fstatvfs@openssh.com", handle(9)),
	do(typeOpen, "file", uint32(openWrite|openCreate|openExcl), none), do(typeOpen, "missing", uint32(openRead), none), do(typeOpen, "missing", uint32(openWrite), none),
	do(typeOpen, "new", uint32(openRead|openWrite|openCreate|openExcl), mode(0o4666)), do(typeFstat, handle(1)),
	do(typeWrite, handle(1), uint64(3), "hello"), do(typeRead, handle(1), uint64(0), uint32(50)), do(typeWrite, handle(1), uint64(1<<63), "x"), do(typeWrite, handle(1), uint64(0), ""),
	do(typeFsetstat, handle(1), mode(0o1640)), do(typeFsetstat, handle(1), attrs{flags: attrTimes, atime: 7, mtime: 8}), do(typeFstat, handle(1)),
	do(typeFsetstat, handle(1), attrs{flags: attrSize, size: 4}), do(typeFsetstat, handle(1), attrs{flags: attrOwner, uid: 1, gid: 2}), do(typeStat, "new"),
	ext("fsync@openssh.com", handle(1)),
	do(typeOpen, "new", uint32(openWrite|openAppend), none), do(typeWrite, handle(2), uint64(0), "end"), do(typeRead, handle(1), uint64(0), uint32(50)), do(typeRead, handle(2), uint64(0), uint32(1)),
	do(typeOpen, "new", uint32(openWrite|openTrunc), none), do(typeFstat, handle(1)), do(typeOpen, "new2", uint32(openAppend|openCreate), none), do(typeWrite, handle(4), uint64(0), "x"),
	do(typeOpen, "new3", uint32(openWrite|openCreate), none), do(typeStat, "new3"), do(typeOpen, "dir", uint32(openWrite), none), do(typeOpen, "dir", uint32(openRead), none), do(typeRead, handle(6), uint64(0), uint32(5)),
	do(typeOpen, "/dev/full", uint32(openWrite), none), do(typeWrite, handle(7), uint64(0), "x"), do(typeOpen, "", uint32(openRead), none), do(typeOpen, "link", uint32(openRead), none),
	do(typeOpen, "sparse", uint32(openRead), none), do(typeRead, handle(9), uint64(1), uint32(260<<10)),
	do(typeWrite, handle(5), uint64(0), strings.Repeat("0123456789abcdef", 16000)), do(typeStat, "new3"),
	// Copies.
	ext("copy-data", handle(9), uint64(0), uint64(0), handle(5), uint64(0)), do(typeStat, "new3"), ext("copy-data", handle(9), uint64(0), uint64(10), handle(9), uint64(0)),
	ext("copy-data", handle(9), uint64(300<<10-10), uint64(100), handle(5), uint64(0)), ext("copy-data", handle(9), uint64(300<<10-10), uint64(1<<20), handle(5), uint64(0)), ext("copy-data", handle(9), uint64(400<<10), uint64(5), handle(5), uint64(0)),
	ext("copy-data", handle(9), uint64(0), uint64(70), handle(5), uint64(1<<20)), do(typeStat, "new3"), ext("copy-data", handle(99), uint64(0), uint64(70), handle(5), uint64(0)), ext("copy-data", handle(9), uint64(0), uint64(70), handle(7), uint64(0)).unlike("status 4"), // OpenSSH says all is well
	do(typeClose, handle(1)), do(typeClose, handle(1)), do(typeOpen, "dir", uint32(openRead), none), do(typeClose, handle(1)),
	// Directories.
	do(typeOpendir, "file"), do(typeOpendir, "missing"), do(typeOpendir, "dangling"), do(typeOpendir, "dirlink"), do(typeRead, handle(1), uint64(0), uint32(5)), do(typeFstat, handle(1)), do(typeReaddir, handle(1)), do(typeReaddir, handle(1)), do(typeReaddir, handle(1)), do(typeClose, handle(1)),
	do(typeOpendir, "."), do(typeReaddir, handle(1)), do(typeReaddir, handle(1)), do(typeClose, handle(1)), do(typeOpendir, "/dev"), do(typeClose, handle(1)),
	// Extensions.
	ext("home-directory", "root"), ext("home-directory", "nosuchuser"), ext("expand-path@openssh.com", "~"), ext("expand-path@openssh.com", "~/link"), ext("expand-path@openssh.com", "~root"), ext("expand-path@openssh.com", "~root/"),
	ext("expand-path@openssh.com", "~root/missing"), ext("expand-path@openssh.com", "~nosuchuser/x"), ext("expand-path@openssh.com", "file"), ext("expand-path@openssh.com", ""), ext("expand-path@openssh.com", "missing/x"), ext("expand-path@openssh.com", "/etc/../etc"),
	ext("users-groups-by-id@openssh.com", handle(0)+handle(1)+handle(54321), handle(0)+handle(5)), ext("users-groups-by-id@openssh.com", "", ""),
	ext("no-such@extension", "x"), ext("statvfs@openssh.com", "missing"),
	// Where we differ.
	do(typeSetstat, "new3", attrs{flags: attrOwner | attrMode, uid: 1, gid: 1, mode: 0o4755}),
	ext("home-directory", "").unlike("names 1\n  \"$DIR\" \"$DIR\" no attributes"),
}

// TestLikeOpenSSH sends the same requests to both servers and compares the answers, and then what is on the disk.
func TestLikeOpenSSH(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, opensshServer)
	theirs, ours := t.TempDir(), t.TempDir()
	populate(t, theirs)
	populate(t, ours)
	t.Chdir(ours)
	a, b := newOpenSSHPeer(t, theirs), newPeer(t)
	if x, y := a.hello(), b.hello(); x != y {
		t.Errorf("OpenSSH: %s\nours:    %s", x, y)
	}
	for i, s := range script {
		x, y := sorted(a.call(s.typ, s.fields...)), sorted(b.call(s.typ, s.fields...))
		switch {
		case s.ours == "" && x != y:
			t.Errorf("request %d: type %d %.200q\nOpenSSH: %s\nours:    %s", i, s.typ, s.fields, x, y)
		case s.ours != "" && (y != s.ours || x == y):
			t.Errorf("request %d: type %d %.200q\nOpenSSH: %s\nours:    %s\nwant:    %s", i, s.typ, s.fields, x, y, s.ours)
		}
	}
	if err := a.end(); err != nil {
		t.Errorf("OpenSSH: %v", err)
	}
	if err := b.end(); err != nil {
		t.Error(err)
	}
	x, y := snapshot(t, theirs), snapshot(t, ours)
	if !strings.HasPrefix(x["new3"], "100755 ") || !strings.HasPrefix(y["new3"], "104755 ") {
		t.Errorf("want only ours setuid: OpenSSH left %s, we left %s", x["new3"], y["new3"])
	}
	delete(x, "new3")
	delete(y, "new3")
	for name := range x {
		if x[name] != y[name] {
			t.Errorf("%q: OpenSSH left %s, we left %s", name, x[name], y[name])
		}
		delete(y, name)
	}
	for name := range y {
		t.Errorf("only we left %q", name)
	}
}

// sorted puts the names of an answer in order: the two directories need not have the same.
func sorted(answer string) string {
	lines := strings.Split(answer, "\n")
	if len(lines) > 1 {
		slices.Sort(lines[1:])
	}
	return strings.Join(lines, "\n")
}

func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		var content []byte
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err = os.ReadFile(path)
		case unix.S_IFLNK:
			var to string
			to, err = os.Readlink(path)
			content = []byte(to)
		}
		rel, _ := filepath.Rel(dir, path)
		m[rel] = fmt.Sprintf("%o %d:%d %d links %d bytes %.60q", st.Mode, st.Uid, st.Gid, st.Nlink, len(content), content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}
