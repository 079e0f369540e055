// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/layers"
)

// probeXattrs warns when the volume cannot hold extended attributes: file
// capabilities would be lost, and builds fail late. Kata's virtiofs needs
// "-o xattr".
func probeXattrs(dir string, log *slog.Logger) {
	f, err := os.CreateTemp(dir, ".ims-probe-*")
	if err != nil {
		log.Warn("the volume cannot be written", "error", err)
		return
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		log.Warn("a work file stays on the volume", "error", err)
	}
	if err := unix.Fsetxattr(int(f.Fd()), "user.ims-buildenv", []byte("1"), 0); err != nil {
		log.Warn("the volume does not keep extended attributes; file capabilities of the image may be lost (Kata: virtiofs needs -o xattr)",
			"directory", dir, "error", err)
	}
}

// Space needed for an image, as shares of the data in the tree. gzip brings
// root file systems to a third or half; a tenth has not been seen.
const (
	leastShare   = 8
	typicalShare = 2
)

// checkSpace fails when the image cannot fit, and warns when it may not. The base goes when nothing else helps.
func (r *run) checkSpace(ctx context.Context, root *layers.Root, base *base) error {
	size, err := treeSize(ctx, root.FDPath()) // of a layered one: what changed
	if err != nil {
		return fmt.Errorf("measure the image root: %w", err)
	}
	free, err := freeBytes(r.cfg.Parent)
	if err != nil {
		return fmt.Errorf("measure the volume: %w", err)
	}
	r.log.Info("space on the volume", "data_to_pack", size, "free", free)
	if base.removable() {
		free += base.image.Info().BytesUsed
	}
	if free < size/leastShare {
		return fmt.Errorf("%w: the image root holds %d bytes and the volume has %d left, at least %d are needed to pack it; %s",
			unix.ENOSPC, size, free, size/leastShare, moreSpace)
	}
	typical := size / typicalShare
	if base := root.Base(); base != nil {
		typical += base.Info().BytesUsed // which is taken over packed
	}
	if free < typical {
		r.log.Warn("the volume may be too small for the new image", "data", size, "free", free, "typically_needed", typical)
	}
	return nil
}

const moreSpace = "raise build_env_size (GiB) when creating the job, or remove files from the image"

// treeSize is the space of all regular files below root, hard links once and
// holes not, without crossing into other file systems.
func treeSize(ctx context.Context, root string) (int64, error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	var top, total uint64
	err := filepath.WalkDir(root+"/.", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil // packing will say what is wrong with it
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if top == 0 {
			top = st.Dev
		}
		switch {
		case st.Dev != top:
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return nil
		case st.Nlink > 1:
			id := inode{st.Dev, st.Ino}
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		total += min(uint64(st.Blocks)*512, uint64(st.Size))
		return nil
	})
	return int64(total), err
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// cgroupMemory is the container's memory limit in bytes, 0 for none. It reads
// the cgroup's own view, which is what a container sees at the mount point.
func cgroupMemory() int64 {
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil || n <= 0 || n > 1<<46 { // "max", or version 1's way to say so
			return 0
		}
		return n
	}
	return 0
}

// limitMemory keeps Go's heap below the container's limit. The packer holds
// few blocks per worker, and GOMAXPROCS, which counts the workers, follows the
// cgroup's processor quota by itself.
func limitMemory(log *slog.Logger) {
	if limit := cgroupMemory(); limit > 0 {
		debug.SetMemoryLimit(limit / 10 * 8)
		log.Debug("memory limit", "cgroup", limit)
	}
}
