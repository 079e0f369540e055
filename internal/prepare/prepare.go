// SPDX-License-Identifier: Apache-2.0

// Package prepare is the job's init container: it fetches the image's
// SquashFS file from a presigned URL, checks it, and lays its root out for
// the user.
//
// On the job's volume it makes image.sqsh, the download, and image-root, the
// unpacked tree, with what package layout records of them; each appears under its name only when it is complete. What
// an earlier run left under these names is removed first. The download stays,
// readable by root alone and outside the root, because packing can copy the
// blocks of unchanged files from it instead of compressing them again.
//
// It refuses remote builds, URLs that are not http or https, a redirect from
// HTTPS to HTTP, an image whose MD5 sum is not the expected one, and an image
// that does not fit on the volume, before it writes what does not fit. The
// URL is a credential: its query is in no log line and no error.
package prepare

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"golang.org/x/sys/unix"
)

// Names on the job's volume.
const (
	partialImage  = ".image.sqsh.partial"
	partialRoot   = ".image-root.partial"
	imageFileMode = 0o600
)

// reportGrace is how long the last status may take to report when the pod is
// being stopped: less than the 30 s Kubernetes grants by default.
const reportGrace = 20 * time.Second

// Status is the part of the IMS client this package needs.
type Status interface {
	SetStatus(ctx context.Context, id string, s ims.Status) (ims.Job, error)
}

// Deps is what Run works with.
type Deps struct {
	Status Status
	Log    *slog.Logger

	tune tuning // zero outside tests
}

// Run prepares the volume of the job. On any failure, and when ctx ends, the
// volume is left without an image or a root, and the job's status becomes
// `error`, as the very last act: IMS deletes the volume then.
func Run(ctx context.Context, cfg config.Sidecar, url string, deps Deps) error {
	r := run{cfg: cfg, deps: deps, log: deps.Log}
	err := r.guarded(ctx, url)
	if r.vol != nil {
		if err != nil {
			err = errors.Join(err, r.discard("removing what was made so far"))
		}
		err = errors.Join(err, r.vol.Close())
	}
	if err != nil {
		r.reportFailure(ctx)
	}
	return err
}

// run is one preparation.
type run struct {
	cfg  config.Sidecar
	deps Deps
	log  *slog.Logger
	vol  *os.Root // the job's volume
}

// guarded turns a panic into an error: the job must not stay without a final
// status.
func (r *run) guarded(ctx context.Context, url string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("internal error", "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	return r.prepare(ctx, url)
}

// reportFailure must get through although ctx may have ended.
func (r *run) reportFailure(ctx context.Context) {
	limit := r.cfg.Timeout
	if ctx.Err() != nil {
		limit = min(limit, reportGrace)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	if _, err := r.deps.Status.SetStatus(ctx, r.cfg.JobID, ims.Failed); err != nil {
		r.log.Error("the job's status could not be set", "status", ims.Failed, "err", err)
	}
}

func (r *run) prepare(ctx context.Context, rawURL string) error {
	if node := r.cfg.RemoteBuildNode; node != "" {
		return fmt.Errorf("REMOTE_BUILD_NODE is %q: building on a remote node is not supported: remove the node from IMS, or use the legacy ims-utils image for this job", node)
	}
	src, err := newSource(rawURL, r.cfg.CACert)
	if err != nil {
		return err
	}
	defer src.client.CloseIdleConnections()
	if _, err := r.deps.Status.SetStatus(ctx, r.cfg.JobID, ims.FetchingImage); err != nil {
		// The status informs people; the image is worth more than it.
		r.log.Warn("the job's status could not be set", "status", ims.FetchingImage, "err", err)
	}
	if err := r.openVolume(); err != nil {
		return err
	}
	if err := r.discard("removing what an earlier run left on the volume"); err != nil {
		return err
	}
	r.probeXattrs()
	if err := r.fetch(ctx, src); err != nil {
		return err
	}
	return r.unpack(ctx, src)
}

// fetch downloads the image to image.sqsh.
func (r *run) fetch(ctx context.Context, src *source) error {
	f, err := r.vol.OpenFile(partialImage, os.O_CREATE|os.O_EXCL|os.O_RDWR, imageFileMode)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", src, err)
	}
	defer f.Close()
	if r.cfg.DownloadMD5 == "" {
		r.log.Warn("DOWNLOAD_MD5SUM is empty: the image is used as it comes; images this system makes carry their sum")
	}
	d := newDownload(src, f, r.cfg.Timeout, r.log, r.deps.tune)
	d.room = r.room
	if err := d.run(ctx); err != nil {
		return fmt.Errorf("fetch %s: %w", src, err)
	}
	if sum := d.md5(); r.cfg.DownloadMD5 != "" && sum != r.cfg.DownloadMD5 {
		return fmt.Errorf("fetch %s: the MD5 sum of the %d bytes received is %s, IMS expects %s: the object in S3 was damaged or replaced; customize another image, or upload this one again",
			src, d.size, sum, r.cfg.DownloadMD5)
	}
	if err := r.vol.Rename(partialImage, layout.Image); err != nil {
		return err
	}
	return layout.Write(r.cfg.Parent, layout.Record{URLPath: src.url.Path, Size: d.size, MD5: d.md5()})
}

// unpack lays the image's root out.
func (r *run) unpack(ctx context.Context, src *source) error {
	f, err := r.vol.Open(layout.Image)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	img, err := squash.Open(f, info.Size())
	if err != nil {
		return r.unusable(src, err)
	}
	bar := progress.NewLog(r.log, "unpack image", 0)
	stats, err := squash.Unpack(ctx, img, filepath.Join(r.cfg.Parent, partialRoot), squash.UnpackOptions{
		MaxBytes: max(1, r.room()), Progress: bar.Update, Log: r.log,
	})
	if err != nil {
		return r.unusable(src, err)
	}
	bar.Finish()
	if err := r.vol.Rename(partialRoot, filepath.Base(r.cfg.ImageRoot())); err != nil {
		return err
	}
	r.index(ctx, img)
	r.log.Info("image root is ready", "root", r.cfg.ImageRoot(), "files", stats.Files, "dirs", stats.Dirs, "bytes", stats.Bytes)
	r.checkBoot()
	return nil
}

// index notes what is on disk now, so that packing need not read what the user
// leaves alone. Without it packing takes longer, and that is all.
func (r *run) index(ctx context.Context, img *squash.Image) {
	if err := squash.WriteIndex(ctx, img, r.cfg.ImageRoot(), filepath.Join(r.cfg.Parent, layout.Index)); err != nil {
		r.log.Warn("every file will be read again when the image is packed", "err", err)
	}
}

// checkBoot tells the user before the work, not after it, that the image has
// no kernel or initrd of the name the job gave. They may still make one.
func (r *run) checkBoot() {
	root, err := imageroot.Open(r.cfg.ImageRoot())
	if err != nil {
		return
	}
	defer root.Close()
	boot, err := root.FindBoot(imageroot.BootNames{Kernel: r.cfg.KernelName, Initrd: r.cfg.InitrdName, Arch: r.cfg.Arch})
	if err != nil {
		r.log.Warn("the image cannot be packed as it is", "err", err)
		return
	}
	boot.Close()
}

// unusable says what to do about an image that cannot be unpacked.
func (r *run) unusable(src *source, err error) error {
	switch {
	case errors.Is(err, squash.ErrCorrupt):
		return fmt.Errorf("image %s is damaged: %w: customize another image, or build and upload this one again", src, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("image %s: %w: the container prepare must be privileged to make devices and security attributes", src, err)
	case errors.Is(err, squash.ErrTooLarge), errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("image %s: %w: %s", src, err, r.spaceAdvice())
	}
	return fmt.Errorf("image %s: %w", src, err)
}
