// SPDX-License-Identifier: Apache-2.0

package job

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// base is the image the root was unpacked from.
type base struct {
	file  *os.File
	image *squash.Image
	index *squash.Index // nil: every file is read to see whether it changed
}

func (b *base) Close() error { return b.file.Close() }

// openBase opens what the init container left, or returns nil: then everything
// is compressed, which takes longer and is never wrong.
func (r *run) openBase() *base {
	if r.cfg.Action != config.ActionCustomize {
		return nil
	}
	f, err := layout.Open(r.cfg.Parent, layout.Image)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			r.log.Info("the image the root was made from is not on the volume: everything is compressed")
		} else {
			r.log.Warn("everything is compressed", "error", err)
		}
		return nil
	}
	b := &base{file: f}
	info, err := f.Stat()
	if err == nil {
		b.image, err = squash.Open(f, info.Size())
	}
	if err != nil {
		r.log.Warn("the image the root was made from cannot be read: everything is compressed", "image", f.Name(), "error", err)
		f.Close()
		return nil
	}
	if b.index, err = squash.OpenIndex(filepath.Join(r.cfg.Parent, layout.Index), b.image); err != nil {
		r.log.Warn("every file is read to see what changed", "error", err)
	}
	return b
}

// logReuse says what packing took over from the base.
func (r *run) logReuse(st squash.Stats) {
	switch b := st.Base; {
	case b == nil:
	case b.Refused != "":
		r.log.Info("nothing was taken over from the old image", "why", b.Refused)
	default:
		r.log.Info("unchanged data was taken over from the old image", "layout", b.Layout, "files", b.Files, "of", st.Files,
			"bytes", b.CopiedBytes, "new", st.BytesOut-b.CopiedBytes, "dead", b.DeadBytes)
	}
}
