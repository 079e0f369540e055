// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"cmp"
	"crypto/sha256"
	_ "embed" // the page's parts
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"sync"
)

// What a page holds at most, so that a browser is at ease with it.
const (
	maxPageChanges     = 100_000
	maxPageDirectories = 12
)

var (
	//go:embed page/page.html
	pageHTML string
	//go:embed page/page.css
	pageCSS string
	//go:embed page/page.js
	pageJS string
)

var pageTemplate = sync.OnceValue(func() *template.Template {
	return template.Must(template.New("page").Funcs(template.FuncMap{
		"bytes": bytesText, "growth": growthText,
		"name": func(s string) string { return Name(s).String() },
	}).Parse(pageHTML))
})

// page is what the template sees.
type page struct {
	Report   *Report
	Policy   string
	Style    template.HTML
	Script   template.HTML
	Data     template.HTML
	Names    int64
	Heaviest []DirectoryChange
	Omitted  int
}

// WriteHTML writes the report as one page that needs no other file. Its policy
// lets it load nothing, and run only the script it was made with, whatever a name
// in the image says; without JavaScript the numbers, the packages and the
// heaviest directories remain.
func (r *Report) WriteHTML(w io.Writer) error {
	rows, omitted := r.pageRows()
	data, err := json.Marshal(map[string]any{"rows": rows}) // escapes <, > and &
	if err != nil {
		return err
	}
	s := &r.Summary
	return pageTemplate().Execute(w, page{
		Report: r,
		Policy: fmt.Sprintf("default-src 'none'; img-src data:; style-src 'sha256-%s'; script-src 'sha256-%s'; base-uri 'none'; form-action 'none'",
			hashOf(pageCSS), hashOf(pageJS)),
		Style:    template.HTML("<style>" + pageCSS + "</style>"),
		Script:   template.HTML("<script>" + pageJS + "</script>"),
		Data:     template.HTML(`<script type="application/json" id="data">` + string(data) + "</script>"),
		Names:    s.Added + s.Removed + s.Modified + s.Renamed,
		Heaviest: r.heaviest(),
		Omitted:  omitted,
	})
}

func hashOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// pageRows returns the rows of the list as the script knows them, the heaviest
// first.
func (r *Report) pageRows() (rows [][]any, omitted int) {
	list := make([]*Change, len(r.Changes))
	for i := range r.Changes {
		list[i] = &r.Changes[i]
	}
	slices.SortStableFunc(list, func(a, b *Change) int { return cmp.Compare(b.weight, a.weight) })
	omitted = max(0, len(list)-maxPageChanges)
	rows = make([][]any, 0, len(list)-omitted)
	for _, c := range list[:len(list)-omitted] {
		kind := slices.Index([]Kind{Added, Removed, Modified, Renamed}, c.Kind)
		if c.touched() {
			kind = 4
		}
		var from string
		if c.From != nil {
			from = c.From.escaped()
		}
		rows = append(rows, []any{kind, c.Path.escaped(), from, c.Old.fileSize(), c.New.fileSize(), c.weight, c.pageDetail()})
	}
	return rows, omitted
}

// pageDetail is the detail without the size of a file, which has its own column.
func (c *Change) pageDetail() string {
	if c.Kind == Added && c.New.Type == "file" || c.Kind == Removed && c.Old.Type == "file" {
		return ""
	}
	return c.detail()
}

// escaped is the name with what does not print escaped as in Go, and backslashes,
// so that its parts can be told from each other and from other names.
func (n Name) escaped() string {
	q := fmt.Sprintf("%q", string(n))
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// fileSize is the size of a file, or nil.
func (s *State) fileSize() any {
	if s == nil || s.Type != "file" {
		return nil
	}
	return s.Size
}

// heaviest returns the directories with the most changed bytes. Of a directory
// and one above it with the same changes, the lower one is meant.
func (r *Report) heaviest() []DirectoryChange {
	weight := func(d *DirectoryChange) int64 { return d.AddedBytes + d.RemovedBytes + d.RewrittenBytes }
	var list []DirectoryChange
	for i := range r.Directories {
		d := &r.Directories[i]
		if weight(d) == 0 {
			continue
		}
		if n := len(list); n > 0 && weight(&list[n-1]) == weight(d) && (list[n-1].Path == "." || strings.HasPrefix(string(d.Path), string(list[n-1].Path)+"/")) {
			list = list[:n-1]
		}
		list = append(list, *d)
	}
	slices.SortStableFunc(list, func(a, b DirectoryChange) int { return cmp.Compare(weight(&b), weight(&a)) })
	return list[:min(len(list), maxPageDirectories)]
}
