// SPDX-License-Identifier: Apache-2.0

package imageroot

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// BootNames says which files of the image are its kernel, initrd and kernel
// parameters.
type BootNames struct {
	Dir        string // inside the root; empty means boot
	Kernel     string // inside Dir, as are the others
	Initrd     string
	Parameters string // optional: empty, or naming a file that does not exist
	Arch       string // for hints only
}

// BootFile is an opened, regular, non-empty file of the image.
type BootFile struct {
	*os.File
	Path     string // as asked for, seen from inside the root
	Resolved string // where its links led, likewise
	Size     int64  // bytes, when opened
}

// Boot is what FindBoot found. Parameters may be nil.
type Boot struct{ Kernel, Initrd, Parameters *BootFile }

// Close closes the files.
func (b *Boot) Close() {
	for _, f := range []*BootFile{b.Kernel, b.Initrd, b.Parameters} {
		if f != nil {
			f.Close()
		}
	}
}

// FindBoot opens the image's kernel and initrd, and its kernel parameters if
// they are named and present. Links are followed inside the root: the target's
// bytes are what boots, and a link that means to leave the root means the
// image's own file instead. Errors name what was tried, where it led, and what
// to do about it.
func (r *Root) FindBoot(names BootNames) (*Boot, error) {
	if names.Dir == "" {
		names.Dir = "boot"
	}
	var (
		b    Boot
		errs [3]error
	)
	b.Kernel, errs[0] = r.bootFile(names, "kernel", names.Kernel)
	b.Initrd, errs[1] = r.bootFile(names, "initrd", names.Initrd)
	if names.Parameters != "" {
		b.Parameters, errs[2] = r.bootFile(names, "parameters", names.Parameters)
		if IsAbsent(errs[2]) {
			errs[2] = nil
		}
	}
	if err := errors.Join(errs[:]...); err != nil {
		b.Close()
		return nil, err
	}
	return &b, nil
}

// bootRole is how IMS calls a boot file's name in a job.
var bootRole = map[string]string{
	"kernel":     "kernel_file_name",
	"initrd":     "initrd_file_name",
	"parameters": "kernel_parameters_file_name",
}

func (r *Root) bootFile(names BootNames, role, name string) (*BootFile, error) {
	if name == "" || !filepath.IsLocal(name) || filepath.Clean(name) != name || strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("%s: %q is not the name of a file inside %s: set %s on the job to a name without .. and leading slash",
			role, name, clean(names.Dir), bootRole[role])
	}
	full := clean(names.Dir + "/" + name)
	handle, err := r.Locate(full)
	if err != nil {
		return nil, fmt.Errorf("%s: %w%s: %s", role, err, r.trail(full), r.advice(names, role, full))
	}
	resolved := r.InRoot(handle)
	handle.Close()
	f, err := r.OpenRegular(full)
	if err != nil {
		return nil, fmt.Errorf("%s: %w (resolved to %s): %s", role, err, resolved, r.advice(names, role, full))
	}
	info, err := f.Stat()
	if err == nil && info.Size() == 0 {
		err = fmt.Errorf("%s: %s (resolved to %s) is empty: %s", role, full, resolved, r.advice(names, role, full))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &BootFile{File: f, Path: full, Resolved: r.InRoot(f), Size: info.Size()}, nil
}

// trail shows where a dangling link points, which its ENOENT does not.
func (r *Root) trail(name string) string {
	dir, base, err := r.parent(name)
	if err != nil {
		return ""
	}
	defer dir.Close()
	target, err := readlinkat(dir, base)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (a link to %q, which inside the image leads nowhere)", target)
}

// advice names the next step, with the files that look like a candidate.
func (r *Root) advice(names BootNames, role, full string) string {
	text := fmt.Sprintf("set %s on the job, or make %s a link to the right file in the image", bootRole[role], full)
	if names.Arch == "aarch64" && role == "kernel" && path.Base(full) == "Image" {
		text += " (for aarch64 the default is Image, also when vmlinuz is asked for)"
	}
	found := r.candidates(names.Dir, role)
	if len(found) == 0 {
		return text
	}
	return fmt.Sprintf("%s; %s holds %s", text, clean(names.Dir), strings.Join(found, ", "))
}

// candidates lists names in dir that look like a file of the role, at most ten:
// an image owner sees the typing error, and a hostile directory fills no log.
func (r *Root) candidates(dir, role string) []string {
	prefixes := map[string][]string{
		"kernel":     {"vmlinu", "Image", "bzImage", "zImage", "kernel"},
		"initrd":     {"initrd", "initramfs"},
		"parameters": {"kernel-parameters", "cmdline"},
	}[role]
	d, err := r.OpenDir(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	entries, err := d.ReadDir(4096)
	if err != nil {
		return nil
	}
	var found []string
	for _, e := range entries {
		if e.IsDir() || !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(e.Name(), p) }) {
			continue
		}
		if ok, err := r.IsRegular(dir + "/" + e.Name()); err == nil && ok {
			found = append(found, fmt.Sprintf("%q", e.Name()))
		}
	}
	slices.Sort(found)
	return found[:min(len(found), 10)]
}
