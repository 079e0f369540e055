// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/google/uuid"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// UploadRequest is an image made elsewhere. Paths other than Rootfs may be "".
type UploadRequest struct {
	Name       string
	JobID      string // "" when no job is involved
	Arch       string
	Rootfs     string
	Kernel     string
	Initrd     string
	Parameters string
}

// Upload publishes and registers an image and prints the result. It sets no
// status. A failure leaves neither objects nor record.
func Upload(ctx context.Context, cfg config.Sidecar, deps Deps, req UploadRequest) int {
	cfg.JobID, cfg.Arch = req.JobID, req.Arch
	r, err := newRun(cfg, deps)
	if err == nil {
		err = r.guard(func() error { return r.uploadFiles(ctx, req) })
	}
	if err == nil {
		_, err = deps.Stdout.Write(r.result)
		if err == nil {
			return exitOK
		}
	}
	if r.result == nil {
		r.takeBack(ctx)
	}
	r.log.Error("the upload failed", "error", err)
	printFailure(deps.Stdout, err)
	return exitFailure
}

func (r *run) uploadFiles(ctx context.Context, req UploadRequest) error {
	if req.JobID != "" && uuid.Validate(req.JobID) != nil {
		return fmt.Errorf("job id %q is not a UUID", req.JobID)
	}
	var files []upload.Artifact
	for _, a := range []struct {
		kind upload.Kind
		path string
	}{{upload.Rootfs, req.Rootfs}, {upload.Kernel, req.Kernel}, {upload.Initrd, req.Initrd}, {upload.BootParameters, req.Parameters}} {
		if a.path == "" {
			continue
		}
		f, err := os.Open(a.path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() || info.Size() == 0 {
			return fmt.Errorf("%s: not a regular file with content", a.path)
		}
		files = append(files, upload.Artifact{Kind: a.kind, Body: f, Size: info.Size()})
	}
	if err := r.store.Check(ctx); err != nil {
		return err
	}
	p, err := r.publish(ctx, req.Name, files)
	if err != nil {
		return err
	}
	r.result, err = p.document()
	return err
}

// SetStatus sets a job's status and prints its record, as the legacy helper's
// set_job_status did.
func SetStatus(ctx context.Context, cfg config.Sidecar, deps Deps, jobID string, s ims.Status) int {
	err := func() error {
		c := deps.IMS
		if c == nil {
			var err error
			if c, err = NewIMS(cfg, deps.Log); err != nil {
				return err
			}
		}
		job, err := c.SetStatus(ctx, jobID, s)
		if err != nil {
			return err
		}
		b, err := encode(map[string]any{"ims_job_record": generic(job.Raw), "result": "success"})
		if err != nil {
			return err
		}
		_, err = deps.Stdout.Write(b)
		return err
	}()
	if err != nil && !errors.Is(err, context.Canceled) {
		deps.Log.Error("the status was not set", "error", err)
	}
	if err != nil {
		printFailure(deps.Stdout, err)
		return exitFailure
	}
	return exitOK
}
