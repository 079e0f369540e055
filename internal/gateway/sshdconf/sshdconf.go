// SPDX-License-Identifier: Apache-2.0

// Package sshdconf reads sshd_config files as OpenSSH's sshd reads them
// (sshd_config(5), servconf.c of OpenSSH 9.x): keywords without case, `key value` and
// `key=value`, quotes, comments, the first value wins, Match blocks override what stands
// above them, Include.
//
// It refuses, with file, line and keyword, what sshd refuses too: an unknown keyword, a
// bad value, extra arguments, unbalanced quotes. A keyword of OpenSSH that has no meaning
// for this server is accepted and reported in [Settings.Ignored] or [Settings.Missed]. Of Match it knows
// all, user, group, invalid-user, address, localaddress and localport; a criterion that it cannot judge is refused, and so is
// a keyword that has one value for all connections in a block that does not hold for all.
package sshdconf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxInclude is how deep Include may nest (SERVCONF_MAX_DEPTH in servconf.c).
const maxInclude = 16

// maxFile bounds one configuration file.
const maxFile = 4 << 20

// An Error says which line of which file is wrong.
type Error struct {
	File string
	Line int // 0 on the command line
	Err  error
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %v", e.File, e.Err)
	}
	return fmt.Sprintf("%s line %d: %v", e.File, e.Line, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// scope orders what may override what: a matching Match block beats the command line and
// the global part, whatever the order in the file (copy_set_server_options in servconf.c).
// A list such as Port on the command line replaces the file's, as sshd's -p does.
type scope int

const (
	scopeMatch scope = iota
	scopeCommand
	scopeGlobal
)

type directive struct {
	name  string
	kw    keyword
	set   func(*Settings)
	scope scope
	block *block // that it stands in; nil: none
}

// Load reads the file at path after options, the `-o` arguments of the command line
// ("Key=Value"), whose values therefore win. An empty path means no file.
func Load(path string, options []string) (*Settings, error) {
	p := &parser{scope: scopeCommand}
	for _, o := range options {
		if err := p.line("command line", 0, o); err != nil {
			return nil, err
		}
	}
	if p.block != nil {
		return nil, &Error{File: "command line", Err: errors.New("Match is not possible in -o; put it into the configuration file")}
	}
	p.scope = scopeGlobal
	if path != "" {
		if err := p.file(path, 0); err != nil {
			return nil, err
		}
	}
	return p.settings(), nil
}

// Parse reads the text of one file; name is used in errors. Include is relative to the
// directory of name.
func Parse(name string, text []byte) (*Settings, error) {
	p := &parser{scope: scopeGlobal}
	if err := p.text(name, text, 0); err != nil {
		return nil, err
	}
	return p.settings(), nil
}

type parser struct {
	directives []directive
	ignored    []string
	missed     []string
	scope      scope  // outside Match
	block      *block // below a Match line, else nil
	outer      *block // that an included file stands in
	depth      int
}

func (p *parser) file(path string, depth int) error {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sshd_config %s does not exist: give an existing file with -f: %w", path, err)
		}
		return fmt.Errorf("read sshd_config: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read sshd_config: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return fmt.Errorf("read sshd_config: %s is not a regular file of at most %d bytes", path, maxFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read sshd_config: %w", err)
	}
	return p.text(path, text, depth)
}

func (p *parser) text(name string, text []byte, depth int) error {
	if depth > maxInclude {
		return &Error{File: name, Err: fmt.Errorf("Include is nested more than %d deep", maxInclude)}
	}
	p.depth = depth
	n := 0
	for l := range strings.Lines(string(text)) {
		n++
		if err := p.line(name, n, l); err != nil {
			return err
		}
	}
	return nil
}

// line handles one line (process_server_config_line_depth in servconf.c).
func (p *parser) line(file string, n int, l string) error {
	fail := func(err error) error { return &Error{File: file, Line: n, Err: err} }
	if strings.IndexByte(l, 0) >= 0 {
		return fail(errors.New("NUL byte"))
	}
	word, rest := splitKeyword(strings.TrimRight(l, " \t\r\n\f"))
	if word == "" || word[0] == '#' {
		return nil
	}
	name := strings.ToLower(word)
	kw, ok := keywords[name]
	if !ok {
		return fail(fmt.Errorf("bad configuration option %q: no such keyword in sshd_config(5)", word))
	}
	if rest == "" {
		return fail(fmt.Errorf("no argument after keyword %q", word))
	}
	args, err := splitArgs(rest)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", word, err))
	}
	if len(args) == 0 {
		return fail(fmt.Errorf("no argument after keyword %q", word))
	}
	switch name {
	case "match":
		if p.block, err = parseMatch(args, p.outer); err != nil {
			return fail(err)
		}
		return nil
	case "include":
		return p.include(file, args)
	}
	if p.block != nil && !kw.match {
		return fail(fmt.Errorf("directive %s is not allowed within a Match block", word))
	}
	if kw.whole && p.block.conditional() {
		return fail(fmt.Errorf("directive %s has one value for all connections here: put it outside of Match blocks for some peers", word))
	}
	if kw.parse == nil {
		switch v := strings.ToLower(args[0]); {
		case p.block.never():
		case kw.missed && v != "no" && v != "none":
			p.missed = append(p.missed, word)
		default:
			p.ignored = append(p.ignored, word)
		}
		return nil
	}
	if kw.raw {
		args = []string{rest}
	}
	set, err := kw.parse(args)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", word, err))
	}
	if p.block.never() {
		return nil
	}
	d := directive{name: name, kw: kw, set: set, scope: p.scope, block: p.block}
	if p.block != nil {
		d.scope = scopeMatch
	}
	p.directives = append(p.directives, d)
	return nil
}

// include reads the files that each pattern names, in lexical order. A Match inside an
// included file ends with it, as in sshd, and holds only where the block around the Include does.
func (p *parser) include(from string, patterns []string) error {
	block, outer, depth := p.block, p.outer, p.depth
	p.outer = block
	defer func() { p.outer = outer }()
	for _, pat := range patterns {
		if pat = filepath.Clean(pat); !filepath.IsAbs(pat) {
			pat = filepath.Join(filepath.Dir(from), pat)
		}
		files, err := filepath.Glob(pat)
		if err != nil {
			return &Error{File: from, Err: fmt.Errorf("Include %s: %w", pat, err)}
		}
		for _, f := range files {
			if hidden(pat, f) {
				continue
			}
			if err := p.file(f, depth+1); err != nil {
				return err
			}
			p.block, p.depth = block, depth
		}
	}
	return nil
}

// hidden reports whether a name that starts with a dot was found by a pattern that does not, which glob(3) passes over. A
// mounted ConfigMap has such names: ..data, and the directory that it is a link to.
func hidden(pattern, path string) bool {
	patterns := strings.Split(pattern, "/")
	for i, name := range strings.Split(path, "/") {
		if strings.HasPrefix(name, ".") && i < len(patterns) && !strings.HasPrefix(patterns[i], ".") {
			return true
		}
	}
	return false
}

// settings returns what holds for all peers, with the directives for some of them.
func (p *parser) settings() *Settings {
	slices.SortStableFunc(p.directives, func(a, b directive) int { return int(a.scope) - int(b.scope) })
	s := apply(p.directives, func(*block) bool { return false })
	s.Ignored, s.Missed = p.ignored, p.missed
	if slices.ContainsFunc(p.directives, func(d directive) bool { return d.block.conditional() }) {
		s.rules = p.directives
	}
	return s
}

// apply applies the directives in order of precedence, where the first value wins, with those of the conditional blocks
// that hold.
func apply(directives []directive, holds func(*block) bool) *Settings {
	s := defaults()
	seen := map[string]scope{}
	for _, d := range directives {
		if d.block.conditional() && !holds(d.block) {
			continue
		}
		if in, ok := seen[d.name]; ok && (!d.kw.list || in != d.scope) {
			continue
		}
		seen[d.name] = d.scope
		d.set(s)
	}
	return s
}

// splitKeyword cuts the keyword off a line: it ends at white space or at one '=' (strdelim
// in misc.c).
func splitKeyword(l string) (word, rest string) {
	l = strings.TrimLeft(l, " \t\r\n")
	if q, ok := strings.CutPrefix(l, `"`); ok {
		word, rest, _ = strings.Cut(q, `"`)
	} else {
		i := strings.IndexAny(l, " \t\r\n=\"")
		if i < 0 {
			return l, ""
		}
		word, rest = l[:i], l[i:]
	}
	rest = strings.TrimLeft(rest, " \t\r\n")
	if r, ok := strings.CutPrefix(rest, "="); ok {
		rest = strings.TrimLeft(r, " \t\r\n")
	}
	return word, rest
}

// splitArgs is argv_split of misc.c: words with single or double quotes and a few
// backslash escapes; a word that starts with '#' begins a comment.
func splitArgs(s string) ([]string, error) {
	var args []string
	for i := 0; i < len(s); {
		if s[i] == ' ' || s[i] == '\t' {
			i++
			continue
		}
		if s[i] == '#' {
			break
		}
		var word []byte
		var quote byte
		for ; i < len(s); i++ {
			c := s[i]
			switch {
			case c == '\\' && i+1 < len(s) && (strings.IndexByte(`'"\`, s[i+1]) >= 0 || quote == 0 && s[i+1] == ' '):
				i++
				word = append(word, s[i])
				continue
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
				continue
			case quote != 0 && c == quote:
				quote = 0
				continue
			}
			if quote == 0 && (c == ' ' || c == '\t') {
				break
			}
			word = append(word, c)
		}
		if quote != 0 {
			return nil, errors.New("unbalanced quotes")
		}
		args = append(args, string(word))
	}
	return args, nil
}

func atoi(s string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("%q is not a number between %d and %d", s, lo, hi)
	}
	return n, nil
}
