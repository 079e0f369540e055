// SPDX-License-Identifier: Apache-2.0

package layers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// partialRoot is an unpacked root on its way to its name.
const partialRoot = ".image-root.partial"

// Names returns the names on the volume that LayOut and Unpack use besides the
// root's and those of package layout, for cleaning up.
func Names() []string { return []string{partialRoot} }

// LayOut lays the image on the volume parent out as layers: an upper layer without
// a change, and the empty directory root, where they are to be mounted.
func LayOut(img *squash.Image, parent, root string) error {
	top, err := img.Root()
	if err != nil {
		return err
	}
	work, upper := filepath.Join(parent, layout.Work), filepath.Join(parent, layout.Upper)
	for _, dir := range []string{work, upper, root} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("lay out: %w", err)
		}
	}
	r := Root{base: img}
	err = errors.Join(os.Mkdir(work, 0o700), os.Mkdir(root, 0o755), os.Chmod(root, 0o755), r.make(upper, ".", top))
	if err != nil {
		return fmt.Errorf("lay out: %w", err)
	}
	return nil
}

// Source is the root's tree, for packing. The options are for an unpacked one.
func (r *Root) Source(opt squash.DirOptions) (squash.Source, error) {
	if r.base == nil {
		return squash.DirSource(r.FDPath(), opt)
	}
	return squash.LayersSource(r.base, r.FDPath(), squash.LayersOptions{Work: r.work, Exclude: opt.Exclude, SpoolDir: opt.SpoolDir})
}

// Unpack lays the image on the volume parent out as a directory with an index. The
// directory appears under its name only when it is complete; an empty one there is
// replaced. After an error what was unpacked is left.
func Unpack(ctx context.Context, img *squash.Image, parent, root string, opt squash.UnpackOptions) (squash.UnpackStats, error) {
	stats, err := Fill(ctx, img, parent, opt)
	if err == nil {
		err = Finish(ctx, img, parent, root, opt.Log)
	}
	return stats, err
}

// Fill is the first half of Unpack, after which nothing has its name yet.
func Fill(ctx context.Context, img *squash.Image, parent string, opt squash.UnpackOptions) (squash.UnpackStats, error) {
	stats, err := squash.Unpack(ctx, img, filepath.Join(parent, partialRoot), opt)
	if err != nil {
		return stats, fmt.Errorf("lay out: %w", err)
	}
	return stats, nil
}

// Finish gives what Fill unpacked its name and an index.
func Finish(ctx context.Context, img *squash.Image, parent, root string, log *slog.Logger) error {
	if err := unix.Rename(filepath.Join(parent, partialRoot), root); err != nil { // os.Rename takes no directory's place
		return fmt.Errorf("lay out %s: %w", root, err)
	}
	// Without an index packing takes longer, and that is all.
	if err := squash.WriteIndex(ctx, img, root, filepath.Join(parent, layout.Index)); err != nil {
		log.Warn("every file will be read again when the image is packed", "err", err)
	}
	return nil
}
