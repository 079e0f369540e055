// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// hostileNames try to leave the place they are written to.
var hostileNames = []string{
	"<script>window.pwned=1<!--", "<script>window.pwned=2<", "<!--<script>", "\"><img src=x onerror=window.pwned=3>", "' onmouseover='window.pwned=4",
	"new\nline", "\r\x1b[2J\x07", "\xff\xfe", "\u202egnp.exe", "__proto__", "constructor", "{{.Report}}", "${window.pwned=5}", "&lt;b&gt;", `back\slash\n`, "\"quoted\"",
	"\u2028\u2029", "javascript:window.pwned=6", "]]>", "\u00e4\u65e5\u672c", "-rf", "#fragment?query", "%3Cscript%3E",
}

// hostile are two images with the names above as paths, targets and attributes.
func hostile(t *testing.T) *Report {
	t.Helper()
	old, next := t.TempDir(), t.TempDir()
	for i, name := range hostileNames {
		for _, dir := range []string{old, next}[i%2:] {
			at := filepath.Join(dir, "d"+name)
			if err := os.Mkdir(at, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(at, name), []byte(strings.Repeat(dir, i+1)), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(dir+name, filepath.Join(at, "link")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.MkdirAll(next+"/var/lib/dpkg", 0o755); err != nil {
		t.Fatal(err)
	}
	var status strings.Builder
	for _, name := range hostileNames {
		name = strings.ReplaceAll(name, "\n", " ")
		fmt.Fprintf(&status, "Package: %s\nVersion: 1%s\nArchitecture: %s\n\n", name, name, name)
	}
	if err := os.WriteFile(next+"/var/lib/dpkg/status", []byte(status.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	name := "<img src=x onerror=window.pwned=7>"
	r, err := Compare(t.Context(), Side{name, packed(t, old, squash.Options{})}, Side{"</title><script>window.pwned=8</script>", packed(t, next, squash.Options{})}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	r.Notes = append(r.Notes, "</p><script>window.pwned=9</script>")
	return r
}

func TestHostileText(t *testing.T) {
	r := hostile(t)
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if !utf8.Valid(b.Bytes()) {
		t.Error("what is printed is not UTF-8")
	}
	for _, c := range b.String() {
		if c != '\n' && !unicode.IsPrint(c) {
			t.Errorf("%q is printed", c)
		}
	}
	for _, want := range []string{`"dnew\nline/new\nline"`, `"d\xff\xfe/\xff\xfe"`, "d{{.Report}}", `"d\u202egnp.exe`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s is not printed", want)
		}
	}
	if lines := strings.Count(b.String(), "\n"); lines > 2*len(hostileNames)*3+20 {
		t.Errorf("%d lines", lines)
	}
}

// TestJSON reads a report back: nothing is lost, not even names that are no text.
func TestJSON(t *testing.T) {
	r := hostile(t)
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), `"base64": "`) {
		t.Error("no name is in base64")
	}
	var got Report
	d := json.NewDecoder(&b)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	for i := range r.Changes {
		r.Changes[i].weight = 0
	}
	if !reflect.DeepEqual(&got, r) {
		t.Errorf("read back:\n%+v\nwant\n%+v", &got, r)
	}
}

// large is a report of 50,000 changes in 500 directories.
func large() *Report {
	r := &Report{Format: Format, Old: Image{Name: "base.sqsh", Bytes: 1 << 30, Packages: 10}, New: Image{Name: "new.sqsh", Bytes: 3 << 29, Packages: 11},
		Packages: []PackageChange{{"dpkg", "htop", "amd64", "added", "", "3.2.2-2"}}, Summary: Summary{ImageGrowth: 1 << 29, Added: 40_000}}
	for i := range 50_000 {
		c := Change{Path: Name(fmt.Sprintf("usr/dir%d/sub/file%d", i%500, i)), Kind: Added, New: &State{Type: "file", Size: int64(i + 1)}, weight: int64(i + 1)}
		if i%5 == 0 {
			c.Kind, c.Old, c.New = Removed, c.New, nil
		}
		r.Changes = append(r.Changes, c)
	}
	touched := &State{Type: "file", Size: 7}
	r.Changes = append(r.Changes, Change{Path: "touched", Kind: Modified, How: []string{HowTime}, Old: touched, New: touched},
		Change{Path: "etc/mode", Kind: Modified, How: []string{HowMode}, Old: &State{Type: "file", Mode: "0644"}, New: &State{Type: "file", Mode: "0600"}})
	return r
}

// contrast is an expression for the texts whose contrast is less than WCAG's AA
// asks for, 4.5.
const contrast = `(() => {
	const parse = c => c.match(/[\d.]+/g).map(Number);
	const light = c => { const [r, g, b] = parse(c).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
	const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parse(c); if (p.length < 4 || p[3] > 0) return c; } return "rgb(255,255,255)"; };
	const bad = new Set();
	for (const e of document.querySelectorAll("body *")) {
		if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.disabled || e.closest("[hidden],noscript,script") || e.matches("script,style")) continue;
		const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
		if ((a + .05) / (b + .05) < 4.5) bad.add(e.tagName + "." + e.className + " " + ((a + .05) / (b + .05)).toFixed(2));
	}
	return [...bad].join(", ");
})()`

// TestPage is one test, because a browser takes seconds to start.
func TestPage(t *testing.T) {
	b := startBrowser(t)
	t.Run("hostile", func(t *testing.T) {
		b.t = t
		r := hostile(t)
		p := b.open(r, true)
		p.want("String(window.pwned)", "undefined")
		p.want("document.querySelectorAll('img, iframe, object, embed, a, [onerror], [onmouseover]').length", 0)
		p.want("document.scripts.length", 2)
		for _, box := range []string{"touched"} {
			p.eval("document.querySelector('[data-kind=" + box + "]').click()")
		}
		names := fmt.Sprint(p.eval("[...document.querySelectorAll('td.name')].map(e => e.textContent).join('\\n')"))
		for _, want := range []string{`d<script>window.pwned=1<!--/<script>window.pwned=1<!--`, `d\xff\xfe/\xff\xfe`, `dnew\nline/new\nline`, `d__proto__/__proto__`, `dback\\slash\\n/`, "d\u00e4\u65e5\u672c/"} {
			if !strings.Contains(names, want) {
				t.Errorf("%q is not listed", want)
			}
		}
		p.eval("[...document.querySelectorAll('#map > button')].forEach(e => e.dispatchEvent(new Event('mouseover')))")
		n := int(p.eval("document.querySelectorAll('#map > button').length").(float64))
		for i := range n { // into each tile and back
			p.eval(fmt.Sprintf("document.querySelectorAll('#map > button')[%d].click()", i))
			p.eval("document.querySelector('#crumbs button').click()")
		}
		p.want("String(window.pwned)", "undefined")
		p.quiet()
	})
	t.Run("large", func(t *testing.T) {
		b.t = t
		p := b.open(large(), true)
		p.want("document.querySelector('.big').textContent", "+512.0 MiB")
		p.want("document.getElementById('count').textContent", "1–100 of 50,001")
		p.want("document.querySelectorAll('#rows tr').length", 100)
		p.want("document.querySelector('#rows td.name').textContent", "usr/dir499/sub/file49999")
		p.eval("document.getElementById('next').click()")
		p.want("document.getElementById('count').textContent", "101–200 of 50,001")

		p.eval("document.getElementById('search').focus()")
		p.call(p.session, "Input.insertText", map[string]any{"text": "DIR7/SUB/FILE"}, nil)
		p.want("document.getElementById('count').textContent", "1–100 of 100")
		p.eval("document.querySelector('[data-kind=added]').click()")
		p.want("document.getElementById('count').textContent", "nothing matches") // 7 + 500 n is no multiple of 5
		p.eval("document.querySelector('[data-kind=added]').click()")
		p.eval("document.querySelector('[data-sort=after]').click()")
		p.want("document.querySelector('#rows td.name').textContent", "usr/dir7/sub/file49507")
		p.eval("document.querySelector('[data-sort=after]').click()")
		p.want("document.querySelector('#rows td.name').textContent", "usr/dir7/sub/file7")
		p.want("document.querySelector('th[aria-sort]').getAttribute('aria-sort')", "ascending")
		p.eval("{ const s = document.getElementById('search'); s.value = 'mode 0644 -> 0600'; s.dispatchEvent(new Event('input')); }")
		p.want("document.querySelector('#rows td.name').textContent", "etc/mode")
		p.eval("{ const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input')); }")
		p.eval("document.querySelector('[data-kind=touched]').click()")
		p.want("document.getElementById('count').textContent", "1–100 of 50,002")

		// The treemap by keyboard and by mouse.
		p.want("document.querySelectorAll('#map > button').length", 1)
		p.want("document.querySelectorAll('#map > button[tabindex=\"0\"]').length", 1)
		p.eval("document.querySelector('#map > button').focus()")
		p.key("Enter")
		p.want("document.querySelector('#crumbs [aria-current]').textContent", "usr")
		p.want("document.querySelectorAll('#map > button').length", 80)
		p.want("document.activeElement.parentElement.id", "map")
		p.key("ArrowRight")
		p.want("document.activeElement.getAttribute('aria-label').split(',')[0]", "dir498/sub/")
		p.key("Enter")
		p.want("document.querySelector('#crumbs [aria-current]').textContent", "sub")
		p.want("document.getElementById('count').textContent", "1–100 of 100")
		p.key("End")
		p.want("document.activeElement.textContent === document.querySelector('#map').lastChild.textContent", true)
		p.key("Escape")
		p.key("Escape")
		p.want("document.querySelector('#crumbs [aria-current]').textContent", "usr")
		p.want("document.activeElement.parentElement.id", "map")
		p.eval("document.querySelector('#crumbs button').click()")
		p.want("document.querySelector('#crumbs [aria-current]').textContent", "image")

		// Tiles are where squarify put them: inside the map, their areas all of it.
		p.eval("document.querySelector('#map > button').click()")
		p.want(`(() => { const m = document.getElementById('map'); let sum = 0;
			for (const b of m.children) { const s = b.style, [x, y, w, h] = [s.left, s.top, s.width, s.height].map(parseFloat); sum += w * h;
				if (x < -.01 || y < -.01 || x + w > m.clientWidth + .01 || y + h > m.clientHeight + .01) return "outside"; }
			return Math.abs(sum - m.clientWidth * m.clientHeight) < 1; })()`, true)
		p.want("[...document.querySelectorAll('button, input')].filter(e => !(e.textContent || e.getAttribute('aria-label') || e.labels && e.labels.length)).length", 0)
		for _, scheme := range []string{"light", "dark"} {
			p.call(p.session, "Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
			p.want(contrast, "")
		}
		p.want("document.documentElement.scrollWidth <= window.innerWidth", true)
		p.call(p.session, "Emulation.setDeviceMetricsOverride", map[string]any{"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": true}, nil)
		p.want("document.documentElement.scrollWidth <= window.innerWidth", true)
		p.quiet()
	})
	t.Run("no scripts", func(t *testing.T) {
		b.t = t
		p := b.open(large(), false)
		text := fmt.Sprint(p.eval("document.body.innerText"))
		for _, want := range []string{"+512.0 MiB", "1.0 GiB → 1.5 GiB", "40000", "htop", "3.2.2-2", "sidecar diff --json"} {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not shown", want)
			}
		}
		if strings.Contains(text, "Search") {
			t.Error("controls that do nothing are shown")
		}
	})
}
