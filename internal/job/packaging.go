// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// packaging turns the root into a registered image. What it publishes before
// an error is taken back by finish.
func (r *run) packaging(ctx context.Context) error {
	if r.state.Phase != phasePackaging {
		r.state.Phase = phasePackaging
		r.saveState()
	}
	if err := r.setStatus(ctx, ims.PackagingArtifacts); err != nil {
		return err
	}
	p, err := r.packAndPublish(ctx)
	if err != nil {
		return err
	}
	if r.result, err = p.document(); err != nil {
		return err
	}
	r.state.Phase = phaseRegistered
	r.saveState()
	r.uploadChanges(ctx)
	return nil
}

func (r *run) packAndPublish(ctx context.Context) (published, error) {
	root, err := r.openRoot()
	if err != nil {
		return published{}, err
	}
	defer root.Close()
	// Cheap things that can fail come before the long one.
	boot, err := root.FindBoot(r.bootNames())
	if err != nil {
		return published{}, err
	}
	defer boot.Close()
	if err := r.checkKernel(root, boot.Kernel); err != nil {
		return published{}, err
	}
	if err := r.store.Check(ctx); err != nil {
		return published{}, err
	}
	base := r.openBase(root)
	if base != nil {
		defer base.Close()
	}
	flags := r.flags
	if !r.state.Layered {
		flags.Root = r.cfg.RootDir // a create job packs another root than it opens a shell on
	}
	if err := errors.Join(removeStale(root, flags, false), root.ProtectImageDir()); err != nil {
		return published{}, err
	}
	return r.packWhilePublishing(ctx, root, base, boot)
}

// packWhilePublishing packs beside all that does not need the image: its record,
// the upload of the other artifacts. The check of the image, and bringing it to
// disk, overlap with its digest and its upload.
func (r *run) packWhilePublishing(ctx context.Context, root *layers.Root, base *base, boot *imageroot.Boot) (published, error) {
	file, err := r.createPacked()
	if err != nil {
		return published{}, err
	}
	defer file.Close()
	pending := upload.NewPending()
	packing, stop := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := r.guard(func() error { return r.pack(packing, root, base, file, pending) })
		if pending.Close(err); err == nil {
			r.reportChanges(packing, base, file)
		}
	}()
	p, err := r.publish(ctx, r.cfg.ArchiveName, artifacts(file, pending, boot, base))
	if err != nil {
		stop(err)
	}
	<-done
	stop(nil)
	return p, err
}

// createPacked makes the file for the new image. Whatever lies under its name,
// be it a link, is removed and not written to.
func (r *run) createPacked() (*os.File, error) {
	if err := os.RemoveAll(r.packedPath()); err != nil {
		return nil, err
	}
	return os.OpenFile(r.packedPath(), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// pack writes the image to file, and tells how far it has come and when it can be read. Where it does not fit beside the
// image the root was made from, that one is given up, which no job depends on.
func (r *run) pack(ctx context.Context, root *layers.Root, base *base, file *os.File, pending *upload.Pending) error {
	opt := r.format.opt
	opt.MemoryLimit, opt.Grown = cgroupMemory()/4, pending.Grown
	dir := squash.DirOptions{OneFileSystem: true, Exclude: r.format.exclude, SpoolDir: filepath.Dir(r.packedPath())}
	if base != nil {
		opt.Base, dir.Index = &squash.Base{Image: base.image}, base.index
		dir.DropXattr = r.foreign(base.image)
		r.warnOfHidden(base.image)
	}
	written := false
	opt.Written = func(stats squash.Stats) {
		written = true
		pending.Whole(stats.BytesOut, base.shared(stats.Base))
	}
	stats, err := r.packTo(ctx, root, base, dir, file, opt)
	if full(err) && base.removable() && !written {
		r.log.Warn("the new image has no room beside the one the root was made from, which is removed; everything is compressed", "error", err)
		if err := errors.Join(base.remove(), file.Truncate(0)); err != nil {
			return fmt.Errorf("make room for the image: %w", err)
		}
		opt.Base, opt.Grown, dir.Index = nil, nil, nil
		stats, err = r.packTo(ctx, root, nil, dir, file, opt)
	}
	if err != nil {
		if full(err) {
			err = fmt.Errorf("%w; %s", err, moreSpace)
		}
		return fmt.Errorf("pack the image: %w", err)
	}
	r.logReuse(stats)
	const most = 50
	for i, w := range stats.Warnings {
		if i == most {
			r.log.Warn("more remarks about the packed tree are left out", "count", len(stats.Warnings)-most)
			break
		}
		r.log.Warn("packed with a remark", "remark", w)
	}
	return nil
}

func (r *run) packTo(ctx context.Context, root *layers.Root, base *base, dir squash.DirOptions, file *os.File, opt squash.Options) (squash.Stats, error) {
	src, err := root.Source(dir)
	if err != nil {
		return squash.Stats{}, err
	}
	defer src.Close()
	bar := r.progress("packing", 0)
	begun := false
	opt.Progress = func(done, total int64) {
		if !begun {
			r.warnOfRoom(total, base)
			begun = true
		}
		bar.Update(done, total)
	}
	written := opt.Written
	opt.Written = func(stats squash.Stats) {
		bar.Finish()
		written(stats)
	}
	return squash.PackChecked(ctx, src, file, opt)
}

// full tells a volume, or a quota, that is used up.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

func artifacts(image io.ReaderAt, pending *upload.Pending, boot *imageroot.Boot, base *base) []upload.Artifact {
	all := []upload.Artifact{
		{Kind: upload.Rootfs, Body: image, Pending: pending},
		{Kind: upload.Kernel, Body: boot.Kernel, Size: boot.Kernel.Size, Base: base.sibling(upload.Kernel, boot.Kernel.Size)},
		{Kind: upload.Initrd, Body: boot.Initrd, Size: boot.Initrd.Size, Base: base.sibling(upload.Initrd, boot.Initrd.Size)},
	}
	if p := boot.Parameters; p != nil {
		all = append(all, upload.Artifact{Kind: upload.BootParameters, Body: p, Size: p.Size})
	}
	return all
}

// publish makes the image record, uploads, and links everything up. The record
// is noted before the first object exists, so that undo finds both.
func (r *run) publish(ctx context.Context, name string, files []upload.Artifact) (published, error) {
	image, err := r.createRecord(ctx, name)
	if err != nil {
		return published{}, err
	}
	r.state.ImageID = image.ID
	if r.state.Phase == phasePackaging {
		r.saveState()
	}
	r.log.Info("image record created", "image", image.ID)
	var bar *progress.P
	res, err := upload.Publish(ctx, r.store, upload.Request{
		Prefix: image.ID, Metadata: upload.ImageMetadata(image.ID, name, r.cfg.JobID), Artifacts: files, Log: r.log,
		Progress: func(kind upload.Kind, done, total int64) {
			if kind != upload.Rootfs {
				return // goes on beside the packing, which has a bar of its own
			}
			if bar == nil {
				bar = r.progress("uploading "+string(kind), total)
			}
			bar.Update(done, total)
		},
	})
	if err != nil {
		return published{}, err
	}
	bar.Finish()
	link := ims.Link{ETag: res.Manifest.ETag, Path: res.Manifest.Path, Type: res.Manifest.Type}
	if image, err = r.ims.LinkImage(ctx, image.ID, link); err != nil {
		return published{}, fmt.Errorf("link the image to its manifest: %w", err)
	}
	p := published{image: image, artifacts: res.Artifacts}
	if r.cfg.JobID != "" {
		job, err := r.ims.SetResultantImage(ctx, r.cfg.JobID, image.ID)
		if err != nil {
			return published{}, fmt.Errorf("tell the job its image: %w", err)
		}
		p.job = &job
	}
	r.log.Info("image registered", "image", image.ID, "name", name)
	return p, nil
}

// createGrace is how long the answer about a new record is waited for when the job is ended meanwhile.
const createGrace = 3 * time.Second

// createRecord makes the image record. A request that is under way when the job is ended goes on for a moment: a record
// whose id nobody got is one that nobody removes.
func (r *run) createRecord(ctx context.Context, name string) (ims.Image, error) {
	if ctx.Err() != nil {
		return ims.Image{}, context.Cause(ctx)
	}
	request, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(createGrace, func() { cancel(context.Cause(ctx)) })
	})()
	image, err := r.ims.CreateImage(request, name, r.cfg.Arch)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return image, err
}

// progress reports to a terminal as a bar, otherwise in the job's own log.
func (r *run) progress(name string, total int64) *progress.P {
	if f, ok := r.deps.Stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return progress.New(f, name, total)
	}
	return progress.NewLog(r.log, name, total)
}

// Package does what the legacy package_and_upload.sh did, for callers that own
// the job's status: packaging_artifacts, pack, upload, register. The status is
// set to error on failure and left alone on success.
func Package(ctx context.Context, cfg config.Sidecar, deps Deps) int {
	r, err := newRun(cfg, deps)
	if err != nil {
		return r.refuse(ctx, err)
	}
	limitMemory(r.log)
	r.state = state{JobID: cfg.JobID}
	err = r.guard(func() error {
		if err := r.settleLayout(ctx); err != nil {
			return err
		}
		return r.packaging(ctx)
	})
	if err != nil {
		return r.finish(ctx, err)
	}
	r.removeWorkFiles()
	r.dropState()
	if _, err := r.deps.Stdout.Write(r.result); err != nil {
		r.log.Warn("the result could not be printed", "error", err)
	}
	return exitOK
}
