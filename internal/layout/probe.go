// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Probe finds out whether Mount would work, and whether the volume is fit to hold
// an upper layer, by mounting the image with a layer of its own, which is removed
// again, and changing things. The error says what does not work.
func Probe(parent, root string) (err error) {
	dir := filepath.Join(parent, probeDir)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(upper, 0o755), os.Mkdir(work, 0o700)); err != nil {
		return err
	}
	m, err := mountLayers(parent, filepath.Base(root), filepath.Join(probeDir, "upper"), filepath.Join(probeDir, "work"))
	if err != nil {
		return err
	}
	defer m.Close()
	// The kernel mounts without what a file system cannot do, and says so in its log only.
	if _, err := os.Stat(filepath.Join(work, "index")); err != nil {
		return fmt.Errorf("the names of a file would come apart when it is changed (the image has no export table, or the volume no extended attributes or file handles): %w", err)
	}
	tree, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", m.Fd()))
	if err != nil {
		return fmt.Errorf("open the overlay: %w", err)
	}
	defer tree.Close()
	if err := change(tree); err != nil {
		return fmt.Errorf("write to the overlay: %w", err)
	}
	return removeOne(tree, upper)
}

// change makes a file, replaces it by another, and removes that.
func change(tree *os.Root) error {
	const a, b = ".ims-probe-a", ".ims-probe-b"
	return errors.Join(
		tree.WriteFile(a, []byte("a"), 0o600), tree.WriteFile(b, []byte("b"), 0o600),
		tree.Rename(a, b), tree.Mkdir(a, 0o700), tree.Remove(a), tree.Remove(b),
	)
}

// removeOne removes something of the image, which must leave a whiteout.
func removeOne(tree *os.Root, upper string) error {
	name := ""
	err := fs.WalkDir(tree.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name = path
		return fs.SkipAll
	})
	if err != nil || name == "" {
		return err
	}
	if err := tree.Remove(name); err != nil {
		return fmt.Errorf("remove /%s from the overlay: %w", name, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(upper, name), &st); err != nil {
		return fmt.Errorf("the volume does not keep that a file was removed: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		return errors.New("the volume does not keep that a file was removed")
	}
	return nil
}
