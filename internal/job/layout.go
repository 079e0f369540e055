// SPDX-License-Identifier: Apache-2.0

package job

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

const (
	// mountWait is how long sshd may take to start and say whether it can mount a
	// layered root. OpenSSH in its place says nothing.
	mountWait  = 20 * time.Second
	mountPause = 50 * time.Millisecond
)

// settleLayout finds out how the root is laid out, once per job: the answer is kept
// in the state, where no user can change it. A layered root that sshd cannot mount
// is unpacked here.
func (r *run) settleLayout(ctx context.Context) error {
	if r.state.Phase == phaseNew && r.cfg.Action == config.ActionCustomize {
		record, err := layout.Read(r.cfg.Parent)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.log.Warn("the root is taken for unpacked", "error", err)
		}
		if err == nil && record.Layout == layout.Layered {
			if why := r.awaitMountable(ctx); why == nil {
				r.state.Layered = true
			} else if ctx.Err() != nil {
				return context.Cause(ctx)
			} else if err := r.unpack(ctx, record, why); err != nil {
				return err
			}
		}
		r.log.Info("layout of the image root", "layered", r.state.Layered)
	}
	if r.state.Layered {
		r.flags.Root = filepath.Join(r.cfg.Parent, layout.Upper)
	}
	return nil
}

// awaitMountable returns why sshd will not mount the root; nil: it will.
func (r *run) awaitMountable(ctx context.Context) error {
	limit := cmp.Or(r.deps.tune.mountWait, mountWait)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		if why, ok := layout.Promised(r.cfg.Parent); ok {
			return why
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the container sshd does not say within %s that it can mount it; it seems to be another program than ours", limit)
		case <-time.After(mountPause):
		}
	}
}

// unpack makes an unpacked root of a layered one that nobody can mount.
func (r *run) unpack(ctx context.Context, record layout.Record, why error) error {
	r.log.Warn("the layered image root is unpacked after all, which takes its time", "why", why)
	root, err := layers.OpenLayered(r.cfg.Parent)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range layers.Names() { // of a run that was interrupted
		if err := os.RemoveAll(filepath.Join(r.cfg.Parent, name)); err != nil {
			return err
		}
	}
	free, err := freeBytes(r.cfg.Parent)
	if err != nil {
		return err
	}
	bar := r.progress("unpacking", 0)
	_, err = layers.Unpack(ctx, root.Base(), r.cfg.Parent, r.cfg.ImageRoot(), squash.UnpackOptions{
		MaxBytes: max(1, free), Progress: bar.Update, Log: r.log,
	})
	switch {
	case errors.Is(err, unix.EPERM):
		// security.selinux, trusted.*: setting these takes CAP_SYS_ADMIN.
		return fmt.Errorf("%w: this container lacks the privileges for an attribute of the image: set IMS_BUILDENV_LAYOUT=unpacked for the container prepare, which has them", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, squash.ErrTooLarge):
		return fmt.Errorf("%w; %s", err, moreSpace)
	case err != nil:
		return err
	}
	bar.Finish()
	record.Layout, record.Why = layout.Unpacked, why.Error()
	return layout.Write(r.cfg.Parent, record)
}

// openRoot opens the root this job packs. The user may have replaced it.
func (r *run) openRoot() (*layers.Root, error) {
	if r.state.Layered {
		return layers.OpenLayered(r.cfg.Parent)
	}
	return layers.OpenUnpacked(r.cfg.RootDir)
}

// readBase reads all of the image that a layered root is on, once, so that one that is damaged is known before its user
// has worked for long. What was unpacked has been read.
func (r *run) readBase(ctx context.Context) error {
	if !r.state.Layered {
		return nil
	}
	root, err := r.openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	name := layout.Image
	if record, err := layout.Read(r.cfg.Parent); err == nil && record.URLPath != "" {
		name = record.URLPath
	}
	began := time.Now()
	err = squash.Verify(ctx, root.Base(), false)
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, squash.ErrCorrupt):
		return fmt.Errorf("image %s is damaged: %w: customize another image, or build and upload this one again", name, err)
	case err != nil:
		r.log.Warn("whether the image is intact is not known", "error", err)
	default:
		r.log.Info("the image is intact", "ms", time.Since(began).Milliseconds())
	}
	return nil
}

// removeStale removes flags that are not, or no longer, the user's. With keep the
// way to where they lie stays in the upper layer of a layered root.
func removeStale(root *layers.Root, flags signalfile.Set, keep bool) error {
	return root.Flags(flags.RemoveStale, keep && flags.Jailed,
		signalfile.InRoot(signalfile.Complete), signalfile.InRoot(signalfile.Failed))
}
