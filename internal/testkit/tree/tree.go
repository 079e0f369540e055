// SPDX-License-Identifier: Apache-2.0

// Package tree makes directory trees for tests from one line per inode, and
// compares two trees in full.
//
//	dir      PATH [MODE]
//	file     PATH [MODE [TEXT...]]           the rest of the line is the content
//	data     PATH MODE SIZE [random:SEED|text|zero]   content by size
//	sparse   PATH MODE SIZE [OFFSET:TEXT]    a hole of SIZE bytes, with one island
//	symlink  PATH TARGET
//	hardlink PATH EXISTING
//	fifo     PATH [MODE]
//	sock     PATH [MODE]
//	char     PATH MAJOR MINOR [MODE]         needs root, as does block
//	block    PATH MAJOR MINOR [MODE]
//	xattr    PATH NAME=VALUE                 VALUE is text to the end of the line, or 0x...
//	mode     PATH MODE
//	owner    PATH UID:GID                    of the link itself
//	mtime    PATH RFC3339|SECONDS[.FRACTION] set after everything else
//
// Modes are octal and may hold 07000 bits; the default is 0755 for directories
// and 0644 for the rest. Missing parents are made with 0755. A field may be a
// quoted Go string, so names can hold blanks and control characters.
//
// It refuses paths that leave the directory, also through a symlink an earlier
// line made: a test with a hostile tree must not touch the machine.
package tree

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Make creates the inodes that lines describe below dir, which must exist.
// It ends the test on the first line that cannot be done.
func Make(t testing.TB, dir string, lines ...string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	var last []string
	for _, line := range lines {
		if verb, _ := field(line); verb == "mtime" {
			last = append(last, line)
			continue
		}
		if err := makeOne(dir, line); err != nil {
			t.Fatalf("tree line %q: %v", line, err)
		}
	}
	for _, line := range last {
		if err := makeOne(dir, line); err != nil {
			t.Fatalf("tree line %q: %v", line, err)
		}
	}
}

// field cuts the first field off s; a quoted one is unquoted.
func field(s string) (first, rest string) {
	s = strings.TrimLeft(s, " ")
	if q, err := strconv.QuotedPrefix(s); err == nil {
		first, _ = strconv.Unquote(q)
		return first, strings.TrimPrefix(s[len(q):], " ")
	}
	first, rest, _ = strings.Cut(s, " ")
	return first, rest
}

// place turns a tree path into a path on disk whose parent exists inside dir.
func place(dir, name string) (string, error) {
	clean := filepath.Clean("/" + name)
	if clean == "/" {
		return dir, nil
	}
	at := dir
	for part := range strings.SplitSeq(strings.Trim(filepath.Dir(clean), "/"), "/") {
		if err := os.Mkdir(filepath.Join(at, part), 0o755); err != nil && !os.IsExist(err) {
			return "", err
		}
		var err error
		if at, err = filepath.EvalSymlinks(filepath.Join(at, part)); err != nil {
			return "", err
		}
		if at != dir && !strings.HasPrefix(at, dir+"/") {
			return "", fmt.Errorf("path leaves the tree: %s", at)
		}
	}
	return filepath.Join(at, filepath.Base(clean)), nil
}

func makeOne(dir, line string) error {
	verb, rest := field(line)
	name, rest := field(rest)
	if name == "" {
		return fmt.Errorf("no path")
	}
	path, err := place(dir, name)
	if err != nil {
		return err
	}
	switch verb {
	case "dir":
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		return chmod(path, rest, 0o755)
	case "file":
		mode, text := field(rest)
		return write(path, mode, []byte(text))
	case "data":
		return makeData(path, rest)
	case "sparse":
		return makeSparse(path, rest)
	case "symlink":
		target, _ := field(rest)
		return os.Symlink(target, path)
	case "hardlink":
		existing, _ := field(rest)
		from, err := place(dir, existing)
		if err != nil {
			return err
		}
		return os.Link(from, path)
	case "fifo":
		return makeNode(path, unix.S_IFIFO, 0, rest)
	case "sock":
		return makeNode(path, unix.S_IFSOCK, 0, rest)
	case "char":
		return makeDevice(path, unix.S_IFCHR, rest)
	case "block":
		return makeDevice(path, unix.S_IFBLK, rest)
	case "xattr":
		return setXattr(path, rest)
	case "mode":
		return chmod(path, rest, 0)
	case "owner":
		uid, gid, ok := strings.Cut(strings.TrimSpace(rest), ":")
		u, err1 := strconv.Atoi(uid)
		g, err2 := strconv.Atoi(gid)
		if !ok || err1 != nil || err2 != nil {
			return fmt.Errorf("owner must be UID:GID")
		}
		return os.Lchown(path, u, g)
	case "mtime":
		return setMtime(path, strings.TrimSpace(rest))
	}
	return fmt.Errorf("unknown word %q", verb)
}

// chmod sets an octal mode with raw chmod(2), because os.FileMode spreads the
// setuid, setgid and sticky bits elsewhere.
func chmod(path, mode string, fallback uint32) error {
	mode, _ = field(mode)
	m := uint64(fallback)
	if mode != "" {
		var err error
		if m, err = strconv.ParseUint(mode, 8, 12); err != nil {
			return fmt.Errorf("mode %q: %w", mode, err)
		}
	}
	return unix.Chmod(path, uint32(m))
}

func write(path, mode string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(content); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return chmod(path, mode, 0o644)
}

func makeData(path, rest string) error {
	mode, rest := field(rest)
	sizeText, kind := field(rest)
	size, err := strconv.Atoi(sizeText)
	if err != nil {
		return fmt.Errorf("size: %w", err)
	}
	content := make([]byte, size)
	kind = strings.TrimSpace(kind)
	switch {
	case kind == "zero":
	case kind == "text":
		line := []byte("the quick brown fox jumps over the lazy dog\n")
		copy(content, bytes.Repeat(line, size/len(line)+1))
	case kind == "" || strings.HasPrefix(kind, "random:"):
		var seed [32]byte
		copy(seed[:], kind)
		if _, err := rand.NewChaCha8(seed).Read(content); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown kind of data %q", kind)
	}
	return write(path, mode, content)
}

func makeSparse(path, rest string) error {
	mode, rest := field(rest)
	sizeText, island := field(rest)
	size, err := strconv.ParseInt(sizeText, 10, 64)
	if err != nil {
		return fmt.Errorf("size: %w", err)
	}
	if err := write(path, mode, nil); err != nil {
		return err
	}
	if err := os.Truncate(path, size); err != nil {
		return err
	}
	if island == "" {
		return nil
	}
	offset, text, _ := strings.Cut(island, ":")
	at, err := strconv.ParseInt(offset, 10, 64)
	if err != nil {
		return fmt.Errorf("island offset: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte(text), at); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func makeNode(path string, kind uint32, dev int, mode string) error {
	if err := unix.Mknod(path, kind|0o600, dev); err != nil {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return chmod(path, mode, 0o644)
}

func makeDevice(path string, kind uint32, rest string) error {
	majorText, rest := field(rest)
	minorText, mode := field(rest)
	major, err1 := strconv.ParseUint(majorText, 10, 32)
	minor, err2 := strconv.ParseUint(minorText, 10, 32)
	if err1 != nil || err2 != nil {
		return fmt.Errorf("device numbers must be MAJOR MINOR")
	}
	return makeNode(path, kind, int(unix.Mkdev(uint32(major), uint32(minor))), mode)
}

func setXattr(path, rest string) error {
	name, value, ok := strings.Cut(rest, "=")
	if !ok {
		return fmt.Errorf("xattr must be NAME=VALUE")
	}
	data := []byte(value)
	if digits, isHex := strings.CutPrefix(value, "0x"); isHex {
		var err error
		if data, err = hex.DecodeString(digits); err != nil {
			return err
		}
	}
	if err := unix.Lsetxattr(path, name, data, 0); err != nil {
		return &os.PathError{Op: "lsetxattr " + name, Path: path, Err: err}
	}
	return nil
}

func setMtime(path, text string) error {
	when, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		whole, fraction, _ := strings.Cut(text, ".")
		sec, err := strconv.ParseInt(whole, 10, 64)
		if err != nil {
			return fmt.Errorf("mtime %q: %w", text, err)
		}
		nsec, err := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
		if err != nil {
			return fmt.Errorf("mtime %q: %w", text, err)
		}
		when = time.Unix(sec, nsec)
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(when.UnixNano())}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}
