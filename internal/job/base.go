// SPDX-License-Identifier: Apache-2.0

package job

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// base is the image the root was made from.
type base struct {
	file  *os.File      // nil: the root's
	image *squash.Image // nil: given up
	index *squash.Index // nil: every file is read to see whether it changed
	key   string        // of its object in the job's bucket; "" if it is not there
	size  int64
	md5   string
}

func (b *base) Close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}

// removable reports whether the root does without it.
func (b *base) removable() bool { return b != nil && b.file != nil }

// remove gives its space back. Its object in the store is still what it was.
func (b *base) remove() error {
	file := b.file
	b.file, b.image, b.index = nil, nil, nil
	return errors.Join(file.Close(), os.Remove(file.Name()))
}

// openBase opens what the init container left, or returns nil: then everything
// is compressed, which takes longer and is never wrong.
func (r *run) openBase(root *layers.Root) *base {
	if r.cfg.Action != config.ActionCustomize {
		return nil
	}
	if image := root.Base(); image != nil {
		b := &base{image: image}
		r.findObject(b)
		return b
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
	r.findObject(b)
	return b
}

// findObject notes which object the base was downloaded from.
func (r *run) findObject(b *base) {
	rec, err := layout.Read(r.cfg.Parent)
	if err != nil {
		r.log.Info("everything is uploaded: it is not known where the old image is in the store", "error", err)
		return
	}
	bucket, key, found := strings.Cut(strings.TrimPrefix(rec.URLPath, "/"), "/")
	if !found || bucket != r.cfg.S3.Bucket {
		r.log.Info("everything is uploaded: the old image is not in this job's bucket", "old", rec.URLPath)
		return
	}
	b.key, b.size, b.md5 = key, rec.Size, rec.MD5
}

// shared is what an image with these statistics has in common with the base's
// object.
func (b *base) shared(st *squash.BaseStats) *upload.Base {
	if b == nil || b.key == "" || st == nil {
		return nil
	}
	same := make([]upload.Range, len(st.Shared))
	for i, x := range st.Shared {
		same[i] = upload.Range{From: x.From, To: x.To, N: x.Bytes}
	}
	return &upload.Base{Key: b.key, Size: b.size, MD5: b.md5, Same: same}
}

// sibling is another artifact of the base's image, should it have the same
// content.
func (b *base) sibling(kind upload.Kind, size int64) *upload.Base {
	if b == nil || path.Base(b.key) != string(upload.Rootfs) {
		return nil
	}
	return &upload.Base{Key: path.Join(path.Dir(b.key), string(kind)), Size: size, Same: []upload.Range{{N: size}}}
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
