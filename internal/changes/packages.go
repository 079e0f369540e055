// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// PackageChange is a package that came, went, or has another version.
type PackageChange struct {
	Manager string `json:"manager"` // dpkg or rpm
	Name    string `json:"name"`
	Arch    string `json:"arch"`
	Change  string `json:"change"`        // added, removed, upgraded, downgraded
	Old     string `json:"old,omitempty"` // version, as the manager prints it
	New     string `json:"new,omitempty"`
}

// What happened to a package beside coming and going.
const (
	upgraded   = "upgraded"
	downgraded = "downgraded"
)

// pkg is an installed package.
type pkg struct{ manager, name, arch, version string }

func (p pkg) key() pkg { return pkg{p.manager, p.name, p.arch, ""} }

// Bounds on hostile databases.
const (
	maxPackages    = 200_000
	maxPackageText = 1 << 10 // of a name, an architecture, a version
)

var errTooManyPackages = fmt.Errorf("more than %d packages", maxPackages)

// packageText is what a database says as a string that JSON can hold; the managers
// allow nothing but ASCII.
func packageText(b []byte) string { return strings.ToValidUTF8(string(b), "\ufffd") }

// comparePackages reads both images' databases. What cannot be read becomes a
// note, and takes that manager's packages out of the comparison: half a list
// would tell of removals that never were.
func comparePackages(ctx context.Context, old, next *squash.Image, r *Report) []PackageChange {
	managers := []struct {
		name string
		read func(context.Context, *squash.Image) ([]pkg, error)
		less func(a, b string) int
	}{{"dpkg", readDpkg, compareDpkgVersions}, {"rpm", readRPM, compareRPMVersions}}
	list := []PackageChange{}
	for _, m := range managers {
		a, errA := readPackages(ctx, old, m.read)
		b, errB := readPackages(ctx, next, m.read)
		if errA != nil || errB != nil {
			for side, err := range map[*Image]error{&r.Old: errA, &r.New: errB} {
				if err != nil {
					r.Notes = append(r.Notes, fmt.Sprintf("packages of %s in %s: %v", m.name, side.Name, err))
				}
			}
			slices.Sort(r.Notes)
			continue
		}
		r.Old.Packages += len(a)
		r.New.Packages += len(b)
		list = append(list, packageChanges(a, b, m.less)...)
	}
	return list
}

// readPackages reads one database and survives a fault in its reader: the
// database is a stranger's.
func readPackages(ctx context.Context, img *squash.Image, read func(context.Context, *squash.Image) ([]pkg, error)) (list []pkg, err error) {
	defer func() {
		if p := recover(); p != nil {
			list, err = nil, fmt.Errorf("internal error: %v", p)
		}
	}()
	list, err = read(ctx, img)
	slices.SortFunc(list, func(a, b pkg) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.arch, b.arch), cmp.Compare(a.version, b.version))
	})
	return slices.Compact(list), err
}

// packageChanges compares two sorted lists. A package of which one version went
// and one came was upgraded or downgraded; several may be installed at once, as
// kernels are.
func packageChanges(old, next []pkg, compare func(a, b string) int) []PackageChange {
	versions := map[pkg][2][]string{}
	note := func(list, other []pkg, at int) {
		there := map[pkg]bool{}
		for _, p := range other {
			there[p] = true
		}
		for _, p := range list {
			if !there[p] {
				v := versions[p.key()]
				v[at] = append(v[at], p.version)
				versions[p.key()] = v
			}
		}
	}
	note(old, next, 0)
	note(next, old, 1)
	var list []PackageChange
	for p, v := range versions {
		one := PackageChange{Manager: p.manager, Name: p.name, Arch: p.arch}
		if len(v[0]) == 1 && len(v[1]) == 1 {
			one.Old, one.New, one.Change = v[0][0], v[1][0], upgraded
			if compare(one.Old, one.New) > 0 {
				one.Change = downgraded
			}
			list = append(list, one)
			continue
		}
		for _, version := range v[0] {
			one.Change, one.Old, one.New = string(Removed), version, ""
			list = append(list, one)
		}
		for _, version := range v[1] {
			one.Change, one.Old, one.New = string(Added), "", version
			list = append(list, one)
		}
	}
	slices.SortFunc(list, func(a, b PackageChange) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Arch, b.Arch), cmp.Compare(a.Old, b.Old), cmp.Compare(a.New, b.New))
	})
	return list
}

// databaseFile is a database opened in an image.
type databaseFile interface {
	fs.File
	io.ReaderAt
}

// openDatabase opens a regular file in an image, or returns nil if there is none.
// The path may lead through links of the image, as /var/lib/rpm does.
func openDatabase(img *squash.Image, path string, limit int64) (databaseFile, int64, error) {
	info, err := img.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	if info.Size() > limit {
		return nil, 0, fmt.Errorf("%s has %d bytes, more than the %d that are read", path, info.Size(), limit)
	}
	f, err := img.Open(path)
	if err != nil {
		return nil, 0, err
	}
	db, ok := f.(databaseFile)
	if !ok {
		return nil, 0, fmt.Errorf("%s is not a file", path)
	}
	return db, info.Size(), nil
}
