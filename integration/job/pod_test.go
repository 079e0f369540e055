// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/port"
)

// pod is a place to run the programs by hand, with surroundings that imslocal
// would not give them: a mount namespace with the pod's paths in it. Its job is
// a record of imslocal whose own pod has ended already.
type pod struct {
	t      *testing.T
	w      *world
	id     string // of the job
	name   string // of the new image
	jail   bool
	port   int
	env    map[string]string // changes to the contract's environment; "" unsets
	holder *exec.Cmd
	user   user
}

// podScript makes the pod's paths. What it mounts ends with the namespace.
const podScript = `set -e
mount -t tmpfs tmpfs "$POD/scratch"
mkdir "$POD/scratch/up" "$POD/scratch/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$POD/scratch/up,workdir=$POD/scratch/work" /etc
mkdir -p /etc/cray/ims /etc/cray/ca /etc/admin-client-auth
cp -r "$POD/etc/." /etc/
mount -t tmpfs tmpfs /mnt
mkdir /mnt/image
eval "$VOLUME"
if [ -d "$POD/root" ]; then cp -a "$POD/root" /mnt/image/image-root; fi
echo made
exec cat`

// The volume of a pod: a directory of the machine, or a small disk.
const (
	volumeDirectory = `mount --bind "$POD/volume" /mnt/image`
	volumeSmall     = `mount -t tmpfs -o size=26m tmpfs /mnt/image`
)

// newPod makes a pod around an image root of these lines, laid out already;
// without lines there is none.
func (s *stage) newPod(t *testing.T, jail bool, volume string, lines ...string) *pod {
	t.Helper()
	p := &pod{t: t, w: s.world, name: newName(t), jail: jail, env: map[string]string{}, user: s.user}
	p.id = s.spentJob(t)
	dir := t.TempDir()
	files := map[string]string{
		"etc/cray/authorized_keys":              readFile(t, s.user.file+".pub"),
		"etc/cray/ca/certificate_authority.crt": "-----BEGIN CERTIFICATE-----\n",
		"etc/admin-client-auth/endpoint":        s.tokenURL(),
		"etc/admin-client-auth/client-id":       s.clientID,
		"etc/admin-client-auth/client-secret":   s.clientSecret,
	}
	for name, text := range files {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "scratch"), 0o755), os.Mkdir(filepath.Join(dir, "volume"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if lines != nil {
		if err := os.Mkdir(filepath.Join(dir, "root"), 0o755); err != nil {
			t.Fatal(err)
		}
		makeRoot(t, filepath.Join(dir, "root"), lines...)
	}
	held, addr, err := port.Hold(":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	p.port = addr.Port

	p.holder = exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", podScript)
	p.holder.Env = append(os.Environ(), "POD="+dir, "VOLUME="+volume)
	p.holder.Stderr = os.Stderr
	hold, err := p.holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.holder.StdoutPipe()
	if err == nil {
		err = p.holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hold.Close()
		p.holder.Wait()
	})
	if line, err := io.ReadAll(io.LimitReader(out, 5)); err != nil || string(line) != "made\n" {
		t.Fatalf("pod: %v", err)
	}
	return p
}

// spentJob is the record of a job that has ended.
func (s *stage) spentJob(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "no-image")
	if err := os.WriteFile(file, []byte("no image"), 0o600); err != nil {
		t.Fatal(err)
	}
	j := s.create(t, order{image: s.publish(t, newName(t), file).id})
	j.wait(ims.Failed)
	j.ends()
	return j.ID
}

// path is a file of the pod, from outside.
func (p *pod) path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.holder.Process.Pid), "root", name)
}

// environment is what the job template sets, for all containers at once.
func (p *pod) environment() []string {
	jail := map[bool]string{true: "True", false: "False"}[p.jail]
	env := map[string]string{
		"PATH": os.Getenv("PATH"), "IMS_JOB_ID": p.id, "IMS_ACTION": "customize", "IMAGE_ROOT_PARENT": "/mnt/image",
		"SSH_JAIL": jail, "JOB_ENABLE_DKMS": "True", "BUILD_ARCH": "x86_64", "LOG_LEVEL": "INFO",
		"IMAGE_ROOT_ARCHIVE_NAME": p.name, "KERNEL_FILENAME": "vmlinuz", "INITRD_FILENAME": "initrd",
		"KERNEL_PARAMETERS_FILENAME": "kernel-parameters", "OAUTH_CONFIG_DIR": "/etc/admin-client-auth",
		"IMS_URL": p.w.url, "IMS_PYTHON_HELPER_TIMEOUT": "60", "SSHD_PORT": strconv.Itoa(p.port),
		"S3_ENDPOINT": p.w.s3URL, "S3_BUCKET": bucket, "S3_ACCESS_KEY": p.w.accessKey, "S3_SECRET_KEY": p.w.secretKey,
		"SSHD_OPTIONS": "-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config", "SSHD_CONFIG_FILE": "/etc/cray/ims/sshd_config",
	}
	maps.Copy(env, p.env)
	var list []string
	for k, v := range env {
		if v != "" {
			list = append(list, k+"="+v)
		}
	}
	return list
}

// process is a program running in the pod.
type process struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr string // files
	done           chan struct{}
}

// start runs one of the programs as a container would.
func (p *pod) start(name string, args ...string) *process {
	t := p.t
	t.Helper()
	dir := t.TempDir()
	pr := &process{t: t, stdout: filepath.Join(dir, "stdout"), stderr: filepath.Join(dir, "stderr"), done: make(chan struct{})}
	// nsenter becomes the program, so that signals and exit codes are its own
	pr.cmd = exec.Command("nsenter", append([]string{"--mount=/proc/" + strconv.Itoa(p.holder.Process.Pid) + "/ns/mnt", filepath.Join(p.w.bin, name)}, args...)...)
	pr.cmd.Env = p.environment()
	if name == "sshd" {
		// a container of its own: neither keys nor anything else of the sidecar's
		pr.cmd.Env = append([]string{}, pr.cmd.Env...)
		for i, e := range pr.cmd.Env {
			if strings.HasPrefix(e, "S3_") {
				pr.cmd.Env[i] = "UNUSED="
			}
		}
	}
	stdout, err := os.Create(pr.stdout)
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	stderr, err := os.Create(pr.stderr)
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	pr.cmd.Stdout, pr.cmd.Stderr = stdout, stderr
	if err := pr.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		pr.cmd.Wait()
		close(pr.done)
	}()
	t.Cleanup(func() {
		select {
		case <-pr.done:
		default:
			pr.cmd.Process.Signal(syscall.SIGKILL)
			<-pr.done
		}
		if t.Failed() {
			t.Logf("%s %q:\n%s%s", name, args, readFile(t, pr.stderr), readFile(t, pr.stdout))
		}
	})
	return pr
}

// wait returns the exit code.
func (pr *process) wait() int {
	pr.t.Helper()
	eventually(pr.t, "the end of "+pr.cmd.Args[2], func() bool {
		select {
		case <-pr.done:
			return true
		default:
			return false
		}
	})
	return pr.cmd.ProcessState.ExitCode()
}

// says waits for a text in the log.
func (pr *process) says(text string) {
	pr.t.Helper()
	eventually(pr.t, "the log says "+text, func() bool {
		b, err := os.ReadFile(pr.stderr)
		if err != nil {
			pr.t.Fatal(err)
		}
		if bytes.Contains(b, []byte(text)) {
			return true
		}
		select {
		case <-pr.done:
			pr.t.Fatalf("it ended before the log said %q", text)
		default:
		}
		return false
	})
}

// status is the job's.
func (p *pod) status() ims.Status {
	p.t.Helper()
	job, err := p.w.ims.Job(p.t.Context(), p.id)
	if err != nil {
		p.t.Fatal(err)
	}
	return job.Status
}

// open starts both containers and waits until the user may come.
func (p *pod) open() (sidecar, sshd *process) {
	p.t.Helper()
	// the record is of a job that has ended; it begins again
	if _, err := p.w.ims.SetStatus(p.t.Context(), p.id, ims.Creating); err != nil {
		p.t.Fatal(err)
	}
	sshd = p.start("sshd", "/mnt/image")
	sidecar = p.start("sidecar", "run", "/mnt/image")
	sidecar.says("status=waiting_on_user")
	return sidecar, sshd
}

// touch makes a flag, through the shell.
func (p *pod) touch(flag string) {
	p.t.Helper()
	j := job{t: p.t, user: p.user, port: p.port, jail: p.jail}
	j.ssh("touch " + j.flag(flag))
}

// checkFailed checks all that a failure of the sidecar has in common.
func (p *pod) checkFailed(pr *process, words ...string) {
	p.t.Helper()
	if code := pr.wait(); code != 1 {
		p.t.Errorf("exit code %d, want 1", code)
	}
	if got := p.status(); got != ims.Failed {
		p.t.Errorf("job status %s, want %s", got, ims.Failed)
	}
	checkOneError(p.t, readFile(p.t, pr.stderr), words...)
	p.checkNothingLeft()
}

// checkNothingLeft looks for what a failed job must not leave.
func (p *pod) checkNothingLeft() {
	t := p.t
	t.Helper()
	p.w.checkNoImage(t, p.name)
	entries, err := os.ReadDir(p.path("/mnt/image"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "image-root", "image.sqsh", ".image.sqsh.index", ".image.sqsh.json", "ready":
		default:
			t.Errorf("left on the volume: %s", e.Name())
		}
	}
	// the shell's side may still be there: it is another container
	for _, line := range processesOf(t, p.id) {
		if strings.Contains(line, "/sidecar ") {
			t.Errorf("still running: %s", line)
		}
	}
}
