// SPDX-License-Identifier: Apache-2.0

// Package escape lets a hostile root loose in the jail of the built sshd, and
// with the same list of attacks in the ChrootDirectory of OpenSSH's sshd, each
// in a real container: one with the pod's default capabilities and a
// privileged one. The secrets it looks for lie where the pod has them.
//
// The containers have no network; ssh reaches them through a process in their
// namespace. Nothing is attacked that is not in one of them, and no attack
// does more than show that it would work.
package escape

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
const patience = 2 * time.Minute

// The canaries: their values must never be seen by a session.
const (
	fileSecret = "canary-of-a-file"
	envSecret  = "canary-of-the-environment"
)

// secretFiles is where the pod keeps what sessions must not read. In the real
// sshd container the first is not even mounted.
var secretFiles = []string{"/etc/admin-client-auth/client-secret", "/etc/cray/ims/authorized_keys", "/var/lib/ims-buildenv/canary"}

const imageRoot = "/mnt/image/image-root"

// container is a running sshd, ours or OpenSSH's.
type container struct {
	t    *testing.T
	name string
	dir  string // its root on this machine
	key  string
	pid  string
}

// opensshConfig is what the legacy containers ran with, and nothing that helps
// or harms.
const opensshConfig = `Port 22
HostKey /etc/cray/ims/host_key
PermitRootLogin yes
AuthorizedKeysFile /etc/cray/ims/authorized_keys
PasswordAuthentication no
UsePAM no
Subsystem sftp internal-sftp
PidFile none
Match User root
ChrootDirectory ` + imageRoot + "\n"

func podman(t testing.TB, args ...string) (string, error) {
	t.Helper()
	conf, err := filepath.Abs("../../images/containers.conf")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "podman", args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+conf)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// start runs a container; its PID 1 is the sshd, as in the pod.
func start(t *testing.T, name string, ours, privileged bool) *container {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "podman", "runc", "ssh", "ssh-keygen", "busybox", "nsenter", "go")
	c := &container{t: t, name: fmt.Sprintf("ims-buildenv-escape-%d-%s", os.Getpid(), name), dir: filepath.Join(t.TempDir(), "root")}
	c.key = c.dir + "-id"
	tool(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", c.key)
	public, err := os.ReadFile(c.key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	c.layOut(strings.TrimSpace(string(public)))

	args := []string{"run", "-d", "--name", c.name, "--network", "none", "--env", "CANARY=" + envSecret,
		// Kubernetes filters no system calls unless told to.
		"--security-opt", "seccomp=unconfined", "-v", "/usr:/usr:ro"}
	if privileged {
		args = append(args, "--privileged")
	} else {
		// In containerd's default set, but not in every podman's.
		args = append(args, "--cap-add", "AUDIT_WRITE,MKNOD,NET_RAW")
	}
	command := []string{"/usr/sbin/sshd", "-D", "-e", "-f", "/etc/cray/ims/sshd_config"}
	if ours {
		bin := os.Getenv("IMS_BUILDENV_BIN")
		if bin == "" {
			bin = "../../bin"
		}
		if bin, err = filepath.Abs(bin); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-v", bin+":/opt/bin:ro", "--env", "SSH_JAIL=True", "--env", "IMAGE_ROOT_PARENT=/mnt/image")
		command = []string{"/opt/bin/sshd", "-o", "AuthorizedKeysFile=/etc/cray/ims/authorized_keys"}
	} else {
		testkit.NeedTool(t, "/usr/sbin/sshd")
		c.write("etc/cray/ims/sshd_config", opensshConfig)
		tool(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(c.dir, "etc/cray/ims/host_key"))
		if privileged {
			// The legacy mounted these for jobs with DKMS, which are the privileged ones.
			mounts := ""
			for _, m := range []string{"-t proc proc", "-t sysfs sys", "--bind /dev"} {
				fields := strings.Fields(m)
				mounts += "mount " + m + " " + imageRoot + "/" + strings.TrimPrefix(fields[len(fields)-1], "/") + " && "
			}
			command = []string{"/bin/sh", "-c", mounts + "exec " + strings.Join(command, " ")}
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := podman(t, "logs", c.name)
			t.Logf("%s:\n%s", c.name, log)
		}
		if out, err := podman(t, "rm", "-f", "-t", "0", c.name); err != nil {
			t.Errorf("remove %s: %v\n%s", c.name, err, out)
		}
	})
	if out, err := podman(t, append(append(args, "--rootfs", c.dir), command...)...); err != nil {
		t.Fatalf("run %s: %v\n%s", name, err, out)
	}
	if c.pid, err = podman(t, "inspect", "-f", "{{.State.Pid}}", c.name); err != nil {
		t.Fatalf("inspect %s: %v\n%s", name, err, c.pid)
	}
	c.until("sshd listens", c.listens)
	return c
}

// listens looks for port 22 in the container's network (proc_pid_net(5)).
func (c *container) listens() bool {
	const port, listen = ":0016 ", " 0A "
	for _, table := range []string{"tcp", "tcp6"} {
		b, _ := os.ReadFile("/proc/" + c.pid + "/net/" + table)
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, port) && strings.Contains(line, listen) {
				return true
			}
		}
	}
	return false
}

// layOut makes the container's root, with the programs of this machine, and
// the image root in it.
func (c *container) layOut(public string) {
	c.t.Helper()
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	lines := []string{"dir usr", "dir proc", "dir sys", "dir dev", "dir tmp 1777", "dir root 0700", "dir opt/bin", "dir run/sshd", "dir var/log",
		"symlink bin usr/bin", "symlink sbin usr/sbin", "symlink lib usr/lib", "symlink lib64 usr/lib64",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n",
		"file etc/group 0644 root:x:0:\nnogroup:x:65534:\n", "file mnt/image/ready 0644"}
	for _, secret := range secretFiles {
		lines = append(lines, "file "+secret[1:]+" 0600 "+public+" "+fileSecret)
	}
	image := imageRoot[1:] + "/"
	lines = append(lines, "dir "+image+"bin", "dir "+image+"usr/bin", "dir "+image+"etc", "dir "+image+"proc", "dir "+image+"sys", "dir "+image+"dev",
		"dir "+image+"root 0700", "dir "+image+"tmp 1777", "file "+image+"etc/passwd 0644 root:x:0:0:root:/root:/bin/sh\n")
	for _, applet := range []string{"sh", "cat", "kill", "ls", "mkdir", "rm", "sleep", "touch", "true"} {
		lines = append(lines, "symlink "+image+"bin/"+applet+" busybox")
	}
	tree.Make(c.t, c.dir, lines...)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		c.t.Fatal(err)
	}
	tool(c.t, "cp", busybox, filepath.Join(c.dir, image, "bin/busybox"))
	if err := os.Link(attacker(c.t), filepath.Join(c.dir, image, "usr/bin/attacker")); err != nil {
		c.t.Fatal(err)
	}
}

func (c *container) write(path, text string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, path), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// ssh is a stock client's command line.
func (c *container) ssh(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", append([]string{"-F", "none", "-i", c.key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		"-o", "ProxyCommand=nsenter -t " + c.pid + " -n busybox nc 127.0.0.1 22", "root@container"}, args...)...)
}

// run runs a command in a session. Not even a failure is fatal: sessions may be
// ended by what they do.
func (c *container) run(command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := c.ssh(ctx, command)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// until polls for a condition of another process.
func (c *container) until(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: %s: not within %s", c.name, what, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// state is the container's status and its exit code.
func (c *container) state() string {
	c.t.Helper()
	out, err := podman(c.t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", c.name)
	if err != nil {
		c.t.Fatalf("inspect %s: %v\n%s", c.name, err, out)
	}
	return out
}
