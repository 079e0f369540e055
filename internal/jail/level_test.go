// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

// TestInPod runs this package's other tests with the capabilities of an unprivileged pod.
func TestInPod(t *testing.T) {
	testkit.NeedRoot(t)
	if inPod() {
		t.Skip("this is the pod")
	}
	for kind, tests := range map[string]string{
		"cut":    "TestAttacks|TestProofSees|TestAuto|TestExitStatus|TestTerminal|TestSFTP|TestStopStubborn|TestLeavesNoTrace|TestMountPointsRemoved",
		"filter": "TestAttacks|TestAuto|TestTerminal|TestSFTP|TestLeavesNoTrace|TestDevRestored|TestDevReplaced|TestMountPointsRemoved",
	} {
		cmd := exec.Command("/proc/self/exe", "-test.run=^("+tests+")$", "-test.v")
		cmd.Env = append(os.Environ(), podEnv+"="+kind)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("in the pod (%s): %v\n%s", kind, err, out)
		}
		for _, name := range []string{"TestAttacks/chroot", "TestAuto", "TestSFTP/chroot"} {
			if !strings.Contains(string(out), "--- PASS: "+name) {
				t.Errorf("%s was not run in the pod (%s)", name, kind)
			}
		}
	}
}

// podDevices is what container runtimes let a pod do with devices: make all, open these.
var podDevices = []string{
	"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm",
}

// TestPodDevices promises that sessions may make device nodes where the container's rules keep them from opening them.
func TestPodDevices(t *testing.T) {
	testkit.NeedRoot(t)
	if inPod() {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: Chroot})
		if j.caps&(1<<unix.CAP_MKNOD) == 0 {
			t.Error("CAP_MKNOD was taken away for nothing")
		}
		if got := output(t, j, "mknod /tmp/disk b 8 0 && stat -c %F /tmp/disk; cat /tmp/disk 2>&1; true"); got != "block special file\ncat: /tmp/disk: Operation not permitted" {
			t.Errorf("a made node: %q", got)
		}
		buildAttacker(t, root)
		for _, attack := range []string{"mknod", "device-nodes"} {
			if out, _, exit := run(t, j, "attacker "+attack+" / 0"); exit.Code != 1 {
				t.Errorf("%s: %s", attack, out)
			}
		}
		return
	}
	group := fmt.Sprintf("/sys/fs/cgroup/devices/ims-buildenv-test-%d", os.Getpid())
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("no device control group (cgroup v1) to make rules in: %v", err)
	}
	t.Cleanup(func() { os.Remove(group) })
	if err := os.WriteFile(filepath.Join(group, "devices.deny"), []byte("a"), 0); err != nil {
		t.Skipf("no rules can be made: %v", err)
	}
	for _, line := range podDevices {
		if err := os.WriteFile(filepath.Join(group, "devices.allow"), []byte(line), 0); err != nil {
			t.Fatal(err)
		}
	}
	inPodAlone(t, "filter", cgroupEnv+"="+group)
}

// TestAuto promises the strongest level there is.
func TestAuto(t *testing.T) {
	j := startJail(t, Config{Root: newRoot(t), Level: Auto})
	want := Namespaces
	if inPod() {
		want = Chroot
	}
	if j.Level() != want {
		t.Errorf("level %s, want %s", j.Level(), want)
	}
	if inPod() {
		if _, err := Start(t.Context(), Config{Root: newRoot(t), Level: Namespaces, Log: testLog(t)}); err == nil || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
			t.Errorf("namespaces in a pod: %v", err)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		link := root + "-link"
		if err := os.Symlink(root, link); err != nil {
			t.Fatal(err)
		}
		writeFile(t, root+"-file", "")
		for _, bad := range []string{link, root + "-file", root + "-missing"} {
			if j, err := Start(t.Context(), Config{Root: bad, Level: level, Log: testLog(t)}); err == nil {
				j.Stop(t.Context(), 0)
				t.Errorf("%s: accepted", bad)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if j, err := Start(ctx, Config{Root: root, Level: level, Log: testLog(t)}); err == nil {
			j.Stop(t.Context(), 0)
			t.Error("started after its context had ended")
		}
		expectQuiet(t, root, level)
	})
}

// TestDKMSPlain promises /proc, /sys and /dev below the image root for plain sessions, and for nobody else.
func TestDKMSPlain(t *testing.T) {
	if inPod() {
		t.Skip("nothing can be mounted in a pod")
	}
	root := newRoot(t)
	j := startJail(t, Config{Root: root, Level: Plain, DKMS: true})
	got := output(t, j, "cd "+root+" && ls -d proc/self/status sys/kernel dev/null && chroot . sh -c 'echo x > /dev/null && head -c 4 /proc/self/status'")
	if got != "dev/null\nproc/self/status\nsys/kernel\nName" {
		t.Errorf("got %q", got)
	}
	for _, name := range []string{"proc", "sys", "dev"} {
		if n := countEntries(t, filepath.Join(root, name)); n != 0 {
			t.Errorf("%d entries in %s outside the sessions", n, name)
		}
	}
	if _, err := j.Stop(t.Context(), 0); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"proc", "sys", "dev"} {
		if exists(filepath.Join(root, name)) {
			t.Errorf("%s is still there", name)
		}
	}
}

// TestNamespacesView promises what a package's scripts find in the namespaces level.
func TestNamespacesView(t *testing.T) {
	if inPod() {
		t.Skip("no namespaces in a pod")
	}
	root := newRoot(t)
	tree.Make(t, root, "dir dev 0755", "file dev/null 0644 not a device")
	j := startJail(t, Config{Root: root, Level: Namespaces})
	for command, want := range map[string]string{
		"stat -c %F /dev/null /dev/full /dev/tty":                 "character special file\ncharacter special file\ncharacter special file",
		"readlink /dev/fd /dev/stdin /dev/ptmx":                   "/proc/self/fd\n/proc/self/fd/0\npts/ptmx",
		"stat -c %a /dev/shm":                                     "1777",
		"cat < /dev/null && cat <(echo process substitution)":     "process substitution",
		"mknod /tmp/n c 1 3 && stat -c %F /tmp/n && rm /tmp/n":    "character special file",
		"cat /tmp/m 2>&1; mknod /tmp/m c 1 3; cat /tmp/m 2>&1":    "cat: /tmp/m: No such file or directory\ncat: /tmp/m: Permission denied",
		"ls /proc/1/root 2>&1":                                    "ls: cannot access '/proc/1/root': Permission denied",
		"touch /proc/sys/kernel/core_pattern /sys/x 2>&1 | wc -l": "2",
		"mount -t tmpfs tmpfs /tmp 2>/dev/null; echo $?":          "32",
	} {
		if command[:5] == "mount" || command[:2] == "ls" || command[:5] == "cat /" || command[:5] == "touch" {
			command += "; true"
		}
		if got := output(t, j, command); got != want {
			t.Errorf("%s:\n got %q\nwant %q", command, got, want)
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "dev/null")); err != nil || string(b) != "not a device" {
		t.Errorf("the image's own /dev/null: %q, %v", b, err)
	}
}
