// SPDX-License-Identifier: Apache-2.0

// Package prepare is the job's init container: it fetches the image's
// SquashFS file from a presigned URL, checks it, and lays its root out for
// the user.
//
// On the job's volume it makes image.sqsh, the download, and image-root, the
// tree, with what package layout records of them; each appears under its name
// only when it is complete. The tree is unpacked, or, where the container sshd
// will be able to mount it, laid out in layers, which takes no time: image-root
// is an empty directory then. What an earlier run left under these names is
// removed first. The download stays, readable by root alone and outside the root:
// the layers need it, and packing copies the blocks of unchanged files from it
// instead of compressing them again.
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
	"strings"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"golang.org/x/sys/unix"
)

// Names on the job's volume.
const (
	partialImage  = ".image.sqsh.partial"
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

	record layout.Record // of the image, written when its root is laid out
	filled bool          // the tree was unpacked while the image was received
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
	if layout.Started(r.cfg.Parent, r.cfg.JobID) {
		r.log.Warn("an earlier pod of this job prepared this volume, and its user may have been at work: leaving it as it is")
		return nil
	}
	if err := r.discard("removing what an earlier run left on the volume"); err != nil {
		return err
	}
	r.probeXattrs()
	if err := r.fetch(ctx, src); err != nil {
		return err
	}
	return r.layOut(ctx, src)
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
	unpacking := r.unpackArriving(ctx, d)
	if err := d.run(ctx); err != nil {
		unpacking.stop(err)
		return fmt.Errorf("fetch %s: %w", src, err)
	}
	if sum := d.md5(); r.cfg.DownloadMD5 != "" && sum != r.cfg.DownloadMD5 {
		unpacking.stop(errors.New("the image is not the expected one"))
		return fmt.Errorf("fetch %s: the MD5 sum of the %d bytes received is %s, IMS expects %s: the object in S3 was damaged or replaced; customize another image, or upload this one again",
			src, d.size, sum, r.cfg.DownloadMD5)
	}
	if err := unpacking.wait(); err != nil {
		return err
	}
	if err := r.vol.Rename(partialImage, layout.Image); err != nil {
		return err
	}
	r.record = layout.Record{URLPath: src.url.Path, Size: d.size, MD5: d.md5()}
	return nil
}

// layOut lays the image's root out. The record is the last thing it writes.
func (r *run) layOut(ctx context.Context, src *source) error {
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
	if err := r.chooseLayout(ctx, img); err != nil {
		return r.unusable(src, err)
	}
	if r.record.Layout == layout.Unpacked {
		if err := r.unpack(ctx, img); err != nil {
			return r.unusable(src, err)
		}
	}
	if err := layout.Write(r.cfg.Parent, r.record); err != nil {
		return err
	}
	r.log.Info("image root is ready", "root", r.cfg.ImageRoot(), "layout", r.record.Layout, "why", r.record.Why)
	r.checkBoot()
	return nil
}

// uncopyable is an error for images with attributes that the sidecar, which has no CAP_SYS_ADMIN, could not copy to the upper
// layer with a file that it edits (xattr(7)).
func uncopyable(img *squash.Image) error {
	has, err := img.HasXattr(func(name string) bool {
		return strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "security.") && name != "security.capability"
	})
	if err == nil && has {
		err = errors.New("the image has extended attributes that the sidecar may not write (trusted.* or security.*)")
	}
	return err
}

// whyUnpacked says why the root must be unpacked, whatever the image is, and nothing if it may be layered.
func (r *run) whyUnpacked() string {
	switch {
	case r.cfg.Layout == config.LayoutUnpacked:
		return "IMS_BUILDENV_LAYOUT is unpacked"
	case r.cfg.Layout != config.LayoutLayered && !r.cfg.DKMS:
		return "the container sshd may not mount: the job was created without require_dkms"
	}
	return ""
}

// chooseLayout decides, and lays out what is layered.
func (r *run) chooseLayout(ctx context.Context, img *squash.Image) error {
	r.record.Layout = layout.Unpacked
	if r.record.Why = r.whyUnpacked(); r.record.Why != "" {
		return nil
	}
	// Unpacking meets whatever is damaged; the kernel, at best when somebody looks. The content is read while the user works.
	began := time.Now()
	if err := squash.Verify(ctx, img, true); err != nil {
		return err
	}
	r.log.Debug("the image's structure is intact", "ms", time.Since(began).Milliseconds())
	err := uncopyable(img)
	if err == nil {
		err = layers.LayOut(img, r.cfg.Parent, r.cfg.ImageRoot())
	}
	if err == nil {
		err = layout.Probe(r.cfg.Parent, r.cfg.ImageRoot())
	}
	if err == nil {
		r.record.Layout, r.record.Why = layout.Layered, "mounting it works"
		return nil
	}
	if r.cfg.Layout == config.LayoutLayered {
		return fmt.Errorf("IMS_BUILDENV_LAYOUT asks for a layered root, which cannot be had here: %w: set it to auto", err)
	}
	r.record.Why = err.Error()
	var errs []error
	for _, name := range []string{layout.Upper, layout.Work, filepath.Base(r.cfg.ImageRoot())} {
		errs = append(errs, r.vol.RemoveAll(name))
	}
	return errors.Join(errs...)
}

func (r *run) unpack(ctx context.Context, img *squash.Image) error {
	if !r.filled {
		if err := r.fill(ctx, img, r.room()); err != nil {
			return err
		}
	}
	return layers.Finish(ctx, img, r.cfg.Parent, r.cfg.ImageRoot(), r.log)
}

func (r *run) fill(ctx context.Context, img *squash.Image, room int64) error {
	bar := progress.NewLog(r.log, "unpack image", 0)
	stats, err := layers.Fill(ctx, img, r.cfg.Parent, squash.UnpackOptions{MaxBytes: max(1, room), Progress: bar.Update, Log: r.log})
	if err != nil {
		return err
	}
	bar.Finish()
	r.log.Info("image unpacked", "files", stats.Files, "dirs", stats.Dirs, "bytes", stats.Bytes)
	return nil
}

// checkBoot tells the user before the work, not after it, that the image has
// no kernel or initrd of the name the job gave. They may still make one.
func (r *run) checkBoot() {
	open := func() (*layers.Root, error) { return layers.OpenUnpacked(r.cfg.ImageRoot()) }
	if r.record.Layout == layout.Layered {
		open = func() (*layers.Root, error) { return layers.OpenLayered(r.cfg.Parent) }
	}
	root, err := open()
	if err != nil {
		return
	}
	defer root.Close()
	if err := root.CheckBoot(imageroot.BootNames{Kernel: r.cfg.KernelName, Initrd: r.cfg.InitrdName, Arch: r.cfg.Arch}); err != nil {
		r.log.Warn("the image cannot be packed as it is", "err", err)
	}
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
