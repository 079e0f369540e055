// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
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
directory. What it matches is left out with everything below it.`,
		Example: `  sidecar pack rootfs/ image.sqsh
  sidecar pack rootfs.tar.xz image.sqsh
  podman export box | sidecar pack - image.sqsh
  sidecar pack --compressor zstd --block-size 1M --epoch 0 rootfs/ image.sqsh
  sidecar pack --exclude-file site-excludes --one-file-system / /backup/host.sqsh`,
		Args: exactly("SOURCE", "IMAGE"),
		PreRunE: func(*cobra.Command, []string) (err error) {
			opt, err = f.options()
			return err
		},
		RunE: work(func(cmd *cobra.Command, args []string) error { return pack(cmd.Context(), f, opt, args[0], args[1]) }),
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
	return c
}

func (f packFlags) options() (opt squash.Options, err error) {
	if opt.Compressor, err = squash.ParseCompressor(f.compressor); err != nil {
		return opt, fmt.Errorf("--compressor: %w", err)
	}
	if opt.BlockSize, err = parseBlockSize(f.blockSize); err != nil {
		return opt, fmt.Errorf("--block-size: %w", err)
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

// parseBlockSize reads a size that SquashFS can have: a power of two from 4 KiB
// to 1 MiB, in bytes or with K or M.
func parseBlockSize(s string) (int, error) {
	digits := strings.TrimRight(strings.ToUpper(s), "KM")
	n, err := strconv.Atoi(digits)
	if n > 1<<20 {
		n = -1
	}
	switch strings.ToUpper(s)[len(digits):] {
	case "":
	case "K":
		n <<= 10
	case "M":
		n <<= 20
	default:
		n = -1
	}
	if err != nil || n < 4<<10 || n > 1<<20 || n&(n-1) != 0 {
		return 0, fmt.Errorf("%q is not a power of two from 4K to 1M", s)
	}
	return n, nil
}

func pack(ctx context.Context, f packFlags, opt squash.Options, source, image string) error {
	src, done, err := openSource(ctx, f, source, image)
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
	return nil
}

// openSource opens a directory, an archive, or standard input.
func openSource(ctx context.Context, f packFlags, source, image string) (src squash.Source, done func(), err error) {
	exclude, err := readExcludes(f.excludeFile)
	if err != nil {
		return nil, nil, err
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
			src, err := squash.DirSource(source, squash.DirOptions{OneFileSystem: f.oneFileSystem, Exclude: exclude})
			if err != nil {
				return nil, nil, err
			}
			return src, func() { src.Close() }, nil
		}
		if archive, err = os.Open(source); err != nil {
			return nil, nil, err
		}
	}
	if f.oneFileSystem {
		err = errors.New("--one-file-system is for directories")
	} else {
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

func newUnpack() *cobra.Command {
	return &cobra.Command{
		Use:   "unpack IMAGE DIR",
		Short: "Unpack a SquashFS image into an empty or new directory",
		Long: `unpack restores owners, modes, times, extended attributes, hard links, devices
and holes. Nothing outside DIR is written, whatever the image holds.`,
		Example: `  sidecar unpack image.sqsh rootfs/`,
		Args:    exactly("IMAGE", "DIR"),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			return withImage(args[0], func(img *squash.Image) error {
				bar := progress.New(stderr, "unpacking", 0)
				stats, err := squash.Unpack(cmd.Context(), img, args[1], squash.UnpackOptions{
					Progress: bar.Update, Log: config.NewLogger(stderr, 0),
				})
				if err != nil {
					return err
				}
				bar.Finish()
				fmt.Printf("%s: %d files, %d directories, %d links, %d bytes\n", args[1], stats.Files, stats.Dirs, stats.Symlinks, stats.Bytes)
				return nil
			})
		}),
	}
}

func newInspect() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "inspect IMAGE",
		Short:   "Show what a SquashFS image says of itself",
		Example: `  sidecar inspect --json image.sqsh | jq .compressor`,
		Args:    exactly("IMAGE"),
		RunE: work(func(_ *cobra.Command, args []string) error {
			return withImage(args[0], func(img *squash.Image) error {
				info := img.Info()
				library := squash.Implementations()[info.Compressor]
				if asJSON {
					return printJSON(struct {
						squash.Info
						Library string `json:"library,omitempty"`
					}{info, library})
				}
				w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
				fmt.Fprintf(w, "compressor\t%s", info.Compressor)
				if o := info.CompressorOptions; o != nil {
					fmt.Fprintf(w, " (%s)", o)
				}
				if library != "" {
					fmt.Fprintf(w, "\nread with\t%s", library)
				}
				fmt.Fprintf(w, "\nblock size\t%d\ncreated\t%s\nsize\t%d bytes\n", info.BlockSize, info.Created.Format(time.RFC3339), info.BytesUsed)
				fmt.Fprintf(w, "inodes\t%d\nfragment blocks\t%d\nuids and gids\t%d\nxattr sets\t%d\nflags\t%s\n", info.Inodes, info.Fragments, info.IDs, info.XattrIDs, strings.Join(info.Flags, " "))
				return w.Flush()
			})
		}),
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return c
}

func newVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Check a whole SquashFS image: every table, inode and byte",
		Long: `verify reads everything an image holds and reports the first thing that is
wrong. Exit code 0 means that nothing is.`,
		Example: `  sidecar verify image.sqsh`,
		Args:    exactly("IMAGE"),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			return withImage(args[0], func(img *squash.Image) error {
				if err := squash.Verify(cmd.Context(), img, false); err != nil {
					return err
				}
				fmt.Printf("%s: ok, %d inodes\n", args[0], img.Info().Inodes)
				return nil
			})
		}),
	}
}

func withImage(name string, do func(*squash.Image) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.IsDir() {
		return fmt.Errorf("%s: a directory, not a SquashFS image", name)
	}
	img, err := squash.Open(f, info.Size())
	if err == nil {
		err = do(img)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
