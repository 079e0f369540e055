// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// packFlags is what pack can be told.
type packFlags struct {
	compressor    string
	level         int
	blockSize     string
	workers       int
	excludeFile   string
	oneFileSystem bool
	epoch         string
	json          bool

	base, index, upper, work, layout string
}

func newPack() *cobra.Command {
	var f packFlags
	var opt squash.Options
	c := &cobra.Command{
		Use:   "pack [flags] SOURCE IMAGE",
		Short: "Pack a directory or a tar archive as a SquashFS image",
		Long: `pack writes the tree below the directory SOURCE, or the one in the tar archive
SOURCE, to IMAGE: owners, modes, hard links, devices, extended attributes and
holes as they are. IMAGE appears whole or not at all, after its structure has
been read back. The same tree and --epoch give the same bytes, whatever the
number of workers, and whether from a directory or an archive of it.

An archive may be plain or compressed with gzip, xz or zstd; "-" reads it from
standard input. Its tree is never unpacked; unless it is a plain file, the
content of its files is kept meanwhile in an unnamed file beside IMAGE.

Each line of the --exclude-file is a path below the root or a pattern with
*, ? and [...], as for mksquashfs -wildcards -ef; "... *.pyc" applies in every
directory. What it matches is left out with everything below it.

With --base the compressed data of what did not change is taken over from the
image the tree was made from, whose compressor and block size the new image
gets. What changed is known by --index, which "unpack --index" wrote, or from
--upper, the upper directory of an overlay on the base, which then must not be
mounted and stands for SOURCE; with neither, by reading everything. --layout
append keeps the base's data in place, dead or not; compact leaves out what is
dead; auto appends until a tenth of it is.`,
		Example: `  sidecar pack rootfs/ image.sqsh
  sidecar pack rootfs.tar.xz image.sqsh
  podman export box | sidecar pack - image.sqsh
  sidecar pack --compressor zstd --block-size 1M --epoch 0 rootfs/ image.sqsh
  sidecar pack --exclude-file site-excludes --one-file-system / /backup/host.sqsh
  sidecar unpack --index old.index old.sqsh rootfs/ && touch rootfs/etc/new
  sidecar pack --base old.sqsh --index old.index rootfs/ new.sqsh`,
		Args: func(cmd *cobra.Command, args []string) error {
			if f.upper != "" {
				return exactly("IMAGE")(cmd, args)
			}
			return exactly("SOURCE", "IMAGE")(cmd, args)
		},
		PreRunE: func(cmd *cobra.Command, _ []string) (err error) {
			if err := f.checkBase(); err != nil {
				return err
			}
			if f.base != "" && !cmd.Flags().Changed("compressor") {
				f.compressor = ""
			}
			if f.base != "" && !cmd.Flags().Changed("block-size") {
				f.blockSize = ""
			}
			opt, err = f.options()
			return err
		},
		RunE: work(func(cmd *cobra.Command, args []string) error {
			return pack(cmd.Context(), f, opt, args[0], args[len(args)-1])
		}),
	}
	fl := c.Flags()
	fl.StringVar(&f.compressor, "compressor", "gzip", "gzip, xz, zstd, lz4 or none")
	fl.IntVar(&f.level, "level", 0, "1 to 12 for gzip and lz4, 9 for xz, 22 for zstd; 0 is the compressor's default")
	fl.StringVar(&f.blockSize, "block-size", "128K", "4K to 1M, a power of two")
	fl.IntVar(&f.workers, "workers", 0, "parallel compressors; 0 follows the cgroup's processor quota")
	fl.StringVar(&f.excludeFile, "exclude-file", "", "file with one path or pattern to leave out per line")
	fl.BoolVar(&f.oneFileSystem, "one-file-system", false, "leave out what is mounted inside the directory SOURCE")
	fl.StringVar(&f.epoch, "epoch", "", "time of the image and latest time of its files, in seconds since 1970 (default $SOURCE_DATE_EPOCH)")
	fl.BoolVar(&f.json, "json", false, "print statistics as JSON")
	fl.StringVar(&f.base, "base", "", "image to take unchanged data over from")
	fl.StringVar(&f.index, "index", "", "with --base: index of the directory SOURCE")
	fl.StringVar(&f.upper, "upper", "", "with --base: upper directory of an overlay, instead of SOURCE")
	fl.StringVar(&f.work, "work", "", "with --upper: the overlay's work directory, if it was mounted with index=on")
	fl.StringVar(&f.layout, "layout", "auto", "with --base: auto, append or compact")
	return c
}

// checkBase refuses flags that only mean something with others.
func (f packFlags) checkBase() error {
	switch {
	case f.base == "" && (f.index != "" || f.upper != "" || f.layout != "auto"):
		return errors.New("--index, --upper and --layout need --base")
	case f.index != "" && f.upper != "":
		return errors.New("--index and --upper exclude each other: an overlay needs no index")
	case f.work != "" && f.upper == "":
		return errors.New("--work needs --upper")
	case f.upper != "" && f.oneFileSystem:
		return errors.New("--one-file-system is for directories")
	}
	_, err := squash.ParseLayout(f.layout)
	if err != nil {
		return fmt.Errorf("--layout: %w", err)
	}
	return nil
}

// options reads the flags; an empty compressor or block size is the base's.
func (f packFlags) options() (opt squash.Options, err error) {
	if f.compressor != "" {
		if opt.Compressor, err = squash.ParseCompressor(f.compressor); err != nil {
			return opt, fmt.Errorf("--compressor: %w", err)
		}
	}
	if f.blockSize != "" {
		if opt.BlockSize, err = squash.ParseBlockSize(f.blockSize); err != nil {
			return opt, fmt.Errorf("--block-size: %w", err)
		}
	}
	if f.workers < 0 {
		return opt, errors.New("--workers: must not be negative")
	}
	opt.Level, opt.Workers = f.level, f.workers
	if f.epoch == "" {
		opt.Epoch, err = config.SourceDateEpoch()
		return opt, err
	}
	n, err := strconv.ParseInt(f.epoch, 10, 64)
	if err != nil {
		return opt, fmt.Errorf("--epoch %q: must be seconds since 1970", f.epoch)
	}
	t := time.Unix(n, 0).UTC()
	opt.Epoch = &t
	return opt, nil
}

func pack(ctx context.Context, f packFlags, opt squash.Options, source, image string) error {
	if f.base != "" {
		base, done, err := openImage(f.base)
		if err != nil {
			return err
		}
		defer done()
		layout, err := squash.ParseLayout(f.layout)
		if err != nil {
			return err
		}
		opt.Base = &squash.Base{Image: base, Layout: layout}
	}
	src, done, err := openSource(ctx, f, opt.Base, source, image)
	if err != nil {
		return err
	}
	defer done()
	bar := progress.New(stderr, "packing", 0)
	opt.Progress = bar.Update
	stats, err := squash.PackFile(ctx, src, image, opt)
	if err != nil {
		return err
	}
	bar.Finish()
	if f.json {
		return printJSON(stats)
	}
	for _, w := range stats.Warnings {
		fmt.Fprintln(stderr, "sidecar:", w)
	}
	fmt.Printf("%s: %d inodes, %d bytes of files in %d bytes, %d duplicate files stored once\n",
		image, stats.Inodes, stats.BytesIn, stats.BytesOut, stats.Duplicates)
	switch b := stats.Base; {
	case b == nil:
	case b.Refused != "":
		fmt.Printf("nothing was taken over from %s: %s\n", f.base, b.Refused)
	default:
		fmt.Printf("%s: %d bytes, of %d files, were taken over from %s; %d of them are dead\n", b.Layout, b.CopiedBytes, b.Files, f.base, b.DeadBytes)
	}
	return nil
}

// openSource opens a directory, an archive, standard input, or an overlay.
func openSource(ctx context.Context, f packFlags, base *squash.Base, source, image string) (src squash.Source, done func(), err error) {
	exclude, err := squash.ReadExcludes(f.excludeFile)
	if err != nil {
		return nil, nil, err
	}
	if f.upper != "" {
		src, err = squash.LayersSource(base.Image, f.upper, squash.LayersOptions{Work: f.work, Exclude: exclude, SpoolDir: filepath.Dir(image)})
		return src, func() { src.Close() }, err
	}
	archive := os.Stdin
	if source != "-" {
		info, err := os.Stat(source)
		if err != nil {
			return nil, nil, err
		}
		if info.IsDir() {
			if inside(image, source) {
				return nil, nil, fmt.Errorf("pack %s: %s lies inside it and would pack itself; write the image somewhere else", source, image)
			}
			opt := squash.DirOptions{OneFileSystem: f.oneFileSystem, Exclude: exclude, SpoolDir: filepath.Dir(image)}
			if f.index != "" {
				if opt.Index, err = squash.OpenIndex(f.index, base.Image); err != nil {
					return nil, nil, err
				}
			}
			src, err := squash.DirSource(source, opt)
			if err != nil {
				return nil, nil, err
			}
			return src, func() { src.Close() }, nil
		}
		if archive, err = os.Open(source); err != nil {
			return nil, nil, err
		}
	}
	switch {
	case f.oneFileSystem:
		err = errors.New("--one-file-system is for directories")
	case f.index != "":
		err = errors.New("--index is for directories")
	default:
		src, err = squash.TarSource(ctx, archive, squash.TarOptions{SpoolDir: filepath.Dir(image), Exclude: exclude})
	}
	if err != nil {
		archive.Close()
		return nil, nil, fmt.Errorf("pack %s: %w", source, err)
	}
	return src, func() {
		src.Close()
		archive.Close()
	}, nil
}

// inside reports whether a file to be made would lie below dir.
func inside(name, dir string) bool {
	parent, err1 := filepath.EvalSymlinks(filepath.Dir(name))
	dir, err2 := filepath.EvalSymlinks(dir)
	if err1 != nil || err2 != nil {
		return false
	}
	parent, err1 = filepath.Abs(parent)
	dir, err2 = filepath.Abs(dir)
	rel, err3 := filepath.Rel(dir, parent)
	return errors.Join(err1, err2, err3) == nil && filepath.IsLocal(rel)
}
