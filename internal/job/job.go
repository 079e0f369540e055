// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// Exit codes of a run.
const (
	exitOK      = 0 // image published, or given up by the user
	exitFailure = 1
)

// IMS is what a run needs of the Image Management Service.
type IMS interface {
	SetStatus(ctx context.Context, jobID string, s ims.Status) (ims.Job, error)
	SetResultantImage(ctx context.Context, jobID, imageID string) (ims.Job, error)
	CreateImage(ctx context.Context, name, arch string) (ims.Image, error)
	LinkImage(ctx context.Context, imageID string, link ims.Link) (ims.Image, error)
	DeleteImage(ctx context.Context, imageID string) error
}

// Store is what a run needs of S3.
type Store interface {
	upload.Store
	Check(ctx context.Context) error // cheap proof that uploads can work
}

// Deps is what a run does not find in its configuration. IMS and Store, when
// nil, are made from it.
type Deps struct {
	Stdout io.Writer // the result, one JSON document
	Stderr io.Writer // progress bars when it is a terminal
	Log    *slog.Logger
	IMS    IMS
	Store  Store

	tune tuning // zero outside tests
}

// tuning shortens waits in tests; zero values mean the constants.
type tuning struct {
	sshdTimeout  time.Duration
	probeTimeout time.Duration
	watchPause   time.Duration
	mountWait    time.Duration
}

// packedName is the new image on the volume. The image's own name is user
// text and never part of a path.
const packedName = "image-new.sqsh"

var (
	errUserFailed = errors.New("the user marked the customization as failed; no image is made")
	errSSHDGone   = errors.New("the sshd container is gone: nothing listens on its port any more and it left no exiting flag; see its log (kubectl logs … -c sshd)")
)

// run is one job in progress.
type run struct {
	cfg    config.Sidecar
	deps   Deps
	ims    IMS
	store  Store
	log    *slog.Logger
	flags  signalfile.Set
	format format
	state  state
	key    []byte // authenticates the state file
	result []byte // printed before the last status
	report []reportFile
}

// Run performs the whole job and returns the process's exit code. Cancelling
// ctx ends the job with status error.
func Run(ctx context.Context, cfg config.Sidecar, deps Deps) int {
	r, err := newRun(cfg, deps)
	if err != nil {
		return r.refuse(ctx, err)
	}
	limitMemory(r.log)
	r.state, err = r.loadState()
	if err != nil {
		r.log.Warn("ignoring the state of an earlier run", "error", err)
	}
	return r.finish(ctx, r.guard(func() error { return r.main(ctx) }))
}

// Refuse ends a job that cannot even start, such as one whose environment is
// wrong: error in IMS, one failure document, exit code 1. cfg may be incomplete.
func Refuse(ctx context.Context, cfg config.Sidecar, deps Deps, cause error) int {
	r, err := newRun(cfg, deps)
	if r.ims == nil {
		cause = errors.Join(cause, err)
	}
	return r.refuse(ctx, cause)
}

// newRun connects nothing. On error the run holds what could be made, which is
// enough to report that error.
func newRun(cfg config.Sidecar, deps Deps) (*run, error) {
	r := &run{cfg: cfg, deps: deps, ims: deps.IMS, store: deps.Store, log: deps.Log,
		flags: signalfile.Set{Parent: cfg.Parent, Root: cfg.ImageRoot(), Jailed: cfg.Jailed}}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	for _, w := range cfg.Warnings {
		r.log.Warn(w)
	}
	r.key = stateKey(cfg.S3.SecretKey.Reveal())
	var errs []error
	var err error
	if r.format, err = readFormat(cfg); err != nil {
		errs = append(errs, err)
	}
	if r.ims == nil {
		c, err := NewIMS(cfg, r.log)
		if err == nil {
			r.ims = c
		}
		errs = append(errs, err)
	}
	if r.store == nil {
		s, err := newStore(cfg, r.log)
		if err == nil {
			r.store = s
		}
		errs = append(errs, err)
	}
	return r, errors.Join(errs...)
}

// NewIMS makes the IMS client a configuration describes.
func NewIMS(cfg config.Sidecar, log *slog.Logger) (*ims.Client, error) {
	return ims.New(ims.Config{
		BaseURL: cfg.IMSURL, CAFile: cfg.CACert, Timeout: cfg.Timeout, Log: log,
		OAuth: ims.OAuth{Endpoint: cfg.OAuth.Endpoint, ClientID: cfg.OAuth.ClientID, ClientSecret: cfg.OAuth.ClientSecret.Reveal(), Reread: cfg.OAuth.Reread},
	})
}

func newStore(cfg config.Sidecar, log *slog.Logger) (*upload.S3, error) {
	return upload.NewS3(upload.S3Config{
		Endpoint: cfg.S3.Endpoint, AccessKey: cfg.S3.AccessKey, SecretKey: cfg.S3.SecretKey.Reveal(), Bucket: cfg.S3.Bucket,
		Verify: cfg.S3.Verify, CAFile: cfg.S3.CAFile, Budget: cfg.Timeout, Log: log,
	})
}

// guard turns a panic into an error: a job must not stay without a status.
func (r *run) guard(do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("panic", "value", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("internal error: %v; please report it with the log", p)
		}
	}()
	return do()
}

// main is the job without its end.
func (r *run) main(ctx context.Context) error {
	if r.cfg.RemoteBuildNode != "" {
		return fmt.Errorf("remote builds are not supported: this job is to be built on %s; create it without remote build nodes for its architecture", r.cfg.RemoteBuildNode)
	}
	if err := r.settleLayout(ctx); err != nil {
		return err
	}
	switch r.state.Phase {
	case phasePackaging:
		r.log.Warn("an earlier run ended while it packaged; taking its image back and packaging again", "image", r.state.ImageID)
		if err := r.undo(ctx); err != nil {
			return err
		}
		return r.packaging(ctx)
	case phaseRegistered:
		r.log.Warn("an earlier run registered the image and did not report it", "image", r.state.ImageID)
		return nil
	case phaseFailed:
		return errors.New("an earlier run of this job failed and did not report it")
	}
	probeXattrs(r.cfg.Parent, r.log)
	switch r.cfg.Action {
	case config.ActionCustomize:
		return r.customize(ctx)
	case config.ActionCreate:
		return r.create(ctx)
	}
	return fmt.Errorf("unknown action %q; set IMS_ACTION to customize or create", r.cfg.Action)
}

func (r *run) customize(ctx context.Context) error {
	root, err := r.openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	removeTmp := func() error { return nil }
	// A layered root may be mounted when an earlier run ended; then that run did all this.
	if !r.state.Layered || r.state.Phase != phaseShell {
		if removeTmp, err = r.setUp(root); err != nil {
			return err
		}
	}
	r.checkStore(ctx)
	if err := r.shell(ctx, func() error { return removeStale(root, r.flags, true) }); err != nil {
		return err
	}
	failed, err := r.flags.Exists(signalfile.Failed)
	if err != nil {
		return err
	}
	if failed {
		return errUserFailed
	}
	if r.state.Layered {
		// Elsewhere sshd has removed the flag.
		err = removeStale(root, r.flags, false)
	}
	if err := errors.Join(err, r.restoreResolv(), removeTmp()); err != nil {
		return err
	}
	return r.packaging(ctx)
}

// storeCheck bounds a check that can only warn: the user is waiting.
const storeCheck = 10 * time.Second

func (r *run) checkStore(ctx context.Context) {
	bounded, cancel := context.WithTimeout(ctx, storeCheck)
	defer cancel()
	if err := r.store.Check(bounded); err != nil && ctx.Err() == nil {
		r.log.Warn("the store is not usable now; without it the job will fail after the shell", "error", err)
	}
}

// setUp makes the root fit for the user.
func (r *run) setUp(root *layers.Root) (undoTmp func() error, err error) {
	if err := root.InstallCA(r.cfg.CADir); err != nil {
		return nil, err
	}
	if err := root.SwapResolvConf(r.cfg.ResolvConf, r.resolvBackup()); err != nil {
		return nil, err
	}
	if err := root.CheckBoot(r.bootNames()); err != nil {
		r.log.Warn("the image has no usable boot files yet; without them the job will fail after the shell", "error", err)
	}
	if !r.cfg.Jailed {
		return func() error { return nil }, nil
	}
	return root.EnsureTmp()
}

func (r *run) create(ctx context.Context) error {
	failed, err := r.flags.Exists(signalfile.BuildFailed)
	if err != nil {
		return err
	}
	if failed {
		if r.cfg.Debug {
			if err := r.shell(ctx, r.flags.RemoveStale); err != nil {
				return err
			}
		}
		return errors.New("the build of the image failed; see the log of the container build-image")
	}
	root, err := r.openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.InstallCA(r.cfg.CADir); err != nil {
		return err
	}
	return r.packaging(ctx)
}

func (r *run) bootNames() imageroot.BootNames {
	return imageroot.BootNames{Dir: r.cfg.BootDir, Kernel: r.cfg.KernelName, Initrd: r.cfg.InitrdName,
		Parameters: r.cfg.ParametersName, Arch: r.cfg.Arch}
}

func (r *run) resolvBackup() string { return filepath.Join(r.cfg.Parent, imageroot.ResolvBackup) }
func (r *run) packedPath() string   { return filepath.Join(r.cfg.Parent, packedName) }

// restoreResolv undoes SwapResolvConf. It reopens the root, which the user may
// have replaced.
func (r *run) restoreResolv() error {
	root, err := r.openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	kept, err := root.RestoreResolvConf(r.resolvBackup())
	if kept {
		r.log.Info("the user replaced /etc/resolv.conf; keeping theirs in the image")
	}
	return err
}

// setStatus reports a state on the way.
func (r *run) setStatus(ctx context.Context, s ims.Status) error {
	if _, err := r.ims.SetStatus(ctx, r.cfg.JobID, s); err != nil {
		return fmt.Errorf("set the job's status to %s: %w", s, err)
	}
	r.log.Info("job status", "status", string(s))
	return nil
}

// afterwards is the context for one of the two steps that end a job: taking
// back, and the final status. Each has its own, because a store that is gone
// must not use up the time in which IMS can be told. After a signal both fit,
// with what the upload needs to take parts back, into the 30 s Kubernetes
// grants.
func (r *run) afterwards(ctx context.Context) (context.Context, context.CancelFunc) {
	d := r.cfg.Timeout + time.Minute
	if ctx.Err() != nil {
		d = 7 * time.Second
	}
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// finish ends the job: clean up, report, terminal status.
func (r *run) finish(ctx context.Context, jobErr error) int {
	if jobErr == nil {
		return r.succeed(ctx)
	}
	if errors.Is(jobErr, errUserFailed) {
		r.log.Info(jobErr.Error())
	} else {
		r.log.Error("the job failed", "error", jobErr)
	}
	r.takeBack(ctx)
	r.state.Phase = phaseFailed
	r.saveState()
	if r.state.Layered {
		r.log.Debug("the layered root stays as it is") // it may still be mounted
	} else if err := r.restoreResolv(); err != nil {
		r.log.Debug("resolv.conf stays as it is", "error", err) // nobody needs this root any more
	}
	r.removeWorkFiles()
	if !errors.Is(jobErr, errUserFailed) {
		printFailure(r.deps.Stdout, jobErr)
	}
	if err := r.setFinalStatus(ctx, ims.Failed); err != nil {
		r.log.Error("the job stays without its final status", "error", err)
		return exitFailure
	}
	r.dropState()
	if errors.Is(jobErr, errUserFailed) {
		return exitOK
	}
	return exitFailure
}

// succeed reports a registered image. What it cannot report stays in the state
// file for another run.
func (r *run) succeed(ctx context.Context) int {
	r.removeWorkFiles()
	if _, err := r.deps.Stdout.Write(r.result); err != nil {
		r.log.Warn("the result could not be printed", "error", err)
	}
	if err := r.setFinalStatus(ctx, ims.Success); err != nil {
		r.log.Error("the image is published and registered, but the job stays without its final status; set it by hand",
			"image", r.state.ImageID, "error", err)
		return exitFailure
	}
	r.dropState()
	return exitOK
}

// refuse reports a job that never started. It touches nothing but the status.
func (r *run) refuse(ctx context.Context, cause error) int {
	r.log.Error("the job cannot start", "error", cause)
	printFailure(r.deps.Stdout, cause)
	if r.ims != nil && r.cfg.JobID != "" {
		if err := r.setFinalStatus(ctx, ims.Failed); err != nil {
			r.log.Error("the job stays without its final status", "error", err)
		}
	}
	return exitFailure
}

// setFinalStatus is the last act, also when ctx has ended.
func (r *run) setFinalStatus(ctx context.Context, s ims.Status) error {
	ctx, cancel := r.afterwards(ctx)
	defer cancel()
	return r.setStatus(ctx, s)
}

// takeBack is undo at the end of a job, also when ctx has ended.
func (r *run) takeBack(ctx context.Context) {
	ctx, cancel := r.afterwards(ctx)
	defer cancel()
	if err := r.undo(ctx); err != nil {
		r.log.Error("the unfinished image could not be taken back; delete it by hand", "image", r.state.ImageID, "error", err)
	}
}

// undo takes a half-published image back. Only an image record this job
// created, noted in the state before anything was uploaded, is ever touched.
func (r *run) undo(ctx context.Context) error {
	if r.state.ImageID == "" || r.state.Phase == phaseRegistered {
		return nil
	}
	err := errors.Join(r.removeObjects(ctx), r.ims.DeleteImage(ctx, r.state.ImageID))
	if err == nil {
		r.state.ImageID = ""
	}
	return err
}

// removeObjects leaves half of the time, if that is limited, for the record.
func (r *run) removeObjects(ctx context.Context) error {
	if end, limited := ctx.Deadline(); limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	return upload.Remove(ctx, r.store, r.state.ImageID)
}

// removeWorkFiles removes what this or a killed run left on the volume.
func (r *run) removeWorkFiles() {
	for _, pattern := range []string{".squash-*.tmp", imageroot.ResolvBackup + "*", packedName} {
		left, _ := filepath.Glob(filepath.Join(r.cfg.Parent, pattern)) // the only error is a bad pattern
		for _, path := range left {
			if err := os.RemoveAll(path); err != nil {
				r.log.Warn("a work file stays on the volume", "error", err)
			}
		}
	}
}
