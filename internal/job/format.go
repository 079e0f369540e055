// SPDX-License-Identifier: Apache-2.0

package job

import (
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// format is how the site wants its images.
type format struct {
	opt     squash.Options
	exclude func(path string) bool
}

// readFormat reads it before the user works, not after.
func readFormat(cfg config.Sidecar) (f format, err error) {
	var errs [4]error
	if cfg.Compressor != "" {
		f.opt.Compressor, err = squash.ParseCompressor(cfg.Compressor)
		if _, ok := kernelOptions[f.opt.Compressor]; err == nil && !ok && f.opt.Compressor != squash.None {
			err = fmt.Errorf("images compressed with %s are read only: use gzip, xz, zstd, lz4 or none", cfg.Compressor)
		}
		if err != nil {
			errs[0] = fmt.Errorf("IMS_BUILDENV_COMPRESSOR: %w", err)
		}
	}
	if cfg.BlockSize != "" {
		if f.opt.BlockSize, err = squash.ParseBlockSize(cfg.BlockSize); err != nil {
			errs[1] = fmt.Errorf("IMS_BUILDENV_BLOCK_SIZE: %w", err)
		}
	}
	if f.exclude, err = squash.ReadExcludes(cfg.ExcludeFile); err != nil {
		errs[2] = fmt.Errorf("IMS_BUILDENV_EXCLUDE_FILE: %w", err)
	}
	f.opt.Epoch, errs[3] = config.SourceDateEpoch()
	return f, errors.Join(errs[:]...)
}

// kernelOptions are what a kernel needs to read an image (fs/squashfs/Kconfig).
var kernelOptions = map[squash.Compressor]string{
	squash.Gzip: "CONFIG_SQUASHFS_ZLIB", squash.XZ: "CONFIG_SQUASHFS_XZ", squash.Zstd: "CONFIG_SQUASHFS_ZSTD", squash.LZ4: "CONFIG_SQUASHFS_LZ4",
}

// maxKernelConfig is some ten times what distributions have.
const maxKernelConfig = 4 << 20

// checkKernel refuses a compressor that the image's own kernel cannot read, as
// far as the configuration beside it tells.
func (r *run) checkKernel(root *layers.Root, kernel *imageroot.BootFile) error {
	option, ok := kernelOptions[r.format.opt.Compressor]
	if r.cfg.Compressor == "" || !ok {
		return nil
	}
	_, version, _ := strings.Cut(path.Base(kernel.Resolved), "-")
	names := r.bootNames()
	names.Parameters = "config-" + version
	boot, err := root.FindBoot(names)
	if err != nil {
		return err
	}
	defer boot.Close()
	if version == "" || boot.Parameters == nil {
		r.log.Warn("nothing tells whether the kernel reads the compressor", "kernel", kernel.Resolved, "compressor", r.cfg.Compressor, "looked_for", names.Parameters)
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(boot.Parameters, maxKernelConfig))
	if err != nil {
		return err
	}
	if !regexp.MustCompile(`(?m)^` + option + `=[ym]$`).Match(b) {
		return fmt.Errorf("the kernel %s cannot read images compressed with %s: %s has no %s; change IMS_BUILDENV_COMPRESSOR, or the kernel",
			kernel.Resolved, r.cfg.Compressor, boot.Parameters.Path, option)
	}
	return nil
}
