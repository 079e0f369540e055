// SPDX-License-Identifier: Apache-2.0

// Package pod runs images/pod.yaml, the job as one pod, under podman: the
// container images built from this tree, the volumes, commands, environment and
// default capabilities of the job template. The test stands outside with the
// stock ssh client; IMS and S3 are imslocal's.
//
// The test runs itself in a network namespace of its own, so that the pod may
// use port 22 and nothing leaves the machine.
package pod

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

const (
	apiAddress = "127.0.0.1:9100"
	s3Address  = "127.0.0.1:7070"
	patience   = 4 * time.Minute
)

// TestMain builds the container images, for which debootstrap needs the network,
// and runs the tests again in a network namespace of their own.
func TestMain(m *testing.M) {
	const inside = "IMS_BUILDENV_POD_TEST_NETNS"
	if os.Geteuid() != 0 || os.Getenv(inside) == "1" {
		os.Exit(m.Run())
	}
	if _, err := exec.LookPath("podman"); err == nil {
		if out, err := exec.Command("../../images/build.sh").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "images/build.sh: %v\n%s", err, out)
			os.Exit(1)
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// world is the outside of the pod.
type world struct {
	t      *testing.T
	root   string // of the repository
	bin    string
	work   string
	client *ims.Client
	store  *upload.S3
	s3     struct {
		AccessKey string `json:"access_key"`
		SecretKey string `json:"secret_key"`
	}
	secrets struct {
		ClientID     string `json:"client_id"`
		ClientSecret string `json:"client_secret"`
		CA           string `json:"ca"`
	}
}

func (w *world) run(name string, args ...string) string {
	w.t.Helper()
	out, err := w.try(name, args...)
	if err != nil {
		w.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func (w *world) try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = w.root
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+filepath.Join(w.root, "images/containers.conf"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func newWorld(t *testing.T) *world {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "podman", "runc", "debootstrap", "ssh", "ssh-keygen", "ip", "busybox", "unsquashfs")
	w := &world{t: t}
	var err error
	if w.root, err = filepath.Abs("../.."); err != nil {
		t.Fatal(err)
	}
	w.bin = os.Getenv("IMS_BUILDENV_BIN")
	if w.bin == "" {
		w.bin = filepath.Join(w.root, "bin")
	}
	w.run("ip", "link", "set", "lo", "up")

	data := filepath.Join(t.TempDir(), "imslocal")
	serve := exec.Command(filepath.Join(w.bin, "imslocal"), "serve", "--runner", "none",
		"--listen", apiAddress, "--s3-listen", s3Address, "--data", data)
	var log bytes.Buffer
	serve.Stdout, serve.Stderr = &log, &log
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		serve.Process.Signal(syscall.SIGTERM)
		if err := serve.Wait(); err != nil {
			t.Errorf("imslocal: %v\n%s", err, &log)
		}
	})
	w.until("the API answers", func() bool {
		c, err := net.Dial("tcp", apiAddress)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	w.read(filepath.Join(data, "s3-credentials"), &w.s3)
	w.read(filepath.Join(data, "cluster-secrets"), &w.secrets)
	if w.client, err = ims.New(ims.Config{BaseURL: "http://" + apiAddress}); err != nil {
		t.Fatal(err)
	}
	w.store, err = upload.NewS3(upload.S3Config{Endpoint: "http://" + s3Address,
		AccessKey: w.s3.AccessKey, SecretKey: w.s3.SecretKey, Bucket: "boot-images"})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) read(path string, v any) {
	w.t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// until polls for a condition of another process.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %s", what, patience)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (w *world) untilStatus(id string, want ims.Status) {
	w.t.Helper()
	w.until("status "+string(want), func() bool {
		job, err := w.client.Job(w.t.Context(), id)
		if err != nil {
			w.t.Fatal(err)
		}
		if job.Status != want && (job.Status == ims.Failed || job.Status == ims.Success) {
			w.t.Fatalf("the job ended as %s", job.Status)
		}
		return job.Status == want
	})
}

// baseRoot makes the tree of a small image that a person can log in to.
func (w *world) baseRoot() string {
	w.t.Helper()
	dir := filepath.Join(w.work, "base")
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	tree.Make(w.t, dir, "dir bin", "dir boot", "dir dev", "dir etc", "dir proc", "dir root 0700", "dir sys", "dir tmp 1777",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/sh", "file boot/vmlinuz 0644 kernel", "file boot/initrd 0600 initrd",
		// The flag of a job that made this image must not end the next one.
		"file tmp/complete 0644 stale")
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		w.t.Fatal(err)
	}
	w.run("cp", busybox, filepath.Join(dir, "bin/busybox"))
	for _, name := range []string{"sh", "cat", "echo", "grep", "id", "ls", "mkdir", "touch", "true"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil {
			w.t.Fatal(err)
		}
	}
	return dir
}

// register publishes the base image and returns its record, MD5 and presigned URL.
func (w *world) register() (image ims.Image, md5, url string) {
	w.t.Helper()
	ctx := w.t.Context()
	dir := w.baseRoot()
	rootfs := filepath.Join(w.work, "base.squashfs")
	w.run(filepath.Join(w.bin, "sidecar"), "pack", dir, rootfs)
	image, err := w.client.CreateImage(ctx, "base", "x86_64")
	if err != nil {
		w.t.Fatal(err)
	}
	var artifacts []upload.Artifact
	for kind, path := range map[upload.Kind]string{upload.Rootfs: rootfs,
		upload.Kernel: filepath.Join(dir, "boot/vmlinuz"), upload.Initrd: filepath.Join(dir, "boot/initrd")} {
		f, err := os.Open(path)
		if err != nil {
			w.t.Fatal(err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			w.t.Fatal(err)
		}
		artifacts = append(artifacts, upload.Artifact{Kind: kind, Body: f, Size: st.Size()})
	}
	result, err := upload.Publish(ctx, w.store, upload.Request{Prefix: image.ID, Metadata: upload.ImageMetadata(image.ID, "base", ""), Artifacts: artifacts})
	if err != nil {
		w.t.Fatal(err)
	}
	link := ims.Link{ETag: result.Manifest.ETag, Path: result.Manifest.Path, Type: result.Manifest.Type}
	if _, err := w.client.LinkImage(ctx, image.ID, link); err != nil {
		w.t.Fatal(err)
	}
	if url, err = w.store.PresignGet(ctx, image.ID+"/rootfs", time.Hour); err != nil {
		w.t.Fatal(err)
	}
	i := slices.IndexFunc(result.Artifacts, func(e upload.Entry) bool { return strings.HasSuffix(e.Link.Path, "/rootfs") })
	return image, result.Artifacts[i].MD5, url
}

// play fills images/pod.yaml in as IMS does its template, and starts the pod.
func (w *world) play(name string, values map[string]string) {
	w.t.Helper()
	template, err := os.ReadFile(filepath.Join(w.root, "images/pod.yaml"))
	if err != nil {
		w.t.Fatal(err)
	}
	var kept strings.Builder // whole-line comments mention ${...} too
	for line := range strings.Lines(string(template)) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			kept.WriteString(line)
		}
	}
	filled := os.Expand(kept.String(), func(key string) string {
		if value, ok := values[key]; ok {
			return value
		}
		return "$" + key // for the container's shell
	})
	yaml := filepath.Join(w.work, "pod.yaml")
	if err := os.WriteFile(yaml, []byte(filled), 0o600); err != nil {
		w.t.Fatal(err)
	}
	secret := map[string]string{"access_key": w.s3.AccessKey, "secret_key": w.s3.SecretKey,
		"s3_endpoint": "http://" + s3Address, "ssl_validate": "false"}
	for key, value := range secret {
		secret[key] = base64.StdEncoding.EncodeToString([]byte(value))
	}
	data, err := json.Marshal(secret)
	if err != nil {
		w.t.Fatal(err)
	}
	secretFile := filepath.Join(w.work, "secret")
	if err := os.WriteFile(secretFile, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
	const secretName = "ims-s3-credentials"
	w.try("podman", "secret", "rm", secretName) // of a run that was killed
	w.run("podman", "secret", "create", secretName, secretFile)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			for _, container := range []string{"prepare", "buildenv-sidecar", "sshd"} {
				out, _ := w.try("podman", "logs", name+"-"+container)
				w.t.Logf("%s:\n%s", container, out)
			}
		}
		w.try("podman", "pod", "rm", "-f", name)
		w.try("podman", "volume", "rm", "-f", name+"-job-claim", "ims-job-configmap", "cray-configmap-ca-public-key",
			"admin-client-auth", "ims-config-vol")
		w.try("podman", "secret", "rm", secretName)
	})
	w.run("podman", "kube", "play", yaml)
}

func TestPodTurnsAnImageIntoAnother(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct{ jailed, dkms bool }{{true, false}, {false, false}, {true, true}} {
		t.Run(fmt.Sprintf("jailed=%t,dkms=%t", c.jailed, c.dkms), func(t *testing.T) {
			inner := *w
			inner.t, inner.work = t, t.TempDir()
			inner.job(c.jailed, c.dkms)
		})
	}
}

// python is how the job template writes booleans.
var python = map[bool]string{true: "True", false: "False"}

// job does one job. With dkms the container sshd is privileged, as the job template has it then, and mounts the image.
func (w *world) job(jailed, dkms bool) {
	t, ctx := w.t, w.t.Context()
	key := filepath.Join(w.work, "id")
	w.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	record, err := w.client.CreatePublicKey(ctx, "pod", string(public))
	if err != nil {
		t.Fatal(err)
	}
	base, md5, url := w.register()
	job, err := w.client.CreateJob(ctx, ims.JobRequest{JobType: "customize", ArtifactID: base.ID, PublicKeyID: record.ID,
		ArchiveName: "made in a pod", RequireDKMS: &dkms, SSHContainers: []ims.SSHContainer{{Name: "customize", Jail: jailed}}})
	if err != nil {
		t.Fatal(err)
	}
	pod := "ims-" + job.ID
	w.play(pod, map[string]string{
		"IMS_JOB_ID": job.ID, "PUBLIC_KEY": strings.TrimSpace(string(public)), "DOWNLOAD_URL": url, "DOWNLOAD_MD5SUM": md5,
		"CA_CERTIFICATE":  strings.ReplaceAll(strings.TrimSpace(w.secrets.CA), "\n", "\n    "),
		"OAUTH_CLIENT_ID": w.secrets.ClientID, "OAUTH_CLIENT_SECRET": w.secrets.ClientSecret,
		"OAUTH_ENDPOINT": "http://" + apiAddress + "/keycloak/realms/shasta/protocol/openid-connect/token",
		"IMS_URL":        "http://" + apiAddress, "IMAGE_NAME": "made in a pod",
		"SSH_JAIL": python[jailed], "DKMS": python[dkms], "SSHD_PRIVILEGED": fmt.Sprint(dkms),
	})
	w.untilStatus(job.ID, ims.WaitingOnUser)

	ssh := func(command string) string {
		return w.run("ssh", "-F", "none", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no",
			"-o", "UserKnownHostsFile="+filepath.Join(w.work, "known_hosts"), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes",
			"root@127.0.0.1", command)
	}
	prefix, flag := "", "/tmp/complete"
	if !jailed {
		prefix, flag = "/mnt/image/image-root", "/mnt/image/complete"
	}
	ssh("echo changed in the pod > " + prefix + "/etc/changed")
	if log := w.run("podman", "logs", pod+"-sshd"); dkms != strings.Contains(log, "layout=layered") {
		t.Errorf("mounted by the container sshd: %t", !dkms)
	}
	if jailed {
		if out := ssh("ls /"); strings.Contains(out, "mnt") || !strings.Contains(out, "boot") {
			t.Errorf("the jail's root holds:\n%s", out)
		}
	} else if out := ssh("grep CapEff /proc/self/status"); !strings.Contains(out, "00000000a80425fb") {
		t.Errorf("the sshd container does not have the runtime's default capabilities: %s", out)
	}
	ssh("touch " + flag)
	w.untilStatus(job.ID, ims.Success)
	done, err := w.client.Job(ctx, job.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"buildenv-sidecar", "sshd"} {
		w.until(name+" exits with 0", func() bool {
			return w.run("podman", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", pod+"-"+name) == "exited 0\n"
		})
	}
	w.checkImage(done.ResultantImageID)
}

// checkImage looks at the new image as unsquashfs sees it.
func (w *world) checkImage(id string) {
	w.t.Helper()
	body, _, err := w.store.Get(w.t.Context(), id+"/rootfs")
	if err != nil {
		w.t.Fatal(err)
	}
	defer body.Close()
	made := filepath.Join(w.work, "made.squashfs")
	f, err := os.Create(made)
	if err == nil {
		_, err = f.ReadFrom(body)
		f.Close()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	out := filepath.Join(w.work, "out")
	w.run("unsquashfs", "-quiet", "-no-progress", "-d", out, made)
	for _, path := range []string{"etc/changed", "etc/cray/ca/certificate_authority.crt", "boot/vmlinuz"} {
		if _, err := os.Stat(filepath.Join(out, path)); err != nil {
			w.t.Error(err)
		}
	}
	for _, path := range []string{"tmp/complete", "etc/resolv.conf", "dev/null", "dev/tty"} {
		if _, err := os.Lstat(filepath.Join(out, path)); err == nil {
			w.t.Errorf("%s was packed", path)
		}
	}
}
