// SPDX-License-Identifier: Apache-2.0

// Command bench measures our programs side by side with the tools a user would
// pick instead: the same machine, the same data, the same run, alternating, and
// prints medians and ratios. It refuses to compare against a tool that is not
// there, and it marks the goals that a ratio misses.
//
//	go run ./bench -bin bin -image build/base/bookworm.squashfs [-n 5] [-topics squashfs,delta] [-only zstd]
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
)

func main() {
	b := bench{}
	flag.StringVar(&b.bin, "bin", "bin", "directory of sshd, sidecar and imslocal")
	flag.StringVar(&b.image, "image", "build/base/bookworm.squashfs", "image whose tree is packed and unpacked")
	flag.IntVar(&b.n, "n", 5, "runs of each side")
	flag.StringVar(&b.topics, "topics", "squashfs,prepare,publish,delta,ssh,readings,jobs,growth,scaling", "what to compare, separated by commas")
	flag.StringVar(&b.only, "only", "", "run only comparisons whose name contains this")
	flag.StringVar(&b.plot, "plot", "", "file for the plot of growth, as SVG")
	files := flag.Int("synthetic", 0, "only pack so many small files that exist nowhere")
	address := flag.String("execs", "", "only run 100 commands on one connection to this SSH server")
	key := flag.String("key", "", "key for -execs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if *files > 0 {
		err = packSynthetic(ctx, *files)
	} else if *address != "" {
		err = execMany(ctx, *address, *key, 100)
	} else {
		err = b.run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	bin, image, topics, only, plot string
	n                              int
}

func (b bench) run(ctx context.Context) error {
	work, err := os.MkdirTemp("", "ims-buildenv-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	if b.image, err = filepath.Abs(b.image); err != nil {
		return err
	}
	tables := map[string]func(ctx context.Context, bin, image, work string) ([]comparison, func(), error){
		"squashfs": squashfs, "prepare": prepare, "publish": publish, "delta": delta, "ssh": ssh,
	}
	reports := map[string]func(ctx context.Context, bin, image, work string, w io.Writer) error{
		"readings": readings, "scaling": scaling,
		"jobs": func(ctx context.Context, bin, image, work string, w io.Writer) error {
			return jobs(ctx, bin, image, work, b.only, w)
		},
		"growth": func(ctx context.Context, bin, image, work string, w io.Writer) error {
			return growth(ctx, bin, image, work, b.plot, w)
		},
	}
	for topic := range strings.SplitSeq(b.topics, ",") {
		if prepare, ok := tables[topic]; ok {
			err = b.table(ctx, prepare, work)
		} else if report, ok := reports[topic]; ok {
			err = report(ctx, b.bin, b.image, work, os.Stdout)
		} else {
			err = fmt.Errorf("there is no such topic")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", topic, err)
		}
		fmt.Println()
	}
	return nil
}

// table runs the comparisons of one topic.
func (b bench) table(ctx context.Context, prepare func(ctx context.Context, bin, image, work string) ([]comparison, func(), error), work string) error {
	list, done, err := prepare(ctx, b.bin, b.image, work)
	if err != nil {
		return err
	}
	defer done()
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "comparison\tours\ttheirs\tfaster\tgoal\tour CPU\ttheir CPU\tour MiB\ttheir MiB\tsize\t\n")
	for _, c := range list {
		if !strings.Contains(c.name, b.only) {
			continue
		}
		ours, theirs, err := c.measure(ctx, b.n)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		size := ""
		if theirs.bytes > 0 {
			size = fmt.Sprintf("%.4f", float64(ours.bytes)/float64(theirs.bytes))
		}
		goal := ""
		if c.goals.speed > 0 {
			goal = fmt.Sprintf("%.2gx", c.goals.speed)
		}
		if missed := c.goals.missed(ours, theirs); len(missed) > 0 {
			goal += " MISSED: " + strings.Join(missed, ", ")
		}
		fmt.Fprintf(table, "%s\t%.2fs\t%.2fs\t%.1fx\t%s\t%.2fs\t%.2fs\t%d\t%d\t%s\t\n", c.name,
			ours.wall, theirs.wall, theirs.wall/ours.wall, goal, ours.cpu, theirs.cpu, ours.rss>>20, theirs.rss>>20, size)
		table.Flush()
	}
	return nil
}
