// SPDX-License-Identifier: Apache-2.0

package job

import (
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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

// warnOfRoom is called when packing begins. Most images take half of what their files hold at most; a base goes when nothing
// else helps. What cannot fit at all the packer refuses.
func (r *run) warnOfRoom(files int64, base *base) {
	free, err := freeBytes(r.cfg.Parent)
	if err != nil {
		r.log.Warn("the room left on the volume is not known", "error", err)
		return
	}
	r.log.Info("room on the volume", "files_to_pack", files, "free", free)
	if base.removable() {
		free += base.image.Info().BytesUsed
	}
	if typical := files / 2; free < typical {
		r.log.Warn("the volume may be too small for the new image", "free", free, "typically_needed", typical)
	}
}

const moreSpace = "raise build_env_size (GiB) when creating the job, or remove files from the image"

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
