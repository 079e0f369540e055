// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/cgroup"
)

// inodesEnv tells a test that it is the process in the control group.
const inodesEnv = "IMS_BUILDENV_TEST_INODES"

// inGroup runs the calling test once more as a process in a control group.
func inGroup(t *testing.T, l cgroup.Limits, inodes int, env ...string) string {
	t.Helper()
	testkit.NeedRoot(t)
	group, err := cgroup.New(l)
	if err != nil {
		t.Skipf("no control group to limit a process with: %v", err)
	}
	defer func() {
		if err := group.Remove(); err != nil {
			t.Error(err)
		}
	}()
	cmd := group.Command(t.Context(), os.Args[0], "-test.v", "-test.timeout=0", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(append(os.Environ(), inodesEnv+"="+strconv.Itoa(inodes)), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%+v: %v\n%s", l, err, out)
	}
	return string(out)
}

// Any tree is packed, and the image checked, in 256 MiB with eight workers: also
// where each of many inodes has a directory, hard links or attributes of its own,
// and where all are in one directory; and the same from an archive of it. With
// -long there are ten million.
func TestPackInLittleMemory(t *testing.T) {
	if n, _ := strconv.Atoi(os.Getenv(inodesEnv)); n > 0 {
		debug.SetGCPercent(25) // as sidecar does
		dir := t.TempDir()
		var src Source = odd(n)
		var images [2][]byte
		for i := range images {
			path := filepath.Join(dir, "image.sqsh")
			st, err := PackFile(t.Context(), src, path, Options{Workers: 8, BlockSize: MaxBlockSize, Epoch: &tarEpoch})
			if err != nil {
				t.Fatal(err)
			}
			var usage unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &usage) // cannot fail with an address of ours
			t.Logf("%d inodes, peak %d MiB, %d s of CPU", st.Inodes, usage.Maxrss>>10, usage.Utime.Sec+usage.Stime.Sec)
			images[i] = sumOfFile(t, path)
			if i == 0 {
				archive, w := io.Pipe()
				go func() { w.CloseWithError(odd(n).archive(t.Context(), w)) }()
				src = tarSourceOf(t, archive, TarOptions{SpoolDir: dir})
			}
		}
		if !bytes.Equal(images[0], images[1]) {
			t.Error("the archive gives another image")
		}
		return
	}
	n := 20_000
	if *long {
		n = 10_000_000
	}
	t.Log(inGroup(t, cgroup.Limits{Memory: 256 << 20}, n))
}

// odd is a tree of so many inodes that exists nowhere.
type odd int

func (n odd) Walk(ctx context.Context, fn func(*Entry) error) error {
	var err error
	add := func(e Entry) {
		if err == nil {
			err = fn(&e)
		}
	}
	file := func(i int, path string) Entry {
		return Entry{Path: path, Mode: unix.S_IFREG | 0o644, Size: int64(20 + i%50), Mtime: int64(1e9 + i), Content: oddFile(i)}
	}
	part := int(n) / 5
	add(memDir("."))
	add(memDir("directories"))
	for i := range part {
		if i%4 == 0 {
			add(memDir(fmt.Sprintf("directories/%08d", i/4*4)))
			continue
		}
		add(memDir(fmt.Sprintf("directories/%08d/%08d", i/4*4, i)))
	}
	add(memDir("flat"))
	for i := range 2 * part {
		add(file(i, fmt.Sprintf("flat/%08d", i)))
	}
	for _, dir := range []string{"links-a", "links-b"} {
		add(memDir(dir))
		for i := range part {
			e := file(i, fmt.Sprintf("%s/%08d", dir, i))
			e.Link = LinkID{Dev: 5, Ino: uint64(i) + 1}
			add(e)
		}
	}
	add(memDir("signed"))
	for i := range part {
		e := file(i, fmt.Sprintf("signed/%08d", i))
		e.Xattrs = []Xattr{{Name: "security.ima", Value: []byte(fmt.Sprintf("signature of %d, which no other has", i))}}
		if err == nil {
			err = ctx.Err()
		}
		add(e)
	}
	return err
}

// archive writes the tree as a tar archive.
func (n odd) archive(ctx context.Context, to io.Writer) error {
	w := tar.NewWriter(to)
	err := n.Walk(ctx, func(e *Entry) error {
		h := &tar.Header{Name: e.Path, Typeflag: tar.TypeDir, Mode: int64(e.Mode & 0o7777), ModTime: time.Unix(e.Mtime, 0)}
		for _, x := range e.Xattrs {
			h.PAXRecords = map[string]string{"SCHILY.xattr." + x.Name: string(x.Value)}
		}
		if e.Content == nil {
			return w.WriteHeader(h)
		}
		// The second directory of links has the names of the first.
		if name, ok := strings.CutPrefix(e.Path, "links-b/"); ok {
			h.Typeflag, h.Linkname = tar.TypeLink, "links-a/"+name
			return w.WriteHeader(h)
		}
		h.Typeflag, h.Size = tar.TypeReg, e.Size
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		b := make([]byte, e.Size)
		if _, err := e.Content.(oddFile).ReadAt(b, 0); err != nil {
			return err
		}
		_, err := w.Write(b)
		return err
	})
	return errors.Join(err, w.Close())
}

func sumOfFile(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum(nil)
}

func (odd) Close() error { return nil }

// KeepContent implements ContentKeeper.
func (odd) KeepContent(dst []byte, c Content) []byte {
	return binary.AppendUvarint(dst, uint64(c.(oddFile)))
}

// KeptContent implements ContentKeeper.
func (odd) KeptContent(_ string, _ int64, b []byte) (Content, []byte) {
	r := recordReader{b}
	return oddFile(r.uint()), r.rest
}

// oddFile is a file whose content begins with its number.
type oddFile uint64

func (f oddFile) Open() (ContentReader, error)      { return f, nil }
func (f oddFile) Close() error                      { return nil }
func (f oddFile) NextData(off int64) (int64, error) { return off, nil }

func (f oddFile) ReadAt(p []byte, _ int64) (int, error) {
	return copy(p, append(binary.BigEndian.AppendUint64(nil, uint64(f)), strings.Repeat("x", len(p))...)), nil
}

// There are as many workers as the control group's processor quota is worth, two
// at least (runtime.GOMAXPROCS), however many processors the machine has.
func TestWorkersFollowQuota(t *testing.T) {
	if os.Getenv(inodesEnv) != "" {
		opt, err := Options{}.withDefaults()
		fmt.Printf("workers: %d, %v\n", opt.Workers, err)
		return
	}
	if runtime.NumCPU() < 3 {
		t.Skipf("of %d processors no quota leaves fewer than there are", runtime.NumCPU())
	}
	for cores, want := range map[float64]int{1: 2, 2: 2, 2.5: 3} {
		out := inGroup(t, cgroup.Limits{Cores: cores}, 1, "GOMAXPROCS=")
		if !strings.Contains(out, fmt.Sprintf("workers: %d, <nil>", want)) {
			t.Errorf("quota of %v processors: want %d workers\n%s", cores, want, out)
		}
	}
}
