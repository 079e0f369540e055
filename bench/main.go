// SPDX-License-Identifier: Apache-2.0

// Command bench measures our programs side by side with the tools a user would
// pick instead: the same machine, the same data, the same run, alternating, and
// prints medians and ratios. It refuses to compare against a tool that is not
// there, and it does not judge: the ratios are what they are.
//
//	go run ./bench -bin bin -image build/base/bookworm.squashfs [-n 5] [-only pack]
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
)

func main() {
	bin := flag.String("bin", "bin", "directory of sshd and sidecar")
	image := flag.String("image", "build/base/bookworm.squashfs", "image whose tree is packed and unpacked")
	n := flag.Int("n", 5, "runs of each side")
	only := flag.String("only", "", "run only comparisons whose name contains this")
	files := flag.Int("synthetic", 0, "only pack so many small files that exist nowhere")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *files > 0 {
		if err := packSynthetic(ctx, *files); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx, *bin, *image, *n, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin, image string, n int, only string) error {
	work, err := os.MkdirTemp("", "ims-buildenv-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	var all []comparison
	for _, topic := range []func(ctx context.Context, bin, image, work string) ([]comparison, func(), error){squashfs, delta, ssh} {
		list, done, err := topic(ctx, bin, image, work)
		if err != nil {
			return err
		}
		defer done()
		all = append(all, list...)
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "comparison\tours\ttheirs\tfaster\tour CPU\ttheir CPU\tour MiB\ttheir MiB\tsize\t\n")
	for _, c := range all {
		if !strings.Contains(c.name, only) {
			continue
		}
		ours, theirs, err := c.measure(ctx, n)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		size := ""
		if theirs.bytes > 0 {
			size = fmt.Sprintf("%.4f", float64(ours.bytes)/float64(theirs.bytes))
		}
		fmt.Fprintf(table, "%s\t%.2fs\t%.2fs\t%.1fx\t%.2fs\t%.2fs\t%d\t%d\t%s\t\n", c.name,
			ours.wall, theirs.wall, theirs.wall/ours.wall, ours.cpu, theirs.cpu, ours.rss>>20, theirs.rss>>20, size)
		table.Flush()
	}
	if strings.Contains("growth", only) {
		fmt.Println()
		if err := growth(ctx, bin, image, work, os.Stdout); err != nil {
			return err
		}
	}
	if strings.Contains("scaling", only) {
		fmt.Println()
		return scaling(ctx, os.Stdout)
	}
	return nil
}
