// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"golang.org/x/sys/unix"
)

func (r *run) openVolume() error {
	if err := os.MkdirAll(r.cfg.Parent, 0o755); err != nil {
		return fmt.Errorf("job volume: %w", err)
	}
	vol, err := os.OpenRoot(r.cfg.Parent)
	if err != nil {
		return fmt.Errorf("job volume: %w", err)
	}
	r.vol = vol
	return nil
}

// discard removes from the volume what this package makes, and what the
// containers after it leave, so that a job never meets another one's flags or
// resolv.conf. os.Root follows no link out of the volume.
func (r *run) discard(why string) error {
	var errs []error
	for _, name := range append(append(layout.Names(), layers.Names()...),
		partialImage, filepath.Base(r.cfg.ImageRoot()),
		imageroot.ResolvBackup, imageroot.ResolvBackupSaved,
		string(signalfile.Ready), string(signalfile.Complete), string(signalfile.Failed), string(signalfile.Exiting), string(signalfile.PodError),
	) {
		if _, err := r.vol.Lstat(name); errors.Is(err, os.ErrNotExist) {
			continue
		}
		r.log.Info(why, "name", name)
		if err := r.vol.RemoveAll(name); err != nil {
			errs = append(errs, fmt.Errorf("clean up the job volume: %w", err))
		}
	}
	return errors.Join(errs...)
}

// room returns how many bytes the volume can still take.
func (r *run) room() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(r.cfg.Parent, &st); err != nil {
		r.log.Warn("the free space of the volume is not known", "err", err)
		return math.MaxInt64
	}
	// Bavail is what is not reserved; a network file system may report
	// nonsense as large as the type holds.
	if st.Bsize <= 0 || st.Bavail > uint64(math.MaxInt64/st.Bsize) {
		return math.MaxInt64
	}
	return int64(st.Bavail) * st.Bsize
}

// spaceAdvice is the next step when the volume is full.
func (r *run) spaceAdvice() string {
	return fmt.Sprintf("%d bytes are free on %s: raise build_env_size of the job", r.room(), r.cfg.Parent)
}

// probeXattrs warns early when the volume cannot hold what the image may
// carry: on virtiofs without xattrs the job would only fail at the first file
// capability.
func (r *run) probeXattrs() {
	f, err := r.vol.OpenFile(partialImage, os.O_CREATE|os.O_EXCL|os.O_RDWR, imageFileMode)
	if err != nil {
		return // fetch makes the same file and reports what is wrong
	}
	defer func() {
		f.Close()
		_ = r.vol.Remove(partialImage)
	}()
	if err := unix.Fsetxattr(int(f.Fd()), "user.ims-probe", []byte("1"), 0); errors.Is(err, unix.ENOTSUP) {
		r.log.Warn("the job volume keeps no extended attributes: file capabilities and ACLs of the image cannot be laid out; use a volume that has them", "volume", r.cfg.Parent)
	}
}
