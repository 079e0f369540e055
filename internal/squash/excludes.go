// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"strings"
)

// anywhere marks a pattern that is not tied to the root, as for mksquashfs.
const anywhere = "... "

// exclude is one line of an excludes file.
type exclude struct {
	pattern  string
	anywhere bool
}

// ReadExcludes reads a file for DirOptions.Exclude as mksquashfs -wildcards -ef
// does: one pattern a line, relative to the packed root, with the wildcards *, ? and [...], none of which
// stands for a slash. A pattern behind "... " applies in every directory. A
// leading slash, empty lines and comments with # are allowed. Not known are
// extended wildcards such as !(a|b), and paths outside the root. Without a name
// nothing is excluded.
func ReadExcludes(name string) (func(string) bool, error) {
	if name == "" {
		return nil, nil
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var list []exclude
	lines := bufio.NewScanner(file)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		p, everywhere := strings.CutPrefix(text, anywhere)
		p = path.Clean(strings.TrimPrefix(strings.TrimSpace(p), "/"))
		p = strings.ReplaceAll(p, "[!", "[^") // as shells write it
		if _, err := path.Match(p, ""); err != nil || p == "." || p == ".." || strings.HasPrefix(p, "../") {
			return nil, fmt.Errorf("%s line %d: %q is not a path or pattern below the packed root", name, n, lines.Text())
		}
		list = append(list, exclude{p, everywhere})
	}
	return func(p string) bool {
		for _, e := range list {
			if e.matches(p) {
				return true
			}
		}
		return false
	}, lines.Err()
}

func (e exclude) matches(p string) bool {
	for {
		if ok, _ := path.Match(e.pattern, p); ok { // the pattern was checked above
			return true
		}
		slash := strings.IndexByte(p, '/')
		if !e.anywhere || slash < 0 {
			return false
		}
		p = p[slash+1:]
	}
}
