// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/ims-buildenv/ims-buildenv/internal/changes"
	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// The report on what the job changed. It lies beside sshd's log, because IMS
// deletes the volume when the job succeeds.
const (
	changesJSON = "changes.json"
	changesHTML = "changes.html"
)

// A report is worth little time of a job and a bounded share of its memory.
const (
	changesTimeout = 10 * time.Second
	mostChanges    = 100_000
)

// reportChanges compares the packed image with the one the root was made from,
// while the upload goes on. Whatever fails is a warning: the image is none the
// worse for it.
func (r *run) reportChanges(ctx context.Context, base *base, file *os.File) {
	if base == nil || base.image == nil || r.cfg.Changes == config.ChangesOff {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, changesTimeout)
	defer cancel()
	if err := r.guard(func() error { return r.writeChanges(ctx, base, file) }); err != nil {
		r.log.Warn("there is no report on what the job changed", "error", err)
	}
}

func (r *run) writeChanges(ctx context.Context, base *base, file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	image, err := squash.Open(file, info.Size())
	if err != nil {
		return err
	}
	report, err := changes.Compare(ctx, changes.Side{Name: layout.Image, Image: base.image}, changes.Side{Name: r.cfg.ArchiveName, Image: image},
		changes.Options{MaxChanges: mostChanges})
	if err != nil {
		return err
	}
	for name, write := range map[string]func(io.Writer) error{changesJSON: report.WriteJSON, changesHTML: report.WriteHTML} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			return err
		}
		if err := renameio.WriteFile(filepath.Join(r.cfg.IMSDir, name), b.Bytes(), 0o600, renameio.WithTempDir(r.cfg.IMSDir)); err != nil {
			return fmt.Errorf("report the changes: %w", err)
		}
		if r.cfg.Changes == config.ChangesUpload {
			r.report = append(r.report, reportFile{name, b.Bytes()})
		}
	}
	s := report.Summary
	r.log.Info("what the job changed", "report", filepath.Join(r.cfg.IMSDir, changesHTML), "added", s.Added, "removed", s.Removed, "modified", s.Modified,
		"renamed", s.Renamed, "packages", len(report.Packages), "image_growth", s.ImageGrowth, "content_growth", s.ContentGrowth)
	return nil
}

// reportFile is a report to be uploaded. It is not read again from where sshd's
// container can write, too.
type reportFile struct {
	name    string
	content []byte
}

// uploadChanges puts the report beside the registered image when that is asked
// for. It is in no manifest, so IMS does not delete it with the image.
func (r *run) uploadChanges(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, changesTimeout)
	defer cancel()
	for _, f := range r.report {
		_, err := r.store.Put(ctx, upload.Object{Key: path.Join(r.state.ImageID, f.name), Body: bytes.NewReader(f.content), Size: int64(len(f.content))})
		if err != nil {
			r.log.Warn("the report on what the job changed is not uploaded", "file", f.name, "error", err)
		}
	}
}
