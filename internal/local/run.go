// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// RunConfig describes one customize job from a file on this machine.
type RunConfig struct {
	Image   string // SquashFS file
	KeyFile string // public key
	Name    string // of the new image
	Jail    bool
	Port    int // of the job's sshd, 0 for a free one
	// Names inside the image's /boot.
	KernelFileName, InitrdFileName string

	Data   string // data directory to keep; "" for a temporary one
	Output string // file for the new rootfs; "" for none
	Events string // file for JSON lines; "" for none

	Log *slog.Logger
	Out io.Writer // for people: progress, the ssh line, the table
}

// Errors of Run that are no failure of ours; the command maps them to exit
// codes.
var (
	ErrJobFailed   = errors.New("the job ended with the status error")
	ErrInterrupted = errors.New("interrupted")
)

// statusBacklog is how many statuses of a job may wait to be told; a job has
// half a dozen.
const statusBacklog = 100

// Run takes a base image through a customize job the way a client of the real
// service does, and waits for its end. However it ends, nothing of it runs on
// or stays mounted, and a temporary data directory is gone.
func Run(ctx context.Context, c RunConfig) (err error) {
	in, err := c.check()
	if err != nil {
		return err
	}
	defer in.close()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = ErrInterrupted
		}
	}()
	events, err := openEvents(c.Events)
	if err != nil {
		return err
	}
	defer events.close()

	data := c.Data
	if data == "" {
		if data, err = tempData(); err != nil {
			return err
		}
		defer func() {
			if rerr := os.RemoveAll(data); rerr != nil {
				err = errors.Join(err, fmt.Errorf("remove the temporary data directory: %w", rerr))
			}
		}()
	}
	// a poll would miss statuses that last for milliseconds
	statuses := make(chan Job, statusBacklog)
	w, err := start(ctx, Config{
		Listen: "127.0.0.1:0", S3Listen: "127.0.0.1:0", Data: data, Runner: "process", SSHPort: c.Port, Log: c.Log, Out: c.Out,
		changed: func(j Job) {
			select {
			case statuses <- j:
			default:
			}
		},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.stop()) }()

	// what the installation can die of ends the run, too
	alive, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if err := w.wait(alive); err != nil {
			cancel(err)
		}
	}()
	r, err := newRun(c, in, w, events, statuses)
	if err != nil {
		return err
	}
	err = r.do(alive)
	if cause := context.Cause(alive); err != nil && ctx.Err() == nil && cause != nil {
		err = cause
	}
	return err
}

// tempData makes a data directory that is not in memory, as /tmp often is. It
// removes those of runs that were killed.
func tempData() (string, error) {
	parent := "/var/tmp"
	if st, err := os.Stat(parent); err != nil || !st.IsDir() {
		parent = os.TempDir()
	}
	const pattern = "imslocal-run-*"
	old, err := filepath.Glob(filepath.Join(parent, pattern))
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		if err := removeAbandoned(dir); err != nil {
			return "", fmt.Errorf("remove what a killed run left: %w", err)
		}
	}
	return os.MkdirTemp(parent, pattern)
}

// removeAbandoned removes a data directory of ours that has a lock file nobody
// holds. One without is of a run that is just starting.
func removeAbandoned(dir string) error {
	var st unix.Stat_t
	if unix.Lstat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return nil
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer lock.Close()
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil
	}
	return os.RemoveAll(dir)
}

// run is a run under way.
type run struct {
	RunConfig
	in     *runInput
	world  *world
	client *ims.Client
	store  *upload.S3
	events *events
	// statuses of all jobs, which is one
	statuses <-chan Job

	begun  time.Time
	phases []phase
}

// phase is a stretch of a run, for the table.
type phase struct {
	name  string
	since time.Time
	took  time.Duration
}

func newRun(c RunConfig, in *runInput, w *world, e *events, statuses <-chan Job) (*run, error) {
	client, err := ims.New(ims.Config{
		BaseURL: w.url, Timeout: time.Minute, RetryPause: 200 * time.Millisecond,
		OAuth: ims.OAuth{Endpoint: w.url + TokenPath, ClientID: w.secrets.ClientID, ClientSecret: w.secrets.ClientSecret},
	})
	if err != nil {
		return nil, err
	}
	store, err := w.store.client(bucketImages)
	if err != nil {
		return nil, err
	}
	return &run{RunConfig: c, in: in, world: w, client: client, store: store, events: e, statuses: statuses, begun: time.Now()}, nil
}

func (r *run) say(format string, args ...any) {
	fmt.Fprintf(r.Out, "%7.1f s  %s\n", time.Since(r.begun).Seconds(), fmt.Sprintf(format, args...))
}

// enter ends the phase before and begins the next; "" only ends.
func (r *run) enter(name string) {
	at := time.Now()
	if n := len(r.phases); n > 0 {
		r.phases[n-1].took = at.Sub(r.phases[n-1].since)
	}
	if name != "" {
		r.phases = append(r.phases, phase{name: name, since: at})
	}
}

func (r *run) do(ctx context.Context) error {
	r.enter("upload of the base image")
	r.say("IMS API %s, S3 %s", r.world.url, r.world.store.endpoint)
	image, err := r.register(ctx)
	if err != nil {
		return err
	}
	key, err := r.client.CreatePublicKey(ctx, "imslocal run", r.in.key)
	if err != nil {
		return err
	}
	job, err := r.client.CreateJob(ctx, ims.JobRequest{
		JobType: "customize", ArtifactID: image, PublicKeyID: key.ID, ArchiveName: r.Name,
		KernelFileName: r.KernelFileName, InitrdFileName: r.InitrdFileName,
		SSHContainers: []ims.SSHContainer{{Name: "customize", Jail: r.Jail}},
	})
	if err != nil {
		return err
	}
	if job, err = r.follow(ctx, job); err != nil {
		return err
	}
	if job.Status != ims.Success {
		r.say("job %s failed; the containers' last lines are above", job.ID)
		return ErrJobFailed
	}
	r.enter("check of the new image")
	artifacts, err := r.fetch(ctx, job)
	if err != nil {
		return err
	}
	r.enter("")
	return r.report(job, artifacts)
}

// register makes the image record of the base image and uploads its artifacts.
func (r *run) register(ctx context.Context) (id string, err error) {
	image, err := r.client.CreateImage(ctx, filepath.Base(r.Image), "x86_64")
	if err != nil {
		return "", err
	}
	var bar *progress.P
	result, err := upload.Publish(ctx, r.store, upload.Request{
		Prefix: image.ID, Metadata: upload.ImageMetadata(image.ID, image.Name, ""), Artifacts: r.in.artifacts, Log: r.Log,
		Progress: func(kind upload.Kind, done, total int64) {
			if kind != upload.Rootfs {
				return
			}
			if bar == nil {
				bar = progress.New(r.Out, "upload of the base image", total)
			}
			bar.Update(done, total)
		},
	})
	if bar != nil {
		bar.Finish()
	}
	if err != nil {
		return "", err
	}
	link := ims.Link{ETag: result.Manifest.ETag, Path: result.Manifest.Path, Type: result.Manifest.Type}
	_, err = r.client.LinkImage(ctx, image.ID, link)
	return image.ID, err
}

// follow watches the job to its end and tells what to do when it waits.
func (r *run) follow(ctx context.Context, job ims.Job) (ims.Job, error) {
	if len(job.SSHContainers) != 1 {
		return job, fmt.Errorf("job %s: the answer names no SSH container", job.ID)
	}
	port := job.SSHContainers[0].ConnectionInfo["customer_access"].Port
	for status := string(job.Status); ; {
		r.enter(status)
		r.say("%s", status)
		if err := r.events.status(job.ID, status, port); err != nil {
			return job, err
		}
		switch ims.Status(status) {
		case ims.WaitingOnUser:
			r.invite(port)
		case ims.Success, ims.Failed:
			return r.client.Job(ctx, job.ID)
		}
		select {
		case <-ctx.Done():
			return job, context.Cause(ctx)
		case next := <-r.statuses:
			status = next.Status
		}
	}
}

// invite prints what the user does now.
func (r *run) invite(port int) {
	flags, where := volumePath, "the image's root is "+volumePath+"/image-root"
	if r.Jail {
		flags, where = "/tmp", "you land inside the image"
	}
	fmt.Fprintf(r.Out, "\n    ssh -p %d root@127.0.0.1\n\n%s; when it is as you want it, there:\n\n    touch %s/complete      (or touch %s/failed to give up)\n\n", port, where, flags, flags)
}

// artifact is a row of the table.
type artifact struct {
	kind, key, md5 string
	size           int64
}

// fetch reads the new image back from the store: every artifact must be there,
// and the rootfs must be what its MD5 says.
func (r *run) fetch(ctx context.Context, job ims.Job) ([]artifact, error) {
	image, err := r.client.Image(ctx, job.ResultantImageID)
	if err != nil {
		return nil, err
	}
	if image.Link == nil {
		return nil, fmt.Errorf("image %s: has no manifest", image.ID)
	}
	prefix := r.store.URL("")
	key := strings.TrimPrefix(image.Link.Path, prefix)
	body, manifest, err := r.store.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var m struct{ Artifacts []upload.Entry }
	if err := json.NewDecoder(io.LimitReader(body, maxManifest)).Decode(&m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", image.Link.Path, err)
	}
	var list []artifact
	for _, e := range m.Artifacts {
		a := artifact{kind: path.Base(e.Link.Path), key: strings.TrimPrefix(e.Link.Path, prefix), md5: e.MD5}
		info, err := r.store.Head(ctx, a.key)
		if err != nil {
			return nil, err
		}
		a.size = info.Size
		if strings.HasPrefix(e.Type, rootfsType) {
			if err := r.download(ctx, a); err != nil {
				return nil, err
			}
		}
		list = append(list, a)
	}
	return append(list, artifact{kind: path.Base(key), key: key, size: manifest.Size, md5: manifest.Metadata["md5sum"]}), nil
}

// download reads an object, compares its MD5, and keeps it as Output.
func (r *run) download(ctx context.Context, a artifact) error {
	body, _, err := r.store.Get(ctx, a.key)
	if err != nil {
		return err
	}
	defer body.Close()
	sum := md5.New()
	if r.Output == "" {
		if _, err := io.Copy(sum, body); err != nil {
			return fmt.Errorf("read %s: %w", r.store.URL(a.key), err)
		}
		return a.compare(sum.Sum(nil))
	}
	out, err := renameio.NewPendingFile(r.Output, renameio.WithPermissions(0o644))
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	defer out.Cleanup()
	if _, err := io.Copy(io.MultiWriter(out, sum), body); err != nil {
		return fmt.Errorf("write %s: %w", r.Output, err)
	}
	if err := a.compare(sum.Sum(nil)); err != nil {
		return err
	}
	return out.CloseAtomicallyReplace()
}

func (a artifact) compare(sum []byte) error {
	if got := hex.EncodeToString(sum); got != a.md5 {
		return fmt.Errorf("%s: its MD5 is %s, the manifest says %s; the object was damaged on its way", a.key, got, a.md5)
	}
	return nil
}
