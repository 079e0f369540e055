// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

const (
	kernelText = "this boots"
	initrdText = "and this finds the root"
)

// baseTree is an image root with a shell that works, boot files behind the
// kinds of links distributions use, and one of each thing an image can hold.
func baseTree(more ...string) []string {
	lines := []string{
		"dir bin 0755", "dir sbin 0755", "dir usr/bin 0755", "dir usr/lib 0755", "dir usr/sbin 0755", "dir dev 0755", "dir proc 0555", "dir sys 0555", "dir run 0755",
		"dir root 0700", "dir tmp 1777", "dir var/tmp 1777", "dir home/user 0750", "owner home/user 1000:1000",
		"file etc/passwd 0644 root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
		"file etc/group 0644 root:x:0:\nuser:x:1000:\n",
		"file etc/shadow 0640 root:*:19000:0:99999:7:::\n",
		"file etc/os-release 0644 NAME=test\n",
		"symlink etc/resolv.conf ../run/resolver/resolv.conf",
		"dir boot 0755", "file boot/vmlinuz-6.1 0644 " + kernelText, "symlink boot/vmlinuz /boot/vmlinuz-6.1",
		"file usr/lib/initrd-6.1 0600 " + initrdText, "symlink boot/initrd ../usr/lib/initrd-6.1",
		"dir image 0755", "file image/config.xml 0644 <password>x</password>", "file image/setup.sh 0755 #!/bin/sh\n",
		"data usr/lib/noise 0644 300000 random:1", "data usr/lib/text 0644 700000 text", "sparse var/sparse 0600 5000000 3000000:island",
		"file usr/bin/ping 4755 setuid", "file usr/lib/caps 0755 capable",
		"xattr usr/lib/caps security.capability=0x0100000200200000000000000000000000000000",
		"xattr etc/os-release user.note=with an attribute", "xattr usr/lib user.dir=on a directory",
		"hardlink usr/lib/text-again usr/lib/text", "fifo var/pipe 0622", "sock var/socket 0755", "char var/null 1 3 0666", "block var/disk 240 77 0660",
		`file "usr/lib/odd name \n\u00e4\xff" 0644 odd`, "file var/empty 0000", "dir var/lonely 0111",
		"symlink usr/lib/owned nowhere", "owner usr/lib/owned 123456:654321",
	}
	for _, applet := range []string{"sh", "ls", "cat", "touch", "rm", "ln", "mv", "mkdir", "echo", "sleep", "find", "grep", "id", "env", "chmod", "dd", "tr", "true", "cp", "stat", "setsid", "wc", "tail", "mkfifo"} {
		lines = append(lines, "symlink bin/"+applet+" busybox")
	}
	return append(lines, more...)
}

// packTree makes a tree with busybox in it at dir and packs it to dir.sqsh with
// the program under test.
func packTree(t *testing.T, w *world, dir string, lines ...string) string {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	makeRoot(t, dir, lines...)
	return packDir(t, w, dir)
}

func makeRoot(t *testing.T, dir string, lines ...string) {
	t.Helper()
	tree.Make(t, dir, lines...)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(busybox)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	// everything is old, so that a time that changes is seen
	old := unix.NsecToTimespec(time.Date(2020, 2, 29, 12, 0, 0, 0, time.UTC).UnixNano())
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func packDir(t *testing.T, w *world, dir string) string {
	t.Helper()
	file := dir + ".sqsh"
	if out, err := exec.Command(filepath.Join(w.bin, "sidecar"), "pack", dir, file).CombinedOutput(); err != nil {
		t.Fatalf("sidecar pack: %v\n%s", err, out)
	}
	return file
}

// image is a registered image and the file it was made of.
type image struct {
	id, file string
}

// publish registers a SquashFS file, or what claims to be one.
func (w *world) publish(t *testing.T, name, file string) image {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	record, err := w.ims.CreateImage(t.Context(), name, "x86_64")
	if err != nil {
		t.Fatal(err)
	}
	artifact := func(kind upload.Kind, b []byte) upload.Artifact {
		return upload.Artifact{Kind: kind, Body: bytes.NewReader(b), Size: int64(len(b))}
	}
	result, err := upload.Publish(t.Context(), w.store, upload.Request{Prefix: record.ID, Metadata: upload.ImageMetadata(record.ID, name, ""), Artifacts: []upload.Artifact{
		artifact(upload.Rootfs, b), artifact(upload.Kernel, []byte(kernelText)), artifact(upload.Initrd, []byte(initrdText)),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.ims.LinkImage(t.Context(), record.ID, ims.Link{ETag: result.Manifest.ETag, Path: result.Manifest.Path, Type: "s3"}); err != nil {
		t.Fatal(err)
	}
	return image{record.ID, file}
}

// unpack judges an image file: unsquashfs must take it without a word.
func unpack(t *testing.T, file string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	out, err := exec.Command("unsquashfs", "-no-progress", "-strict-errors", "-d", dir, file).CombinedOutput()
	if err != nil {
		t.Fatalf("unsquashfs %s: %v\n%s", file, err, out)
	}
	return dir
}

type manifestEntry struct {
	Link struct{ ETag, Path, Type string }
	MD5  string
	Type string
}

// result checks the image of a job that succeeded, object by object, and
// returns it with its root file system in a file.
func (j *job) result(kernel, initrd string) image {
	t := j.t
	t.Helper()
	record, err := j.w.ims.Job(t.Context(), j.ID)
	if err != nil {
		t.Fatal(err)
	}
	id := record.ResultantImageID
	img, err := j.w.ims.Image(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != j.name || img.Arch != "x86_64" || img.Link == nil {
		t.Fatalf("image record %s", img.Raw)
	}
	if all := j.w.imagesNamed(t, j.name); len(all) != 1 {
		t.Errorf("%d image records of that name", len(all))
	}
	body, info := j.w.get(t, id+"/manifest.json")
	if want := "s3://" + bucket + "/" + id + "/manifest.json"; img.Link.Path != want || img.Link.Type != "s3" || img.Link.ETag != info.ETag {
		t.Errorf("link %+v, want %s with etag %s", *img.Link, want, info.ETag)
	}
	if len(info.Metadata) != 1 || info.Metadata["md5sum"] != md5Hex(body) {
		t.Errorf("metadata of the manifest: %v", info.Metadata)
	}
	var m struct {
		Version, Created string
		Artifacts        []manifestEntry
	}
	if err := json.Unmarshal(body, &m); err != nil || m.Version != "1.0" {
		t.Fatalf("manifest: %v\n%s", err, body)
	}
	file := filepath.Join(t.TempDir(), "new.sqsh")
	want := []struct{ key, kind, content string }{
		{"rootfs", "application/vnd.cray.image.rootfs.squashfs", ""},
		{"kernel", "application/vnd.cray.image.kernel", kernel},
		{"initrd", "application/vnd.cray.image.initrd", initrd},
	}
	if len(m.Artifacts) != len(want) {
		t.Fatalf("manifest:\n%s", body)
	}
	for i, a := range m.Artifacts {
		content, info := j.w.get(t, id+"/"+want[i].key)
		if a.Type != want[i].kind || a.Link.Path != "s3://"+bucket+"/"+id+"/"+want[i].key || a.Link.Type != "s3" || a.Link.ETag != info.ETag || a.MD5 != md5Hex(content) {
			t.Errorf("manifest entry %+v; the object has etag %s, md5 %s", a, info.ETag, md5Hex(content))
		}
		for k, v := range map[string]string{"md5sum": a.MD5, "x-shasta-ims-image-name": j.name, "x-shasta-ims-image-id": id, "x-shasta-ims-job-id": j.ID} {
			if info.Metadata[k] != v {
				t.Errorf("%s: metadata %s is %q, want %q", info.Key, k, info.Metadata[k], v)
			}
		}
		if want[i].key == "rootfs" {
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if string(content) != want[i].content {
			t.Errorf("%s holds %q, want %q", want[i].key, content, want[i].content)
		}
	}
	if objects, err := j.w.store.List(t.Context(), id+"/"); err != nil || len(objects) != 4 {
		t.Errorf("objects of the image: %v %v", objects, err)
	}
	return image{id, file}
}

func md5Hex(b []byte) string {
	sum := md5.Sum(b)
	return hex.EncodeToString(sum[:])
}

// differences is how the tree in an image file differs from that in another,
// as "path: what" without the values.
func differences(t *testing.T, before, after string) []string {
	t.Helper()
	values := regexp.MustCompile(`(?s): (mode|owner|size|sha256|target|rdev|mtime|xattrs|hard links): .*$`)
	var found []string
	for _, d := range tree.Diff(unpack(t, before), unpack(t, after)) {
		found = append(found, values.ReplaceAllString(d, ": $1"))
	}
	slices.Sort(found)
	return found
}

// checkTree fails unless the trees differ in exactly what is wanted.
func checkTree(t *testing.T, before, after string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := differences(t, before, after); !slices.Equal(got, want) {
		t.Errorf("the new image differs from the old in:\n%s\nwant:\n%s", list(got), list(want))
	}
}

func list(lines []string) string {
	var b bytes.Buffer
	for _, l := range lines {
		fmt.Fprintf(&b, "  %s\n", l)
	}
	return b.String()
}
