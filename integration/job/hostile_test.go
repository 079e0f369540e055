// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// TestGarbageKey is a public key record that is none: nobody could log in.
func TestGarbageKey(t *testing.T) {
	s := need(t)
	for name, text := range map[string]string{
		"words":   "this is not a key",
		"base64":  "ssh-ed25519 AAAAB3NzaC1yc2EAAAADAQABAAAAgQ== user",
		"private": "-----BEGIN OPENSSH PRIVATE KEY-----",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			key, err := s.ims.CreatePublicKey(t.Context(), "garbage", text)
			if err != nil {
				t.Fatal(err)
			}
			s.create(t, order{key: key.ID, jail: true}).
				checkFailed("buildenv-sidecar", "authorized_keys", "no usable public key", "public_key_id")
		})
	}
}

// flip changes the byte at off. What it means there must be noticed.
func flip(b []byte, off uint64) []byte {
	b = bytes.Clone(b)
	b[off] ^= 0xff
	return b
}

// TestDamagedImage gives jobs images that are broken in S3 in ways their MD5
// does not tell.
func TestDamagedImage(t *testing.T) {
	s := need(t)
	good, err := os.ReadFile(s.base.file)
	if err != nil {
		t.Fatal(err)
	}
	// tables, from the superblock (Documentation/filesystems/squashfs.rst): the
	// first byte after a metadata block's two bytes of length begins its zlib header
	table := func(field int) uint64 { return binary.LittleEndian.Uint64(good[field:]) }
	random := make([]byte, len(good))
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	for name, content := range map[string][]byte{
		"empty":           {},
		"superblock only": good[:96],
		"truncated":       good[:len(good)/2],
		"short by little": good[:table(40)-1],
		"random":          random,
		"magic":           flip(good, 0),
		"block size":      flip(good, 14),
		"root inode":      flip(good, 37),
		"data":            flip(good, 5000),
		"inode table":     flip(good, table(64)+20),
		"directory table": flip(good, table(72)+20),
		"fragment table":  flip(good, table(80)+1),
		"id table":        flip(good, table(48)+7),
		"xattr table":     flip(good, table(56)+7),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "damaged")
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			img := s.publish(t, newName(t), file)
			j := s.create(t, order{image: img.id, jail: true, dkms: true})
			container := "prepare"
			if name == "data" {
				container = "buildenv-sidecar" // the root is layered, and files are read while the user works
			}
			j.checkFailed(container, img.id+"/rootfs", "damaged", "another image")
			if log := j.log("prepare"); strings.Contains(log, "X-Amz-Signature=") {
				t.Errorf("the URL with its credentials is in the log")
			}
		})
	}
}

// TestWrongMD5 replaces what IMS knows about the image's content.
func TestWrongMD5(t *testing.T) {
	s := need(t)
	t.Parallel()
	img := s.publish(t, newName(t), s.base.file)
	good, info := s.get(t, img.id+"/rootfs")
	wrong := strings.Repeat("0123456789abcdef", 2)
	_, err := s.s3.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String(bucket), Key: aws.String(img.id + "/rootfs"),
		Body: bytes.NewReader(good), Metadata: map[string]string{"md5sum": wrong}})
	if err != nil {
		t.Fatal(err)
	}
	s.create(t, order{image: img.id}).checkFailed("prepare", img.id+"/rootfs", wrong, info.Metadata["md5sum"], "upload this one again")
}

// TestBootNamesRefused: a name that no file in the image's boot directory can have ends the job before a user is asked
// to work for nothing.
func TestBootNamesRefused(t *testing.T) {
	s := need(t)
	const secret = "/etc/admin-client-auth/client-secret"
	up := strings.Repeat("../", 12) + secret[1:]
	for name, c := range map[string]struct {
		order
		words []string
	}{
		"name that leaves": {order{jail: true, kernel: up}, []string{"KERNEL_FILENAME", up}},
		"absolute name":    {order{initrd: secret}, []string{"INITRD_FILENAME", secret}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s.create(t, c.order).checkFailed("prepare", c.words...)
		})
	}
}

// TestBootFilesGone has users who break the boot files, some of them on
// purpose: the sidecar, which reads them, holds secrets.
func TestBootFilesGone(t *testing.T) {
	s := need(t)
	const secret = "/etc/admin-client-auth/client-secret"
	up := strings.Repeat("../", 12)
	for _, c := range []struct {
		name, do string
		order
		words []string
	}{
		{"no kernel", "rm boot/vmlinuz", order{jail: true, dkms: true}, []string{"kernel: ", " /boot/vmlinuz", "kernel_file_name"}},
		{"no initrd", "rm boot/initrd", order{}, []string{"initrd: ", " /boot/initrd", "initrd_file_name"}},
		{"neither", "rm -r boot", order{jail: true}, []string{"kernel: ", " /boot/vmlinuz", "initrd: ", " /boot/initrd"}},
		{"empty initrd", "echo -n > usr/lib/initrd-6.1", order{jail: true}, []string{"/boot/initrd", "is empty"}},
		{"fifo", "rm boot/vmlinuz; mkfifo boot/vmlinuz", order{}, []string{"kernel: ", " /boot/vmlinuz", "regular"}},
		{"directory", "rm boot/vmlinuz; mkdir boot/vmlinuz", order{jail: true}, []string{"kernel: ", " /boot/vmlinuz", "regular"}},
		{"loop", "ln -sf vmlinuz boot/vmlinuz", order{jail: true, dkms: true}, []string{"kernel: ", " /boot/vmlinuz", "symbolic links"}},
		{"absolute link to a secret", "ln -sf " + secret + " boot/initrd", order{jail: true, dkms: true}, []string{"initrd: ", " /boot/initrd", secret}},
		{"relative link to a secret", "ln -sf " + up + secret + " boot/initrd", order{jail: true}, []string{"initrd: ", " /boot/initrd", secret}},
		{"plain link to a secret", "ln -sf " + up + secret + " boot/vmlinuz", order{}, []string{"kernel: ", " /boot/vmlinuz", secret}},
		{"directory link to a secret", "rm -r boot; ln -s " + up + "etc/admin-client-auth boot", order{jail: true}, []string{"kernel: ", " /boot/vmlinuz", "initrd: ", " /boot/initrd"}},
		{"link to the sidecar's environment", "ln -sf /proc/self/environ boot/initrd", order{dkms: true}, []string{"initrd: ", " /boot/initrd", "/proc/self/environ"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, c.order)
			j.wait(ims.WaitingOnUser)
			j.ssh(fmt.Sprintf("cd %s/ && %s && touch %s", strings.TrimSuffix(j.inside("/"), "/"), c.do, j.flag("complete")))
			j.checkFailed("buildenv-sidecar", c.words...)
		})
	}
}

// TestBootFileElsewhere: a link out of the root means the image's own file of
// that name, if there is one.
func TestBootFileElsewhere(t *testing.T) {
	s := need(t)
	t.Parallel()
	j := s.create(t, order{jail: true})
	j.wait(ims.WaitingOnUser)
	j.ssh("mkdir -p /etc/admin-client-auth && echo -n decoy > /etc/admin-client-auth/client-secret && " +
		"ln -sf ../../../../../etc/admin-client-auth/client-secret /boot/initrd && touch /tmp/complete")
	j.wait(ims.Success)
	j.result(kernelText, "decoy")
}

// TestUserGivesUp: that is no failure of the pod, and failed wins.
func TestUserGivesUp(t *testing.T) {
	s := need(t)
	for _, m := range modes[1:3] {
		for _, flags := range [][]string{{"failed"}, {"failed", "complete"}, {"complete", "failed"}} {
			t.Run(m.name+" "+strings.Join(flags, " and "), func(t *testing.T) {
				t.Parallel()
				j := s.create(t, m.order)
				j.wait(ims.WaitingOnUser)
				command := "touch"
				for _, f := range flags {
					command += " " + j.flag(f)
				}
				j.ssh(command)
				j.wait(ims.Failed)
				if codes := j.ends(); codes["buildenv-sidecar"] != 0 || codes["sshd"] != 0 {
					t.Errorf("exit codes %v, want 0", codes)
				}
				if log := j.log("buildenv-sidecar"); strings.Contains(log, "level=ERROR") || !strings.Contains(log, "marked the customization as failed") {
					t.Error("the log does not say, as information, that the user gave up")
				}
				s.checkNoImage(t, j.name)
				j.checkNothingLeft()
			})
		}
	}
}

// TestStaleFlags has an image that ships both flags, as one packed by careless
// tools does. They neither end the job nor get into the new image.
func TestStaleFlags(t *testing.T) {
	s := need(t)
	file := packTree(t, s.world, filepath.Join(t.TempDir(), "stale"), baseTree("file tmp/complete 0644", "file tmp/failed 0644 old")...)
	img := s.publish(t, newName(t), file)
	for _, m := range modes[1:3] {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			m.image = img.id
			j := s.create(t, m.order)
			j.wait(ims.WaitingOnUser)
			if out := j.ssh("ls " + j.inside("/tmp")); out != "" {
				t.Errorf("in /tmp when the user comes: %q", out)
			}
			j.ssh("touch " + j.flag("complete"))
			j.wait(ims.Success)
			checkTree(t, file, j.result(kernelText, initrdText).file, append(traces(false), "tmp: mtime",
				"tmp/complete: only in the first tree", "tmp/failed: only in the first tree")...)
		})
	}
}

// TestDelete removes a job whose user is still logged in.
func TestDelete(t *testing.T) {
	s := need(t)
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, m.order)
			j.wait(ims.WaitingOnUser)
			// a program that ignores the polite ways to end it
			j.ssh("setsid sh -c 'trap \"\" TERM HUP INT; while true; do sleep 1000; done' >/dev/null 2>&1 </dev/null &")
			if err := s.ims.DeleteJob(t.Context(), j.ID); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the job's directory is gone", func() bool {
				_, err := os.Lstat(j.path())
				return os.IsNotExist(err)
			})
			for _, p := range processesOf(t, j.ID) {
				t.Errorf("still running: %s", p)
			}
			s.checkNoImage(t, j.name)
		})
	}
}

// TestSSHDCannotStart takes the job's port before sshd comes.
func TestSSHDCannotStart(t *testing.T) {
	s := need(t)
	t.Parallel()
	j := s.create(t, order{jail: true})
	l, err := net.Listen("tcp", ":"+strconv.Itoa(j.port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	j.checkFailed("buildenv-sidecar", "sshd")
	if codes := j.ends(); codes["sshd"] != 1 {
		t.Errorf("exit codes %v", codes)
	}
	checkOneError(t, j.log("sshd"), strconv.Itoa(j.port), "address already in use")
}

// TestDiskInImage has an image that brings a node of one of this machine's
// disks, into a pod that may open it (imslocal restricts no devices). Root in the
// jail opens neither that nor a node of their own, and the image keeps it.
func TestDiskInImage(t *testing.T) {
	s := need(t)
	t.Parallel()
	disks, err := os.ReadDir("/sys/dev/block")
	if err != nil || len(disks) == 0 {
		t.Skip("this machine has no block devices")
	}
	major, minor, _ := strings.Cut(disks[0].Name(), ":")
	file := packTree(t, s.world, filepath.Join(t.TempDir(), "disk"), baseTree("block home/user/disk "+major+" "+minor+" 0600")...)
	j := s.create(t, order{image: s.publish(t, newName(t), file).id, jail: true})
	j.wait(ims.WaitingOnUser)
	out := j.ssh("mknod /tmp/disk b " + major + " " + minor + `
for disk in /home/user/disk /tmp/disk; do
	head -c 1 $disk > /dev/null && echo root opens $disk
done 2>&1; rm -f /tmp/disk; touch /tmp/complete`)
	if strings.Contains(out, "root opens") || strings.Count(out, "ermission denied") != 2 {
		t.Errorf("in the jail: %s", out)
	}
	j.wait(ims.Success)
	checkTree(t, file, j.result(kernelText, initrdText).file, append(traces(false), "tmp: mtime")...)
}
