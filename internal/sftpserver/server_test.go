// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// started returns a session in a directory of its own that has said hello.
func started(t testing.TB) *peer {
	t.Helper()
	if t, ok := t.(*testing.T); ok {
		t.Chdir(t.TempDir())
	}
	p := newPeer(t)
	p.hello()
	return p
}

func write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestAdvertisedWorks: a client uses what it is told of, and gives up when that fails.
func TestAdvertisedWorks(t *testing.T) {
	p := started(t)
	write(t, "a", "content")
	write(t, "b", "")
	if got := p.call(typeOpen, "a", uint32(openRead|openWrite), none); got != "handle 00000000" {
		t.Fatal(got)
	}
	if got := p.call(typeOpen, "b", uint32(openWrite), none); got != "handle 00000001" {
		t.Fatal(got)
	}
	examples := map[string][]any{
		"posix-rename@openssh.com":       {"b", "c"},
		"statvfs@openssh.com":            {"."},
		"fstatvfs@openssh.com":           {handle(0)},
		"hardlink@openssh.com":           {"a", "hard"},
		"fsync@openssh.com":              {handle(0)},
		"lsetstat@openssh.com":           {"a", mode(0o600)},
		"limits@openssh.com":             {},
		"expand-path@openssh.com":        {"~/a"},
		"copy-data":                      {handle(0), uint64(0), uint64(0), handle(1), uint64(0)},
		"home-directory":                 {""},
		"users-groups-by-id@openssh.com": {handle(0), handle(0)},
	}
	hello := strings.Fields(p.hello())[2:]
	if len(hello) != len(examples) {
		t.Errorf("%d extensions: %q", len(hello), hello)
	}
	for _, e := range hello {
		name, _, _ := strings.Cut(e, "=")
		fields, ok := examples[name]
		if got := p.call(typeExtended, append([]any{name}, fields...)...); !ok || strings.HasPrefix(got, "status") && got != "status 0" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if b, err := os.ReadFile("c"); err != nil || string(b) != "content" {
		t.Errorf("copy: %q, %v", b, err)
	}
}

// TestMessages: what is told must be enough to know what to do.
func TestMessages(t *testing.T) {
	p := started(t)
	write(t, "dir-file", "")
	for _, dir := range []string{"dir", "dir/sub"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.call(typeOpen, "/dev/full", uint32(openWrite), none); got != "handle 00000000" {
		t.Fatal(got)
	}
	for _, c := range []struct {
		request []byte
		code    uint32
		message string
	}{
		{request(typeWrite, uint32(1), handle(0), uint64(0), "x"), codeFailure, "No space left on device"},
		{request(typeRmdir, uint32(1), "dir"), codeFailure, "Directory not empty"},
		{request(typeRmdir, uint32(1), "dir-file"), codeNoSuchFile, "Not a directory"},
		{request(typeRemove, uint32(1), "dir"), codeFailure, "Is a directory"},
		{request(typeMkdir, uint32(1), "dir", none), codeFailure, "File exists"},
		{request(typeStat, uint32(1), "missing"), codeNoSuchFile, "No such file or directory"},
		{request(typeStat, uint32(1), "nul\x00inside"), codeBadMessage, "Invalid argument"},
		{request(typeExtended, uint32(1), "hardlink@openssh.com", "dir", "x"), codePermissionDenied, "Operation not permitted"},
		{request(typeRename, uint32(1), "dir-file", "dir"), codeFailure, "File exists"},
		{request(typeClose, uint32(1), "what"), codeNoSuchFile, "Invalid handle"},
		{request(99, uint32(1), "what"), codeUnsupported, "Operation unsupported"},
		{request(typeExtended, uint32(1), "no-such", "what"), codeUnsupported, "Operation unsupported"},
		{request(typeClose, uint32(1), handle(0)), codeOK, "Success"},
	} {
		p.send(c.request)
		r := packet{b: p.receive()}
		typ, _, code, message := r.uint8(), r.uint32(), r.uint32(), r.text()
		if typ != typeStatus || code != c.code || message != c.message {
			t.Errorf("request %q: answer %d, code %d %q; want code %d %q", c.request, typ, code, message, c.code, c.message)
		}
	}
}

// TestMalformed: the session ends with an error, after the answers to all that came before.
func TestMalformed(t *testing.T) {
	t.Chdir(t.TempDir())
	hello := request(typeInit, uint32(3))
	for name, c := range map[string]struct {
		input []byte
		want  error
	}{
		"empty packet":       {[]byte{0, 0, 0, 0}, errMalformed},
		"too large":          {[]byte{0, 4, 0, 1, typeStat}, errMalformed},
		"largest number":     {[]byte{255, 255, 255, 255, typeStat}, errMalformed},
		"no id":              {request(typeStat), errMalformed},
		"string too long":    {request(typeStat, uint32(1), uint32(5), []byte("four")), errMalformed},
		"string 4 GiB":       {request(typeStat, uint32(1), uint32(math.MaxUint32), []byte("four")), errMalformed},
		"no attributes":      {request(typeMkdir, uint32(1), "dir"), errMalformed},
		"part of attributes": {request(typeMkdir, uint32(1), "dir", uint32(attrSize), uint32(0)), errMalformed},
		"many attributes":    {request(typeSetstat, uint32(1), ".", uint32(attrExtended), uint32(math.MaxUint32), "a", "b"), errMalformed},
		"one path of two":    {request(typeRename, uint32(1), "a"), errMalformed},
		"no extension":       {request(typeExtended, uint32(1)), errMalformed},
		"part of an id list": {request(typeExtended, uint32(1), "users-groups-by-id@openssh.com", "12345", ""), errMalformed},
		"ends in length":     {[]byte{0, 0}, io.ErrUnexpectedEOF},
		"ends in packet":     {request(typeStat, uint32(1), "file")[:9], io.ErrUnexpectedEOF},
		"no end":             {nil, nil},
	} {
		var out bytes.Buffer
		if err := Serve(bytes.NewReader(append(hello[:len(hello):len(hello)], c.input...)), &out, Options{}, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if b := out.Bytes(); len(b) < 5 || b[4] != typeVersion || int(binary.BigEndian.Uint32(b)) != len(b)-4 {
			t.Errorf("%s: answers %q", name, b)
		}
	}
	var out bytes.Buffer
	if err := Serve(bytes.NewReader(request(typeMkdir, uint32(1), "early", none)), &out, Options{}, nil); !errors.Is(err, errMalformed) || out.Len() != 0 {
		t.Errorf("before the version: %v, answer %q", err, out.Bytes())
	}
	if left, err := filepath.Glob("*"); err != nil || len(left) != 0 {
		t.Errorf("done by malformed requests: %q %v", left, err)
	}
}

// TestHandleLimit: a client can open as much as it was told, and all is closed when it goes.
func TestHandleLimit(t *testing.T) {
	before := descriptors(t)
	p := started(t)
	limit := newHandles().max
	if got, want := p.call(typeExtended, "limits@openssh.com"), fmt.Sprintf("reply %016x%016x%016x%016x", maxPacket, maxData, maxData, limit); got != want {
		t.Errorf("limits %s, want %s", got, want)
	}
	for i := range limit {
		typ, fields := uint8(typeOpen), []any{"/dev/null", uint32(openRead), none}
		if i%2 == 1 {
			typ, fields = typeOpendir, []any{"."}
		}
		if got := p.call(typ, fields...); got != fmt.Sprintf("handle %08x", i) {
			t.Fatalf("open %d: %s", i, got)
		}
	}
	for range 3 {
		if got := p.call(typeOpen, "/dev/null", uint32(openRead), none); got != "status 4" {
			t.Errorf("beyond the limit: %s", got)
		}
	}
	if got := p.call(typeClose, handle(5)); got != "status 0" {
		t.Error(got)
	}
	if got := p.call(typeOpendir, "."); got != "handle 00000005" {
		t.Errorf("after a close: %s", got)
	}
	if err := p.end(); err != nil {
		t.Error(err)
	}
	if after := descriptors(t); after > before+8 { // the pipes of the test
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(d)
}

// TestPipelined: requests sent without waiting are done, and answered, in their order.
func TestPipelined(t *testing.T) {
	p := started(t)
	if got := p.call(typeOpen, "f", uint32(openRead|openWrite|openCreate), none); got != "handle 00000000" {
		t.Fatal(got)
	}
	const n = 2000
	block := func(i uint32) string { return strings.Repeat(string(rune('a'+i%26)), 30000) }
	go func() {
		for i := range uint32(n) { // every pair writes and reads the same place
			p.out.Write(append(request(typeWrite, 2*i, handle(0), uint64(i%7), block(i)), request(typeRead, 2*i+1, handle(0), uint64(i%7), uint32(30000))...))
		}
	}()
	for i := range uint32(2 * n) {
		r := packet{b: p.receive()}
		typ, id := r.uint8(), r.uint32()
		if id != i {
			t.Fatalf("answer %d is to request %d", i, id)
		}
		if i%2 == 0 && (typ != typeStatus || r.uint32() != codeOK) {
			t.Fatalf("write %d: %q", i, r.b)
		}
		if i%2 == 1 && (typ != typeData || string(r.bytes()) != block(i/2)) {
			t.Fatalf("read %d gave something else", i)
		}
	}
}

// TestLargeDirectory: every entry once, in answers that every client takes.
func TestLargeDirectory(t *testing.T) {
	p := started(t)
	const n = 3000
	for i := range n {
		write(t, fmt.Sprintf("%s-%d", strings.Repeat("long", 50), i), "")
	}
	if got := p.call(typeOpendir, "."); got != "handle 00000000" {
		t.Fatal(got)
	}
	seen := map[string]bool{}
	for {
		p.send(request(typeReaddir, uint32(1), handle(0)))
		b := p.receive()
		if len(b) > 34000 {
			t.Errorf("an answer of %d bytes", len(b))
		}
		r := packet{b: b}
		typ, _ := r.uint8(), r.uint32()
		if typ == typeStatus {
			if code := r.uint32(); code != codeEOF {
				t.Errorf("ended with %d", code)
			}
			break
		}
		for range r.uint32() {
			name, long, _ := r.text(), r.text(), r.attrs()
			if seen[name] || !strings.HasSuffix(long, " "+name) {
				t.Errorf("entry %q %q", name, long)
			}
			seen[name] = true
		}
	}
	if len(seen) != n+2 || !seen["."] || !seen[".."] {
		t.Errorf("%d entries", len(seen))
	}
}

// TestRenameInSteps: file systems without RENAME_NOREPLACE keep the same promises.
func TestRenameInSteps(t *testing.T) {
	t.Chdir(t.TempDir())
	write(t, "a", "a")
	write(t, "b", "b")
	for _, err := range []error{os.Mkdir("dir", 0o755), os.Mkdir("dir2", 0o755), os.Symlink("nowhere", "link")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		from, to string
		want     error
	}{
		{"a", "b", unix.EEXIST}, {"a", "link", unix.EEXIST}, {"dir", "dir2", unix.EEXIST}, {"dir", "link", unix.EEXIST},
		{"missing", "x", unix.ENOENT}, {"dir", "dir/x", unix.EINVAL}, {"a", "c", nil}, {"dir", "dir3", nil}, {"link", "link2", nil},
	} {
		if err := renameInSteps(c.from, c.to); err != c.want {
			t.Errorf("%s to %s: %v, want %v", c.from, c.to, err, c.want)
		}
	}
	if left, _ := filepath.Glob("*"); strings.Join(left, " ") != "b c dir2 dir3 link2" {
		t.Errorf("left %q", left)
	}
}

// TestNames: users made during a session have their names in it, and hostile files do no harm.
func TestNames(t *testing.T) {
	passwd, group := filepath.Join(t.TempDir(), "passwd"), filepath.Join(t.TempDir(), "group")
	n := newNames(passwd, group)
	see := func(uid uint32, user, name string) {
		t.Helper()
		n.refresh()
		if got := n.user(uid); got != user {
			t.Errorf("user %d is %q, want %q", uid, got, user)
		}
		if got := n.group(uid); got != name {
			t.Errorf("group %d is %q, want %q", uid, got, name)
		}
	}
	see(0, "0", "0")
	write(t, passwd, "root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\nshort:x:5\n:x:6:6::/:\nbad:x:-1:0::/:\nlast:x:7:7::/home/last:")
	write(t, group, "wheel:x:0:root\n")
	see(0, "root", "wheel")
	see(7, "last", "7")
	see(6, "6", "6")
	write(t, passwd, strings.Repeat("x", maxName+1)+":x:8:8::/:/bin/sh\nnew:x:9:9::/home/new:/bin/sh\n")
	see(8, "8", "8")
	see(9, "new", "9")
	see(0, "0", "wheel")
	for _, err := range []error{os.Remove(passwd), unix.Mkfifo(passwd, 0o600), os.Remove(group), os.Symlink("/dev/zero", group)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	see(9, "9", "9")
}

// TestManyNames: an answer is bounded, whatever one request can ask for.
func TestManyNames(t *testing.T) {
	s := &server{out: io.Discard, init: true, names: newNames(filepath.Join(t.TempDir(), "passwd"), "")}
	write(t, s.names.passwd.path, strings.Repeat("n", 200)+":x:0:0::/:/bin/sh\n")
	if err := s.request(packet{b: request(typeExtended, uint32(1), "users-groups-by-id@openssh.com", strings.Repeat("\x00", 100<<10), "")[4:]}); err != nil {
		t.Fatal(err)
	}
	if len(s.buf) > 100 || s.buf[4] != typeStatus {
		t.Errorf("an answer of %d bytes", len(s.buf))
	}
}
