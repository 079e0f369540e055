// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/cgroup"
)

// synthetic is a tree of files of a few hundred bytes, a thousand in each
// directory, that exists nowhere: what packing it takes is the packer's own.
type synthetic int

func (n synthetic) Walk(ctx context.Context, fn func(*squash.Entry) error) error {
	if err := fn(&squash.Entry{Path: ".", Mode: unix.S_IFDIR | 0o755}); err != nil {
		return err
	}
	for i := range int(n) {
		dir := fmt.Sprintf("d%06d", i/1000)
		if i%1000 == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(&squash.Entry{Path: dir, Mode: unix.S_IFDIR | 0o755}); err != nil {
				return err
			}
		}
		e := squash.Entry{Path: fmt.Sprintf("%s/file-%03d", dir, i%1000), Mode: unix.S_IFREG | 0o644, Mtime: int64(1e9 + i),
			Size: int64(100 + i%400), Content: syntheticFile(i)}
		if err := fn(&e); err != nil {
			return err
		}
	}
	return nil
}

func (synthetic) Close() error { return nil }

// KeepContent implements squash.ContentKeeper.
func (synthetic) KeepContent(dst []byte, c squash.Content) []byte {
	return binary.AppendUvarint(dst, uint64(c.(syntheticFile)))
}

// KeptContent implements squash.ContentKeeper.
func (synthetic) KeptContent(_ string, _ int64, b []byte) (squash.Content, []byte) {
	v, n := binary.Uvarint(b)
	return syntheticFile(v), b[n:]
}

type syntheticFile uint64

func (f syntheticFile) Open() (squash.ContentReader, error)   { return f, nil }
func (f syntheticFile) NextData(off int64) (int64, error)     { return off, nil }
func (f syntheticFile) Close() error                          { return nil }
func (f syntheticFile) ReadAt(p []byte, _ int64) (int, error) { return copy(p, f.text(len(p))), nil }

func (f syntheticFile) text(n int) []byte {
	b := make([]byte, 0, n+32)
	for x := uint64(f)*0x9e3779b97f4a7c15 + 1; len(b) < n; x = x*6364136223846793005 + 1442695040888963407 {
		b = append(b, "setting = "...)
		b = binary.LittleEndian.AppendUint16(b, uint16(x>>48))
	}
	return b[:n]
}

// packSynthetic packs n files, for a process of its own: as sidecar does, with
// as many workers as a large node may have, and the largest blocks.
func packSynthetic(ctx context.Context, n int) error {
	debug.SetGCPercent(25)
	out, err := os.CreateTemp("", "ims-buildenv-bench-*.sqsh")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	_, err = squash.PackChecked(ctx, synthetic(n), out, squash.Options{Workers: 8, BlockSize: squash.MaxBlockSize})
	return err
}

// scalingMemory is what a container may have whose pod was given little.
const scalingMemory = 256 << 20

// scaling prints what packing takes for trees of different sizes, in a control
// group with little memory.
func scaling(ctx context.Context, _, _, _ string, w io.Writer) error {
	self, err := filepath.Abs(os.Args[0])
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "pack and check in %d MiB, small files, gzip, 8 workers, blocks of 1 MiB\twall\tCPU\tpeak MiB\tµs per file\t\n", scalingMemory>>20)
	for _, n := range []int{1_000, 10_000, 100_000, 1_000_000, 10_000_000} {
		if err := scalingPoint(ctx, self, n, table); err != nil {
			return fmt.Errorf("%d files: %w", n, err)
		}
		table.Flush()
	}
	return nil
}

func scalingPoint(ctx context.Context, self string, n int, table io.Writer) (err error) {
	group, err := cgroup.New(cgroup.Limits{Memory: scalingMemory})
	if err != nil {
		return fmt.Errorf("make a memory control group (needs root): %w", err)
	}
	defer func() { err = errors.Join(err, group.Remove()) }()
	cmd := group.Command(ctx, self, "-synthetic", strconv.Itoa(n))
	cmd.Stderr = os.Stderr
	resetPeak()
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return err
	}
	wall := time.Since(start)
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	peak := int64(0)
	if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		peak = usage.Maxrss >> 10
	}
	fmt.Fprintf(table, "%d\t%.2fs\t%.2fs\t%d\t%.1f\t\n", n, wall.Seconds(), cpu.Seconds(), peak, float64(cpu.Microseconds())/float64(n))
	return nil
}
