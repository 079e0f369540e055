// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// serveArg makes this test program a server, for stock clients that start one.
const serveArg = "serve-sftp"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == serveArg {
		if err := Serve(os.Stdin, os.Stdout, Options{}, nil); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.New(rand.NewSource(int64(n))).Read(b)
	return b
}

// TestGoClient: another implementation, with several requests under way.
func TestGoClient(t *testing.T) {
	t.Chdir(t.TempDir())
	reqR, reqW := pipe(t)
	ansR, ansW := pipe(t)
	ended := make(chan error, 1)
	go func() {
		err := Serve(reqR, ansW, Options{}, nil)
		ansW.Close()
		ended <- err
	}()
	c, err := sftp.NewClientPipe(ansR, reqW, sftp.UseConcurrentWrites(true))
	if err != nil {
		t.Fatal(err)
	}
	content := randomBytes(5<<20 + 123)
	f, err := c.Create("upload")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadFrom(bytes.NewReader(content)); n != int64(len(content)) || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	if err := errors.Join(f.Chmod(0o640), f.Sync(), f.Close()); err != nil {
		t.Error(err)
	}
	if f, err = c.Open("upload"); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := f.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("read %d bytes, %v", got.Len(), err)
	}
	f.Close()
	if err := errors.Join(c.Mkdir("dir"), c.Symlink("../x", "dir/link"), c.Link("upload", "dir/hard")); err != nil {
		t.Error(err)
	}
	if err := c.Rename("upload", "dir/hard"); err == nil {
		t.Error("rename replaced a file")
	}
	if err := c.PosixRename("upload", "moved"); err != nil {
		t.Error(err)
	}
	if to, err := c.ReadLink("dir/link"); err != nil || to != "../x" {
		t.Errorf("link to %q, %v", to, err)
	}
	if list, err := c.ReadDir("dir"); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := c.Stat("upload"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the rename: %v", err)
	}
	if st, err := c.StatVFS("."); err != nil || st.Blocks == 0 {
		t.Errorf("statvfs: %+v, %v", st, err)
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestSFTPBatch: the stock client, its own commands.
func TestSFTPBatch(t *testing.T) {
	testkit.NeedTool(t, "sftp")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	content := randomBytes(3 << 20)
	if err := os.WriteFile("local", content, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes("local", time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("partial", content[:1<<20], 0o600); err != nil {
		t.Fatal(err)
	}
	batch := strings.Join([]string{
		"put -p local remote", "mkdir dir", "-mkdir dir", "rename remote dir/moved", "ln dir/moved hard", "ln -s dir/moved soft", "cp hard copy",
		"get -p copy back", "get -p hard hardback", "chmod 1700 dir", "chmod 4755 hard",
		"df .", "ls -la dir", "reput local partial", "rm soft", "pwd", "",
	}, "\n")
	cmd := exec.Command("sftp", "-q", "-b", "-", "-D", self+" "+serveArg)
	cmd.Stdin = strings.NewReader(batch)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"dir/moved", "hard", "copy", "back", "hardback", "partial"} {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat("hard", &st); err != nil || st.Mode&0o7777 != 0o4755 || st.Nlink != 2 {
		t.Errorf("mode %o, %d links, %v", st.Mode, st.Nlink, err)
	}
	if err := unix.Stat("hardback", &st); err != nil || st.Mtim.Sec != 1e9 {
		t.Errorf("time %d, %v", st.Mtim.Sec, err)
	}
	if err := unix.Stat("dir", &st); err != nil || st.Mode&0o7777 != 0o1700 {
		t.Errorf("dir: mode %o, %v", st.Mode, err)
	}
}

// TestSSHFS: a file system on top, which needs what files can do and not only transfers.
func TestSSHFS(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "sshfs", "fusermount3", "mountpoint", "bash")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	dir, mnt := t.TempDir(), t.TempDir()
	t.Chdir(dir)
	reqR, reqW := pipe(t)
	ansR, ansW := pipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "sshfs", "-f", "-o", "passive", ":"+dir, mnt)
	var errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = ansR, reqW, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ansR.Close()
	reqW.Close()
	ended := make(chan error, 1)
	go func() {
		err := Serve(reqR, ansW, Options{}, nil)
		ansW.Close()
		ended <- err
	}()
	defer func() {
		if out, err := exec.Command("fusermount3", "-u", mnt).CombinedOutput(); err != nil {
			t.Errorf("unmount: %v %s", err, out)
			cancel()
		}
		cmd.Wait()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	script := `until mountpoint -q "$1"; do sleep 0.02; [ $SECONDS -lt 30 ] || exit 9; done
set -e; cd "$1"
mkdir a; echo one > a/f; echo two >> a/f; cp a/f a/g; mv a/g a/f2; mv a/f2 a/f; ln -s f a/l; chmod 4755 a/f; chown 1:2 a/f
head -c 3000000 /dev/urandom > big; cp big big2; cmp big big2; truncate -s 10 big2; touch -d @1000000000 big2
! rmdir a; rm a/l; ln big hard; df . > /dev/null; ls -la > /dev/null; find . | wc -l`
	out, err := exec.CommandContext(ctx, "bash", "-c", script, "bash", mnt).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, errs.Bytes())
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "a/f"), &st); err != nil || st.Uid != 1 || st.Gid != 2 {
		t.Errorf("owner %d:%d, %v", st.Uid, st.Gid, err)
	}
	if err := unix.Stat(filepath.Join(dir, "big2"), &st); err != nil || st.Size != 10 || st.Mtim.Sec != 1e9 {
		t.Errorf("size %d, time %d, %v", st.Size, st.Mtim.Sec, err)
	}
	if err := unix.Stat(filepath.Join(dir, "hard"), &st); err != nil || st.Nlink != 2 {
		t.Errorf("%d links, %v", st.Nlink, err)
	}
}
