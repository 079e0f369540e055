// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// Text prints so many packages and files at most; all are in the JSON.
const (
	maxTextPackages = 100
	maxTextChanges  = 200
)

// WriteText writes a summary for a terminal: totals, packages, then one line per
// changed name. Names whose time alone changed are counted and not listed. Names
// are printed so that none can move the cursor or pass for two lines.
func (r *Report) WriteText(w io.Writer) error {
	out := bufio.NewWriter(w)
	s := &r.Summary
	fmt.Fprintf(out, "%s -> %s\n", r.Old.Name, r.New.Name)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "image\t%s\t-> %s\t(%s)\n", bytesText(r.Old.Bytes), bytesText(r.New.Bytes), growthText(s.ImageGrowth))
	fmt.Fprintf(table, "content\t%s\t-> %s\t(%s)\n", bytesText(r.Old.Content), bytesText(r.New.Content), growthText(s.ContentGrowth))
	fmt.Fprintf(table, "files\t%d\t-> %d\t\n", r.Old.Files, r.New.Files)
	fmt.Fprintf(table, "packages\t%d\t-> %d\t%s\n", r.Old.Packages, r.New.Packages, r.packagesText())
	table.Flush()
	for _, note := range r.Notes {
		fmt.Fprintf(out, "note: %s\n", Name(note))
	}
	if len(r.Packages) > 0 {
		fmt.Fprint(out, "\npackages:\n")
		for _, p := range r.Packages[:min(len(r.Packages), maxTextPackages)] {
			fmt.Fprintf(table, " %s\t%s\t%s\t%s\n", signs[p.Change], Name(p.Name), Name(p.Arch), p.versions())
		}
		table.Flush()
		leftOut(out, len(r.Packages)-maxTextPackages, "packages")
	}
	shown := slices.Clone(r.Changes)
	shown = slices.DeleteFunc(shown, func(c Change) bool { return c.touched() })
	if len(shown) > 0 {
		fmt.Fprint(out, "\nfiles:\n")
		slices.SortStableFunc(shown, func(a, b Change) int { return cmp.Compare(b.weight, a.weight) })
		few := shown[:min(len(shown), maxTextChanges)]
		slices.SortStableFunc(few, func(a, b Change) int { return comparePaths(string(a.Path), string(b.Path)) })
		for _, c := range few {
			fmt.Fprintf(table, " %s\t%s\t%s\t\n", c.sign(), c.names(), c.detail())
		}
		table.Flush()
		leftOut(out, len(shown)-len(few), "smaller changes")
	}
	fmt.Fprintf(out, "\n%d added (%s), %d removed (%s), %d modified (%s of new content), %d renamed", s.Added, bytesText(s.AddedBytes),
		s.Removed, bytesText(s.RemovedBytes), s.Modified, bytesText(s.RewrittenBytes), s.Renamed)
	if s.Touched > 0 {
		fmt.Fprintf(out, ", %d with another time only", s.Touched)
	}
	fmt.Fprintln(out)
	return out.Flush()
}

func leftOut(w io.Writer, n int, what string) {
	if n > 0 {
		fmt.Fprintf(w, "   ... and %d more %s; --json lists all\n", n, what)
	}
}

var signs = map[string]string{"added": "+", "removed": "-", "modified": "~", "renamed": ">", upgraded: "^", downgraded: "v"}

func (c *Change) sign() string { return signs[string(c.Kind)] }

// names is the path, and the former one of a renamed file.
func (c *Change) names() string {
	text := c.Path.String()
	if c.From != nil {
		text = c.From.String() + " -> " + text
	}
	return text
}

// detail says in few words what changed.
func (c *Change) detail() string {
	switch c.Kind {
	case Added:
		return c.New.text()
	case Removed:
		return c.Old.text()
	}
	var parts []string
	for _, how := range c.How {
		switch how {
		case HowType:
			parts = append(parts, fmt.Sprintf("%s -> %s", c.Old.text(), c.New.text()))
		case HowContent:
			parts = append(parts, fmt.Sprintf("%s -> %s", bytesText(c.Old.Size), bytesText(c.New.Size)))
		case HowMode:
			parts = append(parts, fmt.Sprintf("mode %s -> %s", c.Old.Mode, c.New.Mode))
		case HowOwner:
			parts = append(parts, fmt.Sprintf("owner %d:%d -> %d:%d", c.Old.UID, c.Old.GID, c.New.UID, c.New.GID))
		case HowXattrs:
			parts = append(parts, "xattrs "+c.Xattrs.text())
		case HowTarget:
			parts = append(parts, fmt.Sprintf("target %s -> %s", c.Old.Target, c.New.Target))
		case HowDevice:
			parts = append(parts, fmt.Sprintf("device %s -> %s", c.Old.Device, c.New.Device))
		case HowLinks:
			parts = append(parts, fmt.Sprintf("names of the inode %d -> %d", max(1, c.Old.Links), max(1, c.New.Links)))
		}
	}
	return strings.Join(parts, ", ")
}

// text names a type, or the size of a file.
func (s *State) text() string {
	switch {
	case s.Type == "file":
		return bytesText(s.Size)
	case s.Target != nil:
		return "symlink to " + s.Target.String()
	case s.Device != "":
		return s.Type + " " + s.Device
	}
	return s.Type
}

func (x *XattrChange) text() string {
	var parts []string
	for i, list := range [][]Name{x.Added, x.Removed, x.Changed} {
		for _, name := range list {
			parts = append(parts, "+-~"[i:i+1]+name.String())
		}
	}
	return strings.Join(parts, " ")
}

func (p *PackageChange) versions() string {
	if p.Old != "" && p.New != "" {
		return Name(p.Old).String() + " -> " + Name(p.New).String()
	}
	return Name(p.Old + p.New).String()
}

func (r *Report) packagesText() string {
	count := map[string]int{}
	for _, p := range r.Packages {
		count[p.Change]++
	}
	var parts []string
	for _, change := range []string{string(Added), string(Removed), upgraded, downgraded} {
		if n := count[change]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, change))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "(" + strings.Join(parts, ", ") + ")"
}

// bytesText writes a size with three digits or so, in binary units.
func bytesText(n int64) string {
	if n > -1024 && n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), 0
	for unit < 6 && (v >= 1023.95 || v <= -1023.95) {
		v /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", v, "?KMGTPE"[unit])
}

func growthText(n int64) string {
	if n > 0 {
		return "+" + bytesText(n)
	}
	return bytesText(n)
}
