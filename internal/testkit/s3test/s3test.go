// SPDX-License-Identifier: Apache-2.0

// Package s3test runs a real S3 server, versitygw, for tests. The server takes
// the process's working directory and cannot run twice in one process, so it
// lives in a child: the test binary executed again. A test package that uses it
// calls ChildMain first thing in TestMain. It is no server for anything but
// tests: its keys are in this file.
package s3test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/embedgw"
	"github.com/versity/versitygw/s3api"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
)

const childArg = "s3test-child"

// AccessKey and SecretKey are the server's only account.
const (
	AccessKey = "s3test-access"
	SecretKey = "s3test-secret"
)

// Server is a running S3 server with one bucket.
type Server struct {
	Endpoint string // http://127.0.0.1:port
	Bucket   string
	Dir      string // bucket directories with the objects as files

	cmd    *exec.Cmd
	stdin  io.Closer
	killed sync.Once
}

// ChildMain serves S3 and exits when this process is the child; otherwise it
// returns at once.
func ChildMain() {
	if len(os.Args) != 4 || os.Args[1] != childArg {
		return
	}
	if err := serve(os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "s3test:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(dir, addr string) error {
	// The parent's death closes our stdin: no orphan stays behind.
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
		os.Exit(0)
	}()
	if err := (meta.XattrMeta{}).Test(dir); err != nil {
		return fmt.Errorf("user xattrs in %s: %w", dir, err)
	}
	be, err := posix.New(dir, meta.XattrMeta{}, posix.PosixOpts{CopyObjectThreshold: 5 << 30, Concurrency: 64})
	if err != nil {
		return err
	}
	return embedgw.RunVersityGW(ctx, be, &embedgw.Config{
		RootUserAccess: AccessKey, RootUserSecret: SecretKey, Region: "us-east-1",
		Ports: []string{addr}, MaxConnections: 256, MaxRequests: 256, MultipartMaxParts: 10000,
		Quiet: true, KeepAlive: true,
		S3Options: []s3api.Option{s3api.WithOnListen(func() { fmt.Println("listening") })},
	})
}

// External is a server somebody else runs, for tests that can do with any S3:
// S3TEST_EXTERNAL="http://host:port access secret bucket". The bucket must
// be empty or missing. ok is false without one.
func External() (endpoint, access, secret, bucket string, ok bool) {
	f := strings.Fields(os.Getenv("S3TEST_EXTERNAL"))
	if len(f) != 4 {
		return "", "", "", "", false
	}
	return f[0], f[1], f[2], f[3], true
}

// Start runs a server until the test ends. Its data lies on the file system of
// the temporary directory, which must have user xattrs.
func Start(t testing.TB) *Server {
	t.Helper()
	dir := t.TempDir()
	s := &Server{Bucket: "boot-images", Dir: dir}
	if err := os.Mkdir(filepath.Join(dir, s.Bucket), 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	held, addr, err := port.Hold("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := s.start(self, addr.String()); err != nil {
		t.Fatalf("start the S3 server: %v (does TestMain call s3test.ChildMain?)", err)
	}
	s.Endpoint = "http://" + addr.String()
	t.Cleanup(s.Kill)
	return s
}

func (s *Server) start(self, addr string) error {
	s.cmd = exec.Command(self, childArg, s.Dir, addr)
	var stderr strings.Builder
	s.cmd.Stderr = &stderr
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.stdin = stdin
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if lines.Text() == "listening" {
			go io.Copy(io.Discard, stdout)
			return nil
		}
	}
	stdin.Close()
	return fmt.Errorf("%v: %s", s.cmd.Wait(), stderr.String())
}

// Kill ends the server at once, as a crash would. The data stays until the
// test ends. A second Kill does nothing, and may come from another goroutine.
func (s *Server) Kill() {
	s.killed.Do(func() {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.stdin.Close()
	})
}
