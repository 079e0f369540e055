// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

func newUnpack() *cobra.Command {
	var index string
	c := &cobra.Command{
		Use:   "unpack IMAGE DIR",
		Short: "Unpack a SquashFS image into an empty or new directory",
		Long: `unpack restores owners, modes, times, extended attributes, hard links, devices
and holes. Nothing outside DIR is written, whatever the image holds. With an
--index, "pack --base IMAGE --index" later reads and compresses only what changed.`,
		Example: `  sidecar unpack image.sqsh rootfs/
  sidecar unpack --index image.index image.sqsh rootfs/`,
		Args: exactly("IMAGE", "DIR"),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			// DIR may not exist yet, and then neither does a directory below it.
			if _, err := os.Stat(filepath.Dir(index)); index != "" && (err != nil || inside(index, args[1])) {
				if err != nil {
					return fmt.Errorf("--index: %w", err)
				}
				return fmt.Errorf("the index %s lies inside %s and would change it; write it somewhere else", index, args[1])
			}
			tuneUnpacking()
			return withImage(args[0], func(img *squash.Image) error {
				bar := progress.New(stderr, "unpacking", 0)
				stats, err := squash.Unpack(cmd.Context(), img, args[1], squash.UnpackOptions{
					Progress: bar.Update, Log: config.NewLogger(stderr, config.LogText, 0),
				})
				if err != nil {
					return err
				}
				bar.Finish()
				if index != "" {
					if err := squash.WriteIndex(cmd.Context(), img, args[1], index); err != nil {
						return err
					}
				}
				fmt.Printf("%s: %d files, %d directories, %d links, %d bytes\n", args[1], stats.Files, stats.Dirs, stats.Symlinks, stats.Bytes)
				return nil
			})
		}),
	}
	c.Flags().StringVar(&index, "index", "", "file to write an index of DIR to, outside DIR")
	return c
}

// tuneUnpacking sets Go's runtime up for workers that are in C and in system calls nearly all the time. Where each of Go's
// processors has such a worker, the scheduler looks every 20 µs for one to take away and hand to another thread; where
// one is idle, it lets them be. So there is one for each worker, one for who feeds them, and one more. Unpacking keeps
// little, so that the collector need not be as eager as packing wants it.
func tuneUnpacking() {
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 3)
	debug.SetGCPercent(100)
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

// openImage opens an image until done is called.
func openImage(name string) (img *squash.Image, done func(), err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = errors.New("a directory, not a SquashFS image")
	}
	if err == nil {
		img, err = squash.Open(f, info.Size())
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return img, func() { f.Close() }, nil
}

func withImage(name string, do func(*squash.Image) error) error {
	img, done, err := openImage(name)
	if err != nil {
		return err
	}
	defer done()
	if err := do(img); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
