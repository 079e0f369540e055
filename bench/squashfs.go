// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// manyFiles is how many files the tree of small files has.
const manyFiles = 200_000

// squashfs compares packing with mksquashfs and unpacking with unsquashfs and
// cp -a, on the tree of image and on one of small files. Sources lie on disk,
// in the page cache; trees are unpacked to a tmpfs, because what a disk's file
// system does after the last tree was removed differs from run to run.
func squashfs(ctx context.Context, bin, image, work string) ([]comparison, func(), error) {
	s := squashBench{sidecar: filepath.Join(bin, "sidecar"), work: work, tree: filepath.Join(work, "tree"), small: filepath.Join(work, "small")}
	if err := s.prepare(ctx, image); err != nil {
		return nil, nil, err
	}
	tmpfs := filepath.Join(work, "tmpfs")
	if err := os.Mkdir(tmpfs, 0o700); err != nil {
		return nil, nil, err
	}
	if err := unix.Mount("none", tmpfs, "tmpfs", 0, "mode=0700"); err != nil {
		return nil, nil, fmt.Errorf("mount a tmpfs to unpack to (needs root): %w", err)
	}
	s.out = filepath.Join(tmpfs, "out")
	return s.comparisons(), func() { unix.Unmount(tmpfs, unix.MNT_DETACH) }, nil
}

type squashBench struct{ sidecar, work, tree, small, out string }

// prepare makes the trees.
func (s *squashBench) prepare(ctx context.Context, image string) error {
	if out, err := exec.CommandContext(ctx, s.sidecar, "unpack", image, s.tree).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s: %w\n%s", image, err, out)
	}
	if err := s.makeSmall(); err != nil {
		return err
	}
	return ctx.Err()
}

func (s *squashBench) makeSmall() error {
	text, err := corpus(s.tree)
	if err != nil {
		return err
	}
	for i := range manyFiles {
		dir := filepath.Join(s.small, fmt.Sprintf("%03d", i/1000))
		if i%1000 == 0 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		n := 100 + i*7919%2000
		at := i * 104729 % (len(text) - n)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%d", i)), text[at:at+n], 0o644); err != nil {
			return err
		}
	}
	return nil
}

// corpus is what small files are cut from: some of those in the large tree.
func corpus(tree string) ([]byte, error) {
	const enough = 16 << 20
	var text []byte
	err := filepath.WalkDir(filepath.Join(tree, "usr"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err != nil || info.Size() > 32<<10 {
			return err
		}
		b, err := os.ReadFile(p)
		if text = append(text, b...); len(text) > enough {
			return fs.SkipAll
		}
		return err
	})
	if err == nil && len(text) < 1<<20 {
		err = errors.New("the image's tree is too small to make small files from")
	}
	return text, err
}

func (s *squashBench) comparisons() []comparison {
	const quarter = 0.25 // of mksquashfs's memory
	list := []comparison{
		s.pack("gzip, defaults", s.tree, goals{12, quarter, 0}, "gzip", 0, "gzip").once(),
		s.pack("gzip, mksquashfs at 6", s.tree, goals{0, quarter, 0}, "gzip", 0, "gzip", "-Xcompression-level", "6"),
		s.pack("zstd 3", s.tree, goals{1.1, quarter, 1.005}, "zstd", 3, "zstd", "-Xcompression-level", "3"),
		s.pack("zstd 9", s.tree, goals{1.1, quarter, 1.005}, "zstd", 9, "zstd", "-Xcompression-level", "9"),
		s.pack("zstd 15", s.tree, goals{1.1, quarter, 1.005}, "zstd", 15, "zstd", "-Xcompression-level", "15").once(),
		s.pack("lz4", s.tree, goals{1, quarter, 1.01}, "lz4", 0, "lz4"),
		s.pack("lz4 -Xhc", s.tree, goals{1, quarter, 1.01}, "lz4", 12, "lz4", "-Xhc"),
		s.pack("xz", s.tree, goals{1, quarter, 1.01}, "xz", 0, "xz").once(),
		s.pack("200,000 small files, gzip", s.small, goals{0, quarter, 0}, "gzip", 0, "gzip"),
		s.pack("200,000 small files, zstd 3", s.small, goals{0, quarter, 0}, "zstd", 3, "zstd", "-Xcompression-level", "3"),
	}
	for _, c := range []string{"gzip", "zstd", "xz"} {
		list = append(list, s.unpack(c, s.tree))
	}
	list = append(list, s.unpack("gzip", s.small))
	for _, c := range []string{"gzip", "zstd", "xz"} {
		vs := s.unpack(c, s.tree)
		vs.name = "unpack " + c + " vs cp -a"
		vs.theirs.argv = []string{"cp", "-a", s.tree, s.out}
		vs.goals = goals{speed: 1 / 1.5}
		if c == "xz" {
			vs.goals = goals{} // its decompression alone takes longer
		}
		list = append(list, vs)
	}
	return list
}

// pack compares packing; argv is what mksquashfs needs behind -comp.
func (s *squashBench) pack(name, tree string, g goals, compressor string, level int, argv ...string) comparison {
	ours, theirs := filepath.Join(s.work, "ours.sqsh"), filepath.Join(s.work, "theirs.sqsh")
	return comparison{
		name:  "pack " + name + " vs mksquashfs",
		goals: g,
		ours: side{argv: []string{s.sidecar, "pack", "--compressor", compressor, "--level", strconv.Itoa(level), tree, ours},
			output: ours},
		theirs: side{argv: append([]string{"mksquashfs", tree, theirs, "-noappend", "-no-progress", "-quiet", "-comp"}, argv...),
			output: theirs},
	}
}

// unpack compares unpacking an image of ours, made when it is first needed.
func (s *squashBench) unpack(compressor, tree string) comparison {
	image := filepath.Join(s.work, filepath.Base(tree)+"."+compressor+".sqsh")
	before := func() error {
		if _, err := os.Stat(image); err != nil {
			argv := []string{"pack", "--compressor", compressor, tree, image}
			if compressor == "xz" {
				argv = append(argv, "--level", "1") // the format, not the effort, is what counts here
			}
			if out, err := exec.Command(s.sidecar, argv...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
		}
		return os.RemoveAll(s.out)
	}
	name := compressor
	if tree == s.small {
		name += ", 200,000 small files"
	}
	return comparison{
		name:   "unpack " + name + " vs unsquashfs",
		goals:  goals{speed: 1.3},
		ours:   side{argv: []string{s.sidecar, "unpack", image, s.out}, before: before},
		theirs: side{argv: []string{"unsquashfs", "-no-progress", "-quiet", "-d", s.out, image}, before: before},
	}
}
