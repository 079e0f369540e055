// SPDX-License-Identifier: Apache-2.0

// Package works does in the jail of the built sshd what people do to images: it
// installs packages, rebuilds initrds, adds users, uses terminals and runs
// Ansible, on a real Debian root with the package managers of three
// distributions, in a container with the pod's default capabilities and in a
// privileged one. It prints a table of all that was tried.
//
// The root is made once (scripts/works-root.sh) and used through an overlay.
// The containers have no network; the packages come from repositories in the
// root.
package works

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// patience bounds every wait; a machine busy with other tests is slow.
const patience = 3 * time.Minute

// container is a running sshd.
type container struct {
	t    *testing.T
	name string
	dir  string // for the test's own files
	pid  string
}

func command(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF=../../images/containers.conf")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out)), err
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := command(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// debianRoot is the root that no test changes.
func debianRoot(t testing.TB) string {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "debootstrap", "podman", "runc", "ssh", "ssh-keygen", "nsenter", "busybox", "ansible", "ansible-playbook")
	root, err := filepath.Abs("../../build/works/root")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("scripts/works-root.sh", root)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return root
}

// start runs a container whose PID 1 is the sshd, as in the pod.
func start(t *testing.T, lower string, privileged bool) *container {
	t.Helper()
	work := t.TempDir()
	c := &container{t: t, name: fmt.Sprintf("ims-buildenv-works-%d-%t", os.Getpid(), privileged), dir: work}
	key := filepath.Join(work, "id")
	tool(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	rootfs := filepath.Join(work, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, work, "dir job/image-root 0755", "dir upper 0755", "dir overlay 0755", "file job/ready 0644")
	tree.Make(t, rootfs, "dir usr", "dir proc", "dir sys", "dir dev", "dir tmp 1777", "dir root 0700", "dir run", "dir opt/bin", "dir mnt/image",
		"symlink bin usr/bin", "symlink sbin usr/sbin", "symlink lib usr/lib", "symlink lib64 usr/lib64",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/sh\n", "file etc/group 0644 root:x:0:\n",
		"file etc/authorized_keys 0600 "+strings.TrimSpace(string(public)))
	image := filepath.Join(work, "job/image-root")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, filepath.Join(work, "upper"), filepath.Join(work, "overlay"))
	tool(t, "mount", "-t", "overlay", "overlay", "-o", options, image)
	t.Cleanup(func() {
		if out, err := command("umount", image); err != nil {
			t.Error(err, out)
		}
	})

	bin := os.Getenv("IMS_BUILDENV_BIN")
	if bin == "" {
		bin = "../../bin"
	}
	if bin, err = filepath.Abs(bin); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", "-d", "--name", c.name, "--network", "none", "--hostname", "localhost", "-v", "/usr:/usr:ro", "-v", bin + ":/opt/bin:ro",
		"-v", filepath.Join(work, "job") + ":/mnt/image:rbind",
		// Kubernetes filters no system calls unless told to.
		"--security-opt", "seccomp=unconfined", "--env", "SSH_JAIL=True", "--env", "IMAGE_ROOT_PARENT=/mnt/image",
		"--env", "IMS_JOB_ID=works", "--env", "JOB_ENABLE_DKMS=" + map[bool]string{true: "True", false: "False"}[privileged]}
	if privileged {
		args = append(args, "--privileged")
	} else {
		// In containerd's default set, but not in every podman's.
		args = append(args, "--cap-add", "AUDIT_WRITE,MKNOD,NET_RAW")
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := command("podman", "logs", c.name)
			t.Logf("log of sshd:\n%s", log)
		}
		if _, err := command("podman", "rm", "-f", "-t", "0", c.name); err != nil {
			t.Error(err)
		}
	})
	tool(t, "podman", append(args, "--rootfs", rootfs, "/opt/bin/sshd", "-o", "AuthorizedKeysFile=/etc/authorized_keys")...)
	c.pid = tool(t, "podman", "inspect", "-f", "{{.State.Pid}}", c.name)
	config := fmt.Sprintf(`Host *
User root
IdentityFile %[1]s/id
IdentitiesOnly yes
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ProxyCommand nsenter -t %[2]s -n busybox nc 127.0.0.1 22
`, work, c.pid)
	if err := os.WriteFile(filepath.Join(work, "ssh_config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if _, err := c.run("true", false); err == nil {
			return c
		} else if time.Now().After(deadline) {
			t.Fatalf("no login within %s: %v", patience, err)
		}
	}
}

// run runs a command in a session, on a terminal if asked to.
func (c *container) run(line string, tty bool) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	args := []string{"-F", filepath.Join(c.dir, "ssh_config")}
	if tty {
		args = append(args, "-tt")
	} else {
		line = "exec 2>&1; " + line // in order
	}
	cmd := exec.CommandContext(ctx, "ssh", append(args, "job", line)...)
	cmd.Env = append(os.Environ(), "TERM=xterm", "LC_ALL=C.UTF-8")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.ReplaceAll(out.String(), "\r\n", "\n"), err
}
