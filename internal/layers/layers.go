// SPDX-License-Identifier: Apache-2.0

// Package layers is the image root of a job for the sidecar, which edits and
// reads it in a few places (certificates, resolv.conf, /image, /tmp, flags, boot
// files), in either of the layouts of package layout.
//
// An unpacked root is edited where it lies. Of a layered one the sidecar sees the
// image and the upper layer, and it may mount nothing. So what an edit touches is
// brought up first: copied from the image to the upper layer with all that belongs
// to it, each directory and link on the way included. Then package imageroot works
// in the upper layer as if it were the root. At last the edit is settled: what is
// again as in the image leaves the upper layer, what was removed gets a whiteout.
// Whoever mounts the two sees what a direct edit would have made, times included,
// and an edit that changes nothing leaves nothing.
//
// Names are resolved in the merged view, inside the root, as imageroot does it.
// What is brought up is made beside the upper layer and moved, whole, to its
// place: an interrupted edit leaves copies of what the image holds, which change
// nothing, and never half a file.
//
// It refuses to work while the layers are mounted, which the caller has to know;
// overlayfs would not notice the changes. The attributes that takes more than a
// container's default capabilities to set (security.selinux, trusted.*) make the
// edit of a file that has them fail.
package layers

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// Root is an open image root of one or the other layout.
type Root struct {
	dir *imageroot.Root // unpacked: the root; layered: the upper layer

	// Of a layered root.
	file    *os.File
	base    *squash.Image // nil: unpacked
	work    string        // overlayfs's own directory
	scratch string        // beside the upper layer
}

// OpenUnpacked opens the directory root.
func OpenUnpacked(root string) (*Root, error) {
	dir, err := imageroot.Open(root)
	return &Root{dir: dir}, err
}

// OpenLayered opens the layered root on the volume parent.
func OpenLayered(parent string) (*Root, error) {
	dir, err := imageroot.Open(filepath.Join(parent, layout.Upper))
	if err != nil {
		return nil, err
	}
	file, err := layout.Open(parent, layout.Image)
	if err != nil {
		dir.Close()
		return nil, err
	}
	r := &Root{dir: dir, file: file, work: filepath.Join(parent, layout.Work), scratch: filepath.Join(parent, layout.Edit)}
	info, err := file.Stat()
	if err == nil {
		r.base, err = squash.Open(file, info.Size())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image of the layered root: %w", err), r.Close())
	}
	return r, nil
}

// Close releases the root.
func (r *Root) Close() error {
	err := r.dir.Close()
	if r.file != nil {
		err = errors.Join(err, r.file.Close())
	}
	return err
}

// FDPath returns a path, valid until Close, to the directory that was opened: the
// root, or the upper layer.
func (r *Root) FDPath() string { return r.dir.FDPath() }

// Name returns the path of that directory as it was opened.
func (r *Root) Name() string { return r.dir.Name() }

// Base returns the image below a layered root, nil for an unpacked one. It ends
// with the root.
func (r *Root) Base() *squash.Image { return r.base }

// name is a path that an edit touches. Directories and links on the way are
// followed.
type name struct {
	path   string
	follow bool // a link at the end, too
	tree   bool // all below it, links there not followed
	keep   bool // what was brought up stays there
}

// InstallCA is imageroot's.
func (r *Root) InstallCA(srcDir string) error {
	return r.edit(func() error { return r.dir.InstallCA(srcDir) }, name{path: "etc/cray/ca", follow: true, tree: true})
}

var resolvConf = name{path: "etc/resolv.conf", tree: true}

// SwapResolvConf is imageroot's.
func (r *Root) SwapResolvConf(containerFile, backupFile string) error {
	return r.edit(func() error { return r.dir.SwapResolvConf(containerFile, backupFile) }, resolvConf)
}

// RestoreResolvConf is imageroot's.
func (r *Root) RestoreResolvConf(backupFile string) (kept bool, err error) {
	err = r.edit(func() (err error) { kept, err = r.dir.RestoreResolvConf(backupFile); return err }, resolvConf)
	return kept, err
}

// ProtectImageDir is imageroot's.
func (r *Root) ProtectImageDir() error {
	return r.edit(r.dir.ProtectImageDir, name{path: "image", tree: true})
}

// EnsureTmp is imageroot's.
func (r *Root) EnsureTmp() (undo func() error, err error) {
	tmp := name{path: "tmp", follow: true}
	var remove func() error
	err = r.edit(func() (err error) { remove, err = r.dir.EnsureTmp(); return err }, tmp)
	return func() error { return r.edit(remove, tmp) }, err
}

// Flags runs do, which makes, removes or looks for these files, given as paths in
// the root. With keep the way to them stays in the upper layer, so that it can be
// gone there alone while the root is mounted.
func (r *Root) Flags(do func() error, keep bool, paths ...string) error {
	var names []name
	for _, p := range paths {
		names = append(names, name{path: path.Dir(p), follow: true, keep: keep}, name{path: p})
	}
	return r.edit(do, names...)
}

// FindBoot is imageroot's. The files stay open when their copies are gone.
func (r *Root) FindBoot(names imageroot.BootNames) (boot *imageroot.Boot, err error) {
	find := func() (err error) { boot, err = r.dir.FindBoot(names); return err }
	var files []name
	for _, f := range []string{names.Kernel, names.Initrd, names.Parameters} {
		if f != "" {
			files = append(files, name{path: path.Join(bootDir(names), f), follow: true})
		}
	}
	err = r.edit(find, files...)
	if err != nil && r.base != nil {
		// Once more with what lies beside them: the error tells of it.
		err = r.edit(find, append(files, name{path: bootDir(names), follow: true, tree: true})...)
	}
	return boot, err
}

// CheckBoot reports what FindBoot would complain of. It is for roots nobody has
// changed yet: what is fine in the image is not copied.
func (r *Root) CheckBoot(names imageroot.BootNames) error {
	if r.base != nil && r.inImage(names, names.Kernel) && r.inImage(names, names.Initrd) {
		return nil
	}
	boot, err := r.FindBoot(names)
	if err == nil {
		boot.Close()
	}
	return err
}

func (r *Root) inImage(names imageroot.BootNames, file string) bool {
	info, err := r.base.Stat(path.Join(bootDir(names), file))
	return err == nil && info.Mode().IsRegular() && info.Size() > 0
}

func bootDir(names imageroot.BootNames) string {
	if names.Dir == "" {
		return "boot"
	}
	return names.Dir
}
