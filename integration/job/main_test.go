// SPDX-License-Identifier: Apache-2.0

// Package job takes the built programs through whole customize jobs: the IMS
// API and S3 of `imslocal serve`, stock OpenSSH clients, unsquashfs as the
// judge of images. What a pod's surroundings can break is broken here, and
// each time the job must end with one clear error and leave nothing.
//
// It builds nothing: the programs are those in IMS_BUILDENV_BIN, or bin/.
package job

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := shared.end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// binDir is where the programs under test are.
func binDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("IMS_BUILDENV_BIN")
	if dir == "" {
		dir = "../../bin"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"imslocal", "sidecar", "sshd"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			continue
		}
		reason := fmt.Sprintf("no %s in %s: run make build, or set IMS_BUILDENV_BIN", name, dir)
		if testkit.InCI() {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	return dir
}

// patience bounds every wait; a machine busy with other tests is slow.
const patience = 90 * time.Second

// eventually looks until done says so. It fails the test with what is missing.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-deadline:
			t.Fatalf("not within %s: %s", patience, what)
		case <-tick.C:
		}
	}
}

// stage is what most tests share: one installation with one base image, since
// each costs seconds.
type stage struct {
	once sync.Once
	dir  string
	*world
	base  image
	user  user
	build error
}

var shared stage

// need returns the shared stage, set up by the first test that asks.
func need(t *testing.T) *stage {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "busybox", "ssh", "sftp", "scp", "ssh-keygen", "unsquashfs", "nsenter", "unshare")
	bin := binDir(t)
	shared.once.Do(func() {
		shared.build = fmt.Errorf("an earlier test could not set it up")
		dir, err := os.MkdirTemp("", "ims-buildenv-job-")
		if err != nil {
			t.Fatal(err)
		}
		shared.dir = dir
		shared.world = startWorld(t, bin, filepath.Join(dir, "data"))
		shared.user = newUser(t, shared.world, filepath.Join(dir, "id"))
		shared.base = shared.world.publish(t, "base", packTree(t, shared.world, filepath.Join(dir, "base"), baseTree()...))
		shared.build = nil
	})
	if shared.build != nil {
		t.Fatalf("no installation: %v", shared.build)
	}
	return &shared
}

func (s *stage) end() error {
	if s.world != nil {
		if err := s.world.stop(); err != nil {
			return err
		}
	}
	if s.dir == "" {
		return nil
	}
	return os.RemoveAll(s.dir)
}
