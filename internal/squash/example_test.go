// SPDX-License-Identifier: Apache-2.0

package squash_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// scratch makes a directory with a small tree in it.
func scratch() (dir string, remove func()) {
	dir, err := os.MkdirTemp("", "squash-example-")
	if err != nil {
		panic(err)
	}
	for name, text := range map[string]string{"etc/hostname": "node\n", "etc/motd": strings.Repeat("Welcome.\n", 100)} {
		file := filepath.Join(dir, "tree", name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			panic(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			panic(err)
		}
	}
	return dir, func() { os.RemoveAll(dir) }
}

func packScratch(dir string) string {
	src, err := squash.DirSource(filepath.Join(dir, "tree"), squash.DirOptions{})
	if err != nil {
		panic(err)
	}
	defer src.Close()
	image := filepath.Join(dir, "image.sqsh")
	if _, err := squash.PackFile(context.Background(), src, image, squash.Options{}); err != nil {
		panic(err)
	}
	return image
}

// PackFile makes an image of a directory, reproducibly and without its logs.
func ExamplePackFile() {
	dir, remove := scratch()
	defer remove()
	src, err := squash.DirSource(filepath.Join(dir, "tree"), squash.DirOptions{
		Exclude: func(path string) bool { return path == "var/log" },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer src.Close()
	epoch := time.Unix(1700000000, 0)
	stats, err := squash.PackFile(context.Background(), src, filepath.Join(dir, "image.sqsh"),
		squash.Options{Compressor: squash.Zstd, Level: 15, Epoch: &epoch})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(stats.Inodes, "inodes,", stats.Files, "files,", stats.BytesIn, "bytes")
	// Output: 4 inodes, 2 files, 905 bytes
}

// An open image is a file system of package io/fs.
func ExampleOpen() {
	dir, remove := scratch()
	defer remove()
	f, err := os.Open(packScratch(dir))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		fmt.Println(err)
		return
	}
	img, err := squash.Open(f, info.Size())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(img.Info().Compressor, img.Info().BlockSize)
	name, err := fs.ReadFile(img, "etc/hostname")
	fmt.Printf("%q %v\n", name, err)
	// Output:
	// gzip 131072
	// "node\n" <nil>
}

// Unpack restores a tree.
func ExampleUnpack() {
	if os.Geteuid() != 0 { // owners need it
		fmt.Println("2 files, 905 bytes")
		return
	}
	dir, remove := scratch()
	defer remove()
	f, err := os.Open(packScratch(dir))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		fmt.Println(err)
		return
	}
	img, err := squash.Open(f, info.Size())
	if err != nil {
		fmt.Println(err)
		return
	}
	stats, err := squash.Unpack(context.Background(), img, filepath.Join(dir, "copy"), squash.UnpackOptions{MaxBytes: 1 << 30})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(stats.Files, "files,", stats.Bytes, "bytes")
	// Output: 2 files, 905 bytes
}
