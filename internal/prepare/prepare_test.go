// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

const jobID = "dd083330-fa89-4acf-b701-619f6d00d304"

// statuses records what IMS is told, and what the volume held then.
type statuses struct {
	mu     sync.Mutex
	parent string
	got    []string
	fail   error
}

func (s *statuses) SetStatus(ctx context.Context, id string, st ims.Status) (ims.Job, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() != nil {
		return ims.Job{}, ctx.Err()
	}
	if id != jobID {
		return ims.Job{}, fmt.Errorf("job %q", id)
	}
	if st == ims.Failed {
		// IMS deletes the volume now: nothing may be left to do on it.
		entries, _ := os.ReadDir(s.parent)
		for _, e := range entries {
			st += ims.Status(" with " + e.Name())
		}
	}
	s.got = append(s.got, string(st))
	return ims.Job{}, s.fail
}

// job is one run of prepare.
type job struct {
	cfg    config.Sidecar
	status *statuses
	log    bytes.Buffer
	tune   tuning
}

func newJob(t *testing.T, image []byte) *job {
	t.Helper()
	parent := filepath.Join(t.TempDir(), "volume")
	j := &job{status: &statuses{parent: parent}, tune: quick}
	j.cfg.JobID, j.cfg.Parent, j.cfg.Timeout = jobID, parent, patient
	j.cfg.KernelName, j.cfg.InitrdName, j.cfg.Arch = "vmlinuz", "initrd", "x86_64"
	if image != nil {
		j.cfg.DownloadMD5 = sum(image)
	}
	return j
}

func (j *job) run(t *testing.T, ctx context.Context, link string) error {
	t.Helper()
	err := Run(ctx, j.cfg, link, Deps{Status: j.status, Log: slog.New(slog.NewTextHandler(&j.log, nil)), tune: j.tune})
	if text := fmt.Sprint(err, j.log.String()); strings.Contains(text, signature) {
		t.Errorf("the presigned URL was shown: %s", text)
	}
	return err
}

func (j *job) left(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(j.cfg.Parent)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// makeImage packs a tree with the real tool.
func makeImage(t *testing.T, lines ...string) (dir string, image []byte) {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "mksquashfs")
	dir = filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, dir, lines...)
	file := filepath.Join(t.TempDir(), "image.sqsh")
	if out, err := exec.Command("mksquashfs", dir, file, "-noappend", "-no-progress", "-xattrs").CombinedOutput(); err != nil {
		t.Fatalf("mksquashfs: %v\n%s", err, out)
	}
	image, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return dir, image
}

var imageLines = []string{
	"file etc/passwd 0644 root:x:0:0::/root:/bin/sh", "file usr/bin/su 4755 x", "owner usr/bin/su 0:5", "xattr usr/bin/su user.note=kept",
	"data usr/lib/blob 0600 3000000 random:1", "sparse var/hole 0644 1048576 500000:island", "hardlink usr/bin/sudo usr/bin/su",
	"symlink boot/vmlinuz /boot/vmlinuz-6.4", "file boot/vmlinuz-6.4 0644 K", "file boot/initrd 0600 I", "char dev/null 1 3 0666", "fifo run/pipe 0600",
	"dir tmp 1777", "mtime etc/passwd 1700000000", "mtime . 1600000000",
}

func TestPrepare(t *testing.T) {
	dir, image := makeImage(t, imageLines...)
	s := newS3(t, image, cut(1<<20, serve(`"one"`)), serve(`"one"`))
	j := newJob(t, image)
	if err := j.run(t, t.Context(), s.link()); err != nil {
		t.Fatal(err)
	}
	tree.Equal(t, dir, filepath.Join(j.cfg.Parent, "image-root"), tree.Seconds)
	if want := []string{"fetching_image"}; !slices.Equal(j.status.got, want) {
		t.Errorf("statuses %q, want %q", j.status.got, want)
	}
	if got := j.left(t); !slices.Equal(got, []string{".image.sqsh.index", ".image.sqsh.json", "image-root", "image.sqsh"}) {
		t.Errorf("on the volume: %q", got)
	}
	info, err := os.Stat(filepath.Join(j.cfg.Parent, "image.sqsh"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("image.sqsh: %v %v", info.Mode(), err)
	}
	if strings.Contains(j.log.String(), "level=WARN msg=\"the image cannot be packed") {
		t.Errorf("boot files were not found:\n%s", &j.log)
	}
}

// TestPrepareAgain runs on a volume that another run left in every state at
// once, with links that lead out of it.
func TestPrepareAgain(t *testing.T) {
	dir, image := makeImage(t, imageLines...)
	outside := t.TempDir()
	tree.Make(t, outside, "file precious 0644 x")
	before, err := tree.Take(outside)
	if err != nil {
		t.Fatal(err)
	}
	j := newJob(t, image)
	if err := os.Mkdir(j.cfg.Parent, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, j.cfg.Parent, "file image-root/old/file 0644 x", "symlink image-root/link "+outside, "symlink .image-root.partial "+outside, "file .image.sqsh.partial 0644 x",
		"symlink image.sqsh "+outside+"/precious", "file ready", "file complete", "file failed", "file exiting", "file .ims-resolv.conf 0600 {}", "symlink .ims-resolv.conf.saved "+outside)
	s := newS3(t, image, serve(`"one"`))
	if err := j.run(t, t.Context(), s.link()); err != nil {
		t.Fatal(err)
	}
	tree.Equal(t, dir, filepath.Join(j.cfg.Parent, "image-root"), tree.Seconds)
	if got := j.left(t); !slices.Equal(got, []string{".image.sqsh.index", ".image.sqsh.json", "image-root", "image.sqsh"}) {
		t.Errorf("on the volume: %q", got)
	}
	after, err := tree.Take(outside)
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(after); len(d) > 0 {
		t.Errorf("changed outside the volume: %q", d)
	}
}

// TestPrepareStarted: a pod that is made again on a volume where the user has been at work takes nothing away from them;
// another job's work is removed.
func TestPrepareStarted(t *testing.T) {
	dir, image := makeImage(t, imageLines...)
	j := newJob(t, image)
	if err := os.Mkdir(j.cfg.Parent, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, j.cfg.Parent, "file image-root/work 0644 user's", `file .ims-buildenv-state 0600 {"state":{"job_id":"`+j.cfg.JobID+`","phase":"shell"},"mac":""}`)
	before, err := tree.Take(j.cfg.Parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.run(t, t.Context(), newS3(t, image).link()); err != nil {
		t.Fatal(err)
	}
	after, err := tree.Take(j.cfg.Parent)
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(after); len(d) > 0 {
		t.Errorf("changed: %q", d)
	}
	j.cfg.JobID = "99999999-2222-3333-4444-555555555555"
	s := newS3(t, image, serve(`"one"`))
	if err := j.run(t, t.Context(), s.link()); err != nil {
		t.Fatal(err)
	}
	tree.Equal(t, dir, filepath.Join(j.cfg.Parent, "image-root"), tree.Seconds)
}

// TestPrepareUncopyable: attributes that the unprivileged sidecar could not copy up keep an image from being layered.
func TestPrepareUncopyable(t *testing.T) {
	for _, attribute := range []string{"security.selinux=label", "trusted.x=1"} {
		_, image := makeImage(t, append(imageLines, "xattr etc/passwd "+attribute)...)
		j := newJob(t, image)
		j.cfg.Layout, j.cfg.DKMS = config.LayoutAuto, true
		if err := j.run(t, t.Context(), newS3(t, image, serve(`"one"`)).link()); err != nil {
			t.Fatal(err)
		}
		record, err := layout.Read(j.cfg.Parent)
		if err != nil || record.Layout != layout.Unpacked || !strings.Contains(record.Why, "attributes") {
			t.Errorf("%s: %+v, %v", attribute, record, err)
		}
	}
}

// TestPrepareFails: each failure ends in status `error`, said after the
// volume was emptied, and in words that name the next step.
func TestPrepareFails(t *testing.T) {
	garbage := content(100_000, "garbage")
	for name, c := range map[string]struct {
		change func(*job)
		acts   []act
		want   string
	}{
		"wrong sum":      {func(j *job) { j.cfg.DownloadMD5 = sum([]byte("else")) }, []act{serve(`"1"`)}, "MD5"},
		"not an image":   {nil, []act{serve(`"1"`)}, "is damaged"},
		"expired URL":    {nil, []act{answer(http.StatusForbidden, "")}, "presigned URL expired"},
		"server is down": {func(j *job) { j.cfg.Timeout = 20 * time.Millisecond }, []act{answer(500, "")}, "given up"},
		"remote build":   {func(j *job) { j.cfg.RemoteBuildNode = "x3000c0" }, []act{serve(`"1"`)}, "REMOTE_BUILD_NODE"},
		"no volume":      {func(j *job) { j.cfg.Parent = "/dev/null/volume" }, []act{serve(`"1"`)}, "job volume"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, garbage)
			if c.change != nil {
				c.change(j)
			}
			err := j.run(t, t.Context(), newS3(t, garbage, c.acts...).link())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q is not in: %v", c.want, err)
			}
			if n := len(j.status.got); n == 0 || j.status.got[n-1] != "error" {
				t.Errorf("statuses %q: the last must be error, with an empty volume", j.status.got)
			}
		})
	}
}

// TestPrepareCorruptImage damages a real image in its tables and in its data.
func TestPrepareCorruptImage(t *testing.T) {
	_, image := makeImage(t, imageLines...)
	for name, damage := range map[string]func([]byte) []byte{
		"cut short":  func(b []byte) []byte { return b[:len(b)/2] },
		"superblock": func(b []byte) []byte { b[20] ^= 0xff; return b },
		"tables":     func(b []byte) []byte { clear(b[len(b)-4096:]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			bad := damage(bytes.Clone(image))
			j := newJob(t, bad)
			err := j.run(t, t.Context(), newS3(t, bad, serve(`"1"`)).link())
			if err == nil || !strings.Contains(err.Error(), "/boot-images/") {
				t.Errorf("want an error that names the image, got %v", err)
			}
			if want := []string{"fetching_image", "error"}; !slices.Equal(j.status.got, want) {
				t.Errorf("statuses %q, want %q", j.status.got, want)
			}
			if left := j.left(t); len(left) > 0 {
				t.Errorf("left on the volume: %q", left)
			}
		})
	}
}

// TestPrepareStopped: SIGTERM in the middle still reports and cleans up.
func TestPrepareStopped(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	object := content(2<<20, "object")
	s := newS3(t, object, func(w http.ResponseWriter, r *http.Request, object []byte) {
		_, _ = w.Write(object[:1<<20])
		w.(http.Flusher).Flush()
		cancel(errors.New("terminated"))
		<-r.Context().Done()
	})
	j := newJob(t, object)
	if err := j.run(t, ctx, s.link()); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("%v", err)
	}
	if want := []string{"fetching_image", "error"}; !slices.Equal(j.status.got, want) {
		t.Errorf("statuses %q, want %q", j.status.got, want)
	}
}

// TestPrepareWithoutIMS: an IMS that is away for the informative status costs
// a warning, not the image.
func TestPrepareWithoutIMS(t *testing.T) {
	_, image := makeImage(t, "file etc/passwd 0644 x")
	j := newJob(t, nil)
	j.status.fail = errors.New("503")
	if err := j.run(t, t.Context(), newS3(t, image, serve(`"1"`)).link()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"DOWNLOAD_MD5SUM is empty", "the job's status could not be set", "the image cannot be packed as it is"} {
		if !strings.Contains(j.log.String(), want) {
			t.Errorf("no warning %q in:\n%s", want, &j.log)
		}
	}
}

// TestPrepareSmallVolume has a volume that takes the download but not the root,
// and one that does not take the download.
func TestPrepareSmallVolume(t *testing.T) {
	_, image := makeImage(t, "data zeroes 0644 30000000 text", "data noise 0644 2000000 random:1")
	for name, size := range map[string]string{"root does not fit": "12m", "download does not fit": "1m"} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, image)
			if err := os.Mkdir(j.cfg.Parent, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", j.cfg.Parent, "tmpfs", 0, "size="+size); err != nil {
				if testkit.InCI() {
					t.Fatal(err)
				}
				t.Skip("needs to mount a tmpfs: ", err)
			}
			defer func() {
				if err := unix.Unmount(j.cfg.Parent, 0); err != nil {
					t.Error(err)
				}
			}()
			err := j.run(t, t.Context(), newS3(t, image, serve(`"1"`)).link())
			if err == nil || !strings.Contains(err.Error(), "build_env_size") {
				t.Errorf("want advice about build_env_size, got %v", err)
			}
			if left := j.left(t); len(left) > 0 {
				t.Errorf("left on the volume: %q", left)
			}
		})
	}
}

// TestPanicIsReported: even our own mistake must not leave the job without a
// final status.
func TestPanicIsReported(t *testing.T) {
	j := newJob(t, nil)
	boom := &panicky{statuses: j.status}
	err := Run(t.Context(), j.cfg, "http://127.0.0.1:1/x", Deps{Status: boom, Log: slog.New(slog.DiscardHandler), tune: quick})
	if err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("%v", err)
	}
	if want := []string{"error"}; !slices.Equal(j.status.got, want) {
		t.Errorf("statuses %q", j.status.got)
	}
}

type panicky struct{ *statuses }

func (p *panicky) SetStatus(ctx context.Context, id string, s ims.Status) (ims.Job, error) {
	if s == ims.FetchingImage {
		panic("boom")
	}
	return p.statuses.SetStatus(ctx, id, s)
}
