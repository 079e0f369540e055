// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// delta compares packing after a small change with mksquashfs, which packs
// everything: three packages are installed in the image's tree and the initrd of
// the kernel that boots is made again, as a user would do it.
func delta(ctx context.Context, bin, image, work string) ([]comparison, func(), error) {
	d := deltaBench{sidecar: filepath.Join(bin, "sidecar"), image: image, work: filepath.Join(work, "delta")}
	if err := os.Mkdir(d.work, 0o700); err != nil {
		return nil, nil, err
	}
	same, err := d.tree(ctx, "same", "true")
	if err != nil {
		return nil, nil, err
	}
	changed, err := d.tree(ctx, "changed", `
cp /etc/resolv.conf etc/resolv.conf
chroot . apt-get -qq update
DEBIAN_FRONTEND=noninteractive chroot . apt-get -qq install -y --no-install-recommends jq tree bc
chroot . update-initramfs -u -k "$(readlink boot/vmlinuz | cut -d- -f2-)"
rm -rf etc/resolv.conf var/lib/apt/lists/* var/cache/apt/*`)
	if err != nil {
		return nil, nil, err
	}
	return []comparison{
		d.pack("without a change", same, "auto"),
		d.pack("three packages and an initrd, append", changed, "append"),
		d.pack("three packages and an initrd, compact", changed, "compact"),
	}, func() {}, nil
}

type deltaBench struct{ sidecar, image, work string }

// tree unpacks the image with an index, and changes it by a shell script.
func (d *deltaBench) tree(ctx context.Context, name, script string) (string, error) {
	dir := filepath.Join(d.work, name)
	for _, argv := range [][]string{
		{d.sidecar, "unpack", "--index", dir + ".index", d.image, dir},
		{"bash", "-euc", "cd " + dir + "\n" + script},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv[:2], " "), err, out)
		}
	}
	return dir, nil
}

func (d *deltaBench) pack(name, tree, layout string) comparison {
	ours, theirs := filepath.Join(d.work, "ours.sqsh"), filepath.Join(d.work, "theirs.sqsh")
	return comparison{
		name: "delta: " + name + " vs mksquashfs",
		ours: side{argv: []string{d.sidecar, "pack", "--base", d.image, "--index", tree + ".index", "--layout", layout, tree, ours},
			output: ours},
		theirs: side{argv: []string{"mksquashfs", tree, theirs, "-noappend", "-no-progress", "-quiet"}, output: theirs},
		goals:  goals{speed: 40},
	}.once()
}

// growth prints how the time of packing grows: with the share of files that
// changed, beside packing everything, and with the image at a fixed change. Columns
// are separated by tabs; the plot is drawn of them.
func growth(ctx context.Context, bin, image, work, plotFile string, w io.Writer) error {
	d := deltaBench{sidecar: filepath.Join(bin, "sidecar"), image: image, work: filepath.Join(work, "growth")}
	if err := os.Mkdir(d.work, 0o700); err != nil {
		return err
	}
	delta, full := series{name: "with the old image"}, series{name: "everything anew"}
	fmt.Fprintf(w, "changed files, %%\tseconds\tCPU seconds\timage larger by MiB\tseconds, everything anew\n")
	tree, err := d.tree(ctx, "share", "true")
	if err != nil {
		return err
	}
	for _, share := range []int{0, 1, 10, 50, 100} {
		// Every hundredth file, then more of each hundred: a byte behind its end.
		script := fmt.Sprintf(`cd %s; find . -type f -print0 | awk -v RS='\0' -v ORS='\0' 'NR %% 100 < %d' | while IFS= read -r -d '' f; do printf x >> "$f"; done`, tree, share)
		if out, err := exec.CommandContext(ctx, "bash", "-euc", script).CombinedOutput(); err != nil {
			return fmt.Errorf("change %d %% of the files: %w\n%s", share, err, out)
		}
		f, larger, err := d.timePack(ctx, image, tree)
		if err != nil {
			return err
		}
		anew, err := d.timePackings(ctx, tree)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%d\t%.2f\t%.2f\t%d\t%.2f\n", share, f.wall, f.cpu, larger>>20, anew.wall)
		delta.points, full.points = append(delta.points, point{float64(share), f.wall}), append(full.points, point{float64(share), anew.wall})
	}
	size := series{name: "16 MiB of it new"}
	fmt.Fprintf(w, "\nimage, MiB\tseconds\tCPU seconds\timage larger by MiB (one new file of 16 MiB)\n")
	for _, mib := range []int{64, 256, 1024, 4096} {
		if err := ctx.Err(); err != nil {
			return err
		}
		base := filepath.Join(d.work, "base.sqsh")
		script := fmt.Sprintf(`cd %s; rm -rf src big*; mkdir src
for i in $(seq %d); do head -c 1048576 /dev/urandom > src/$i; done
%s pack --compressor none src base.sqsh; rm -rf src
%s unpack --index big.index base.sqsh big; head -c 16777216 /dev/urandom > big/new`, d.work, mib, d.sidecar, d.sidecar)
		if out, err := exec.CommandContext(ctx, "bash", "-euc", script).CombinedOutput(); err != nil {
			return fmt.Errorf("make an image of %d MiB: %w\n%s", mib, err, out)
		}
		f, larger, err := d.timePack(ctx, base, filepath.Join(d.work, "big"))
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%d\t%.2f\t%.2f\t%d\n", mib, f.wall, f.cpu, larger>>20)
		size.points = append(size.points, point{float64(mib), f.wall})
	}
	if plotFile == "" {
		return nil
	}
	return os.WriteFile(plotFile, plot(
		chart{"Packing a Debian root", "files changed, %", "seconds", []series{full, delta}},
		chart{"Packing a larger image", "image, MiB", "seconds", []series{size}}), 0o644)
}

// timePack packs three times and returns the medians, and by how many bytes the
// image is larger than the base.
func (d *deltaBench) timePack(ctx context.Context, base, tree string) (figures, int64, error) {
	f, err := d.timePackings(ctx, tree, "--base", base, "--index", tree+".index")
	if err != nil {
		return figures{}, 0, err
	}
	info, err := os.Stat(base)
	if err != nil {
		return figures{}, 0, err
	}
	return f, f.bytes - info.Size(), nil
}

func (d *deltaBench) timePackings(ctx context.Context, tree string, options ...string) (figures, error) {
	out := filepath.Join(d.work, "new.sqsh")
	s := side{argv: append(append([]string{d.sidecar, "pack"}, options...), tree, out), output: out}
	var runs []figures
	for range 3 {
		f, err := s.run(ctx)
		if err != nil {
			return figures{}, err
		}
		runs = append(runs, f)
	}
	return median(runs), nil
}
