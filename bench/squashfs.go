// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// squashfs compares packing with mksquashfs and unpacking with unsquashfs, on the tree of image.
func squashfs(ctx context.Context, bin, image, work string) ([]comparison, func(), error) {
	tree := filepath.Join(work, "tree")
	sidecar := filepath.Join(bin, "sidecar")
	if out, err := exec.CommandContext(ctx, sidecar, "unpack", image, tree).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("unpack %s: %w\n%s", image, err, out)
	}
	ours, theirs := filepath.Join(work, "ours.sqsh"), filepath.Join(work, "theirs.sqsh")
	out := filepath.Join(work, "out")
	clear := func() error { return os.RemoveAll(out) }
	return []comparison{{
		name: "pack gzip, defaults, vs mksquashfs",
		ours: side{argv: []string{sidecar, "pack", tree, ours}, output: ours},
		theirs: side{argv: []string{"mksquashfs", tree, theirs, "-noappend", "-no-progress", "-quiet"},
			output: theirs},
	}, {
		name:   "unpack gzip vs unsquashfs",
		ours:   side{argv: []string{sidecar, "unpack", image, out}, before: clear},
		theirs: side{argv: []string{"unsquashfs", "-no-progress", "-quiet", "-d", out, image}, before: clear},
	}}, func() {}, nil
}
