// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

// podEnv tells a re-executed test binary that it has the capabilities of an unprivileged pod: "cut" to take them, or
// "filter" to have the system calls filtered, too, as container runtimes can: no user namespaces.
const podEnv = "IMS_BUILDENV_TEST_POD"

// cgroupEnv names the control group such a process joins first.
const cgroupEnv = "IMS_BUILDENV_TEST_CGROUP"

// holdEnv names the process that a re-executed test binary holds still.
const holdEnv = "IMS_BUILDENV_TEST_HOLD"

// podCaps is the default set of container runtimes.
const podCaps = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FSETID | 1<<unix.CAP_FOWNER | 1<<unix.CAP_MKNOD |
	1<<unix.CAP_NET_RAW | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_SETPCAP |
	1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL | 1<<unix.CAP_AUDIT_WRITE

func TestMain(m *testing.M) {
	ChildMain()
	if pid, err := strconv.Atoi(os.Getenv(holdEnv)); err == nil {
		if err := holdMain(pid); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testkit.HideProfile()
	if kind := os.Getenv(podEnv); kind == "cut" || kind == "filter" {
		if group := os.Getenv(cgroupEnv); group != "" {
			if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		runtime.LockOSThread()
		if _, err := boundThread(podCaps); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if kind == "filter" {
			if err := filterThread(runtime.GOARCH, 0); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		os.Setenv(podEnv, kind+" done")
		err := syscall.Exec("/proc/self/exe", os.Args, os.Environ())
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func inPod() bool { return os.Getenv(podEnv) != "" }

// inFilter reports whether this is a pod in which nothing can be mounted by any means.
func inFilter() bool { return os.Getenv(podEnv) == "filter done" }

// inPodAlone has the calling test run in a pod, alone, unless this is one.
func inPodAlone(t *testing.T, kind string, more ...string) (outside bool) {
	t.Helper()
	testkit.NeedRoot(t)
	if inPod() {
		return false
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(append(os.Environ(), podEnv+"="+kind), more...)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in the pod: %v\n%s", err, out)
	}
	return true
}

// rootTools are copied into the test's image root.
var rootTools = []string{
	"bash", "sh", "cat", "ls", "id", "env", "tty", "stty", "sleep", "touch", "head", "dd", "mkdir", "readlink", "stat",
	"setsid", "mount", "mknod", "mv", "rm", "rmdir", "ln", "true", "false", "chmod", "nohup", "hostname", "wc", "grep",
}

// newRoot makes an image root: copies of the host's programs with their libraries, and a few files.
func newRoot(t testing.TB) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, append([]string{"ldd", "cp"}, rootTools...)...)
	root := filepath.Join(t.TempDir(), "image-root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, root,
		"dir etc 0755", "dir root 0700", "dir tmp 1777", "dir usr 0755", "dir usr/bin 0755", "dir var 0755",
		"symlink bin usr/bin",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/bash\n",
		"file etc/group 0644 root:x:0:\ntty:x:5:\nwheel:x:10:root,other\n",
	)
	files := map[string]bool{}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, lib := range libraries(t, self) {
		files[lib] = true
	}
	for _, name := range rootTools {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		copyFile(t, path, filepath.Join(root, "usr/bin", name))
		for _, lib := range libraries(t, path) {
			files[lib] = true
		}
	}
	for lib := range files {
		copyFile(t, lib, filepath.Join(root, lib))
	}
	return root
}

// libraries lists what a program is linked with, the loader included.
func libraries(t testing.TB, path string) []string {
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libs, _ := f.ImportedLibraries(); len(libs) == 0 {
		return nil
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		t.Fatalf("ldd %s: %v", path, err)
	}
	var libs []string
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			libs = append(libs, word)
		}
	}
	return libs
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// testLog sends the jail's log to the test's.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// startJail starts a jail and stops it at the end of the test.
func startJail(t testing.TB, cfg Config) *Jail {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = testLog(t)
	}
	j, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := j.Stop(context.Background(), 0); err != nil {
			t.Error(err)
		}
	})
	return j
}

// eachLevel runs f once per level this process can build.
func eachLevel(t *testing.T, f func(t *testing.T, level Level)) {
	for _, level := range []Level{Plain, Chroot, Namespaces} {
		t.Run(level.String(), func(t *testing.T) {
			testkit.NeedRoot(t)
			if level == Namespaces && inPod() {
				t.Skip("the pod's capabilities are not enough")
			}
			f(t, level)
		})
	}
}

// run executes a command in the jail and returns what it wrote.
func run(t testing.TB, j *Jail, command string, env ...string) (stdout, stderr string, exit Exit) {
	t.Helper()
	stdout, stderr, exit, err := tryRun(j, Request{Kind: Exec, Command: command, Env: env})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return stdout, stderr, exit
}

func tryRun(j *Jail, req Request) (stdout, stderr string, exit Exit, err error) {
	outR, outW, err := os.Pipe()
	if err != nil {
		return "", "", Exit{}, err
	}
	defer outR.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		outW.Close()
		return "", "", Exit{}, err
	}
	defer errR.Close()
	req.Stdout, req.Stderr = outW, errW
	p, err := j.Spawn(req)
	outW.Close()
	errW.Close()
	if err != nil {
		return "", "", Exit{}, err
	}
	var wg sync.WaitGroup
	var o, e bytes.Buffer
	wg.Go(func() { io.Copy(&o, outR) })
	wg.Go(func() { io.Copy(&e, errR) })
	wg.Wait()
	return o.String(), e.String(), p.Wait(), nil
}

// output is what a command that must succeed writes.
func output(t testing.TB, j *Jail, command string, env ...string) string {
	t.Helper()
	stdout, stderr, exit := run(t, j, command, env...)
	if exit != (Exit{}) {
		t.Fatalf("%s: %+v: %s", command, exit, stderr)
	}
	return strings.TrimSuffix(stdout, "\n")
}

// eventually waits for something that other processes do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !os.IsNotExist(err)
}

func runTool(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
