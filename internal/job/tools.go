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
	files, closeAll, err := req.open()
	if err != nil {
		return err
	}
	defer closeAll()
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

// open opens the files.
func (req UploadRequest) open() (files []upload.Artifact, closeAll func(), err error) {
	var opened []*os.File
	closeAll = func() {
		for _, f := range opened {
			f.Close()
		}
	}
	for _, a := range []struct {
		kind upload.Kind
		path string
	}{{upload.Rootfs, req.Rootfs}, {upload.Kernel, req.Kernel}, {upload.Initrd, req.Initrd}, {upload.BootParameters, req.Parameters}} {
		if a.path == "" {
			continue
		}
		f, err := os.Open(a.path)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		opened = append(opened, f)
		info, err := f.Stat()
		if err == nil && (!info.Mode().IsRegular() || info.Size() == 0) {
			err = fmt.Errorf("%s: not a regular file with content", a.path)
		}
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		files = append(files, upload.Artifact{Kind: a.kind, Body: f, Size: info.Size()})
	}
	return files, closeAll, nil
}

// UploadPlain publishes an image below a prefix of the bucket, for boot services
// that know no IMS, and prints the result. A failure leaves no objects.
func UploadPlain(ctx context.Context, cfg config.Sidecar, deps Deps, prefix string, labels map[string]string, req UploadRequest) int {
	b, err := uploadPlain(ctx, cfg, deps, prefix, labels, req)
	if err == nil {
		_, err = deps.Stdout.Write(b)
	} else {
		printFailure(deps.Stdout, err)
	}
	if err != nil {
		deps.Log.Error("the upload failed", "error", err)
		return exitFailure
	}
	return exitOK
}

func uploadPlain(ctx context.Context, cfg config.Sidecar, deps Deps, prefix string, labels map[string]string, req UploadRequest) ([]byte, error) {
	store, err := newStore(cfg, deps.Log)
	if err != nil {
		return nil, err
	}
	files, closeAll, err := req.open()
	if err != nil {
		return nil, err
	}
	defer closeAll()
	// A failed upload removes all below the prefix, so nothing of others may be there.
	found, err := store.List(ctx, prefix+"/")
	if err != nil {
		return nil, err
	}
	if len(found) > 0 {
		return nil, fmt.Errorf("%s exists: choose another --prefix, or delete what is below this one", store.URL(found[0].Key))
	}
	res, err := upload.Publish(ctx, store, upload.Request{Prefix: prefix, Metadata: labels, Artifacts: files, Log: deps.Log})
	if err != nil {
		return nil, err
	}
	return encode(map[string]any{"artifacts": res.Artifacts, "result": "success"})
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
