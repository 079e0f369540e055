// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// maxRPMBytes bounds an rpm database; those of full installations have 200 MB.
const maxRPMBytes = 1 << 30

// rpmDatabases are the places and formats of rpm's list of packages, the one
// rpm itself prefers first.
var rpmDatabases = []struct {
	name string
	read func(ctx context.Context, f io.ReaderAt, size int64, visit func(header []byte) error) error
}{
	{"rpmdb.sqlite", readSQLite},
	{"Packages.db", readNDB},
	{"Packages", readBDB},
}

// readRPM lists the packages of the first database there is.
func readRPM(ctx context.Context, img *squash.Image) ([]pkg, error) {
	for _, dir := range []string{"usr/lib/sysimage/rpm/", "var/lib/rpm/"} {
		for _, db := range rpmDatabases {
			path := dir + db.name
			f, size, err := openDatabase(img, path, maxRPMBytes)
			if err != nil {
				return nil, err
			}
			if f == nil {
				continue
			}
			defer f.Close()
			if log, size, err := openDatabase(img, path+"-wal", maxRPMBytes); err != nil || size > 0 {
				if log != nil {
					log.Close()
				}
				return nil, errors.Join(err, fmt.Errorf("%s was not closed: its write-ahead log has %d bytes; run `rpm --rebuilddb` in the image and pack it again", path, size))
			}
			var list []pkg
			err = db.read(ctx, f, size, func(header []byte) error {
				p, err := parseRPMHeader(header)
				if err == nil && len(list) >= maxPackages {
					err = errTooManyPackages
				}
				if p.name != "" {
					list = append(list, p)
				}
				return err
			})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			return list, nil
		}
	}
	return nil, nil
}

// Tags of a header (lib/rpmtag.h) and types of their values.
const (
	rpmTagName    = 1000
	rpmTagVersion = 1001
	rpmTagRelease = 1002
	rpmTagEpoch   = 1003
	rpmTagArch    = 1022

	rpmTypeInt32  = 4
	rpmTypeString = 6

	maxRPMHeader = 256 << 20 // lib/header.c has the same limit
	rpmEntrySize = 16
)

var errRPMHeader = errors.New("a package's header does not fit together")

// parseRPMHeader reads a header as databases hold it: the count of entries and
// the length of their data, then both. All numbers are big-endian. What has no
// name or version, as an imported key of an old database, is no package.
func parseRPMHeader(b []byte) (pkg, error) {
	p := pkg{manager: "rpm"}
	if len(b) < 8 || len(b) > maxRPMHeader {
		return pkg{}, errRPMHeader
	}
	entries, length := int64(binary.BigEndian.Uint32(b)), int64(binary.BigEndian.Uint32(b[4:]))
	if 8+entries*rpmEntrySize+length > int64(len(b)) {
		return pkg{}, errRPMHeader
	}
	data := b[8+entries*rpmEntrySize:][:length]
	var version, release, epoch string
	for i := range entries {
		e := b[8+i*rpmEntrySize:]
		tag, typ, offset := binary.BigEndian.Uint32(e), binary.BigEndian.Uint32(e[4:]), binary.BigEndian.Uint32(e[8:])
		var into *string
		switch tag {
		case rpmTagName:
			into = &p.name
		case rpmTagVersion:
			into = &version
		case rpmTagRelease:
			into = &release
		case rpmTagArch:
			into = &p.arch
		case rpmTagEpoch:
			if int64(offset)+4 > length || typ != rpmTypeInt32 {
				return pkg{}, errRPMHeader
			}
			epoch = strconv.FormatUint(uint64(binary.BigEndian.Uint32(data[offset:])), 10) + ":"
			continue
		default:
			continue
		}
		if int64(offset) > length || typ != rpmTypeString {
			return pkg{}, errRPMHeader
		}
		text := data[offset:]
		end := bytes.IndexByte(text, 0)
		if end < 0 || end > maxPackageText {
			return pkg{}, errRPMHeader
		}
		*into = packageText(text[:end])
	}
	p.version = epoch + version
	if release != "" {
		p.version += "-" + release
	}
	if p.name == "" || version == "" {
		return pkg{}, nil
	}
	return p, nil
}

// compareRPMVersions orders [epoch:]version[-release] as rpm does.
func compareRPMVersions(a, b string) int {
	epochA, versionA, releaseA := splitDpkgVersion(a)
	epochB, versionB, releaseB := splitDpkgVersion(b)
	return cmp.Or(compareDigits(epochA, epochB), compareRPMPart(versionA, versionB), compareRPMPart(releaseA, releaseB))
}

// compareRPMPart compares segments of letters and of digits; what stands between
// them only separates. A tilde comes before the end, a caret behind it and before
// everything else, digits behind letters (rpmio/rpmvercmp.c).
func compareRPMPart(a, b string) int {
	separator := func(r rune) bool {
		return r > 127 || !isDigit(byte(r)) && !isLetter(byte(r)) && r != '~' && r != '^'
	}
	for {
		a, b = strings.TrimLeftFunc(a, separator), strings.TrimLeftFunc(b, separator)
		if special := rpmSpecial(a, b); special != 0 || a == "" || b == "" {
			return special
		}
		if a[0] == '~' || a[0] == '^' {
			a, b = a[1:], b[1:]
			continue
		}
		numeric := isDigit(a[0])
		if numeric != isDigit(b[0]) {
			if numeric {
				return 1
			}
			return -1
		}
		i, j := digits(a), digits(b)
		if !numeric {
			i, j = letters(a), letters(b)
			if c := cmp.Compare(a[:i], b[:j]); c != 0 {
				return c
			}
		} else if c := compareDigits(a[:i], b[:j]); c != 0 {
			return c
		}
		a, b = a[i:], b[j:]
	}
}

// rpmSpecial decides where one of the two has ended or goes on with a tilde or
// a caret that the other has not. Zero says that neither is so, or that both are
// at their end.
func rpmSpecial(a, b string) int {
	rank := func(s string) int {
		switch {
		case s == "":
			return 1
		case s[0] == '~':
			return 0
		case s[0] == '^':
			return 2
		}
		return 3
	}
	return cmp.Compare(rank(a), rank(b))
}

func letters(s string) int {
	n := 0
	for n < len(s) && isLetter(s[n]) {
		n++
	}
	return n
}
