// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

const (
	dpkgStatus   = "var/lib/dpkg/status"
	dpkgStatusD  = "var/lib/dpkg/status.d" // one file a package, in images made without dpkg
	maxDpkgBytes = 256 << 20
	maxDpkgLine  = 1 << 20
)

// readDpkg lists what dpkg has installed, whole or in part.
func readDpkg(ctx context.Context, img *squash.Image) ([]pkg, error) {
	var list []pkg
	read := func(path string) error {
		f, _, err := openDatabase(img, path, maxDpkgBytes)
		if err != nil || f == nil {
			return err
		}
		defer f.Close()
		if list, err = parseDpkg(ctx, f, list); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	}
	if err := read(dpkgStatus); err != nil {
		return nil, err
	}
	entries, err := img.ReadDir(dpkgStatusD)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return list, nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".md5sums") {
			continue
		}
		if err := read(dpkgStatusD + "/" + e.Name()); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// parseDpkg reads paragraphs as deb-control(5) describes and adds the packages
// whose files are there. Without a Status, as in status.d, a package is.
func parseDpkg(ctx context.Context, r io.Reader, list []pkg) ([]pkg, error) {
	p, installed := pkg{manager: "dpkg"}, true
	end := func() error {
		if p.name != "" && p.version != "" && installed {
			list = append(list, p)
		}
		p, installed = pkg{manager: "dpkg"}, true
		if len(list) > maxPackages {
			return errTooManyPackages
		}
		return ctx.Err()
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxDpkgLine)
	for lines.Scan() {
		line := lines.Bytes()
		if len(bytes.TrimSpace(line)) == 0 {
			if err := end(); err != nil {
				return list, err
			}
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			continue
		}
		field, value, _ := bytes.Cut(line, []byte(":"))
		text := packageText(bytes.TrimSpace(value[:min(len(value), maxPackageText)]))
		switch strings.ToLower(string(field[:min(len(field), 16)])) {
		case "package":
			p.name = text
		case "architecture":
			p.arch = text
		case "version":
			p.version = text
		case "status":
			state := text[strings.LastIndexByte(text, ' ')+1:]
			installed = state != "not-installed" && state != "config-files"
		}
	}
	if err := lines.Err(); err != nil {
		return list, err
	}
	return list, end()
}

// compareDpkgVersions orders versions as deb-version(7) does.
func compareDpkgVersions(a, b string) int {
	epochA, upstreamA, revisionA := splitDpkgVersion(a)
	epochB, upstreamB, revisionB := splitDpkgVersion(b)
	return cmp.Or(compareDigits(epochA, epochB), compareDpkgPart(upstreamA, upstreamB), compareDpkgPart(revisionA, revisionB))
}

func splitDpkgVersion(v string) (epoch, upstream, revision string) {
	if e, rest, ok := strings.Cut(v, ":"); ok {
		epoch, v = e, rest
	}
	if i := strings.LastIndexByte(v, '-'); i >= 0 {
		return epoch, v[:i], v[i+1:]
	}
	return epoch, v, ""
}

// compareDpkgPart compares runs of other characters and runs of digits by turns.
func compareDpkgPart(a, b string) int {
	for a != "" || b != "" {
		for a != "" && !isDigit(a[0]) || b != "" && !isDigit(b[0]) {
			if c := cmp.Compare(dpkgOrder(a), dpkgOrder(b)); c != 0 {
				return c
			}
			a, b = a[1:], b[1:]
		}
		i, j := digits(a), digits(b)
		if c := compareDigits(a[:i], b[:j]); c != 0 {
			return c
		}
		a, b = a[i:], b[j:]
	}
	return 0
}

// dpkgOrder is the rank of the first character: a tilde before the end, which
// comes before letters, and these before everything else. A digit ends a run.
func dpkgOrder(s string) int {
	switch {
	case s == "" || isDigit(s[0]):
		return 0
	case s[0] == '~':
		return -1
	case isLetter(s[0]):
		return int(s[0])
	}
	return int(s[0]) + 256
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }

// digits is the length of the run of digits that s begins with.
func digits(s string) int {
	n := 0
	for n < len(s) && isDigit(s[n]) {
		n++
	}
	return n
}

// compareDigits compares numbers of any length; none is zero.
func compareDigits(a, b string) int {
	a, b = strings.TrimLeft(a, "0"), strings.TrimLeft(b, "0")
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
}
