// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"regexp"
	"slices"
)

// Limits of redaction, in bytes of what a session shows.
const (
	redactReach = 8 << 10  // within these a match is found, however many pieces it comes in
	maxRedacted = 64 << 10 // of a match whose end is not in sight
)

// redacted stands for a match, whatever its length.
const redacted = "[redacted]"

var errRedact = fmt.Errorf("a match of RecordRedact goes on for more than %d KiB", maxRedacted>>10)

// redactor masks what matches RecordRedact before a recording is written. A match may come in pieces, so the last events are
// held back, with their times, and searched again when as much has come anew: each byte is searched a few times, by the
// goroutine that writes and never by the session's. Standard output and error are searched each by itself.
//
// It searches bytes, not a screen: a word that a program draws with control sequences in it is not found.
type redactor struct {
	patterns []*regexp.Regexp
	held     []castEvent
	size     int // bytes shown in held
	next     int // size at which to search
}

// add takes one event and returns those that can be written. After an error nothing more may be written.
func (r *redactor) add(e castEvent) ([]castEvent, error) {
	if len(r.patterns) == 0 {
		return []castEvent{e}, nil
	}
	if last := len(r.held) - 1; e.code == castResize && last >= 0 && r.held[last].code == castResize {
		r.held[last] = e // so that held is bounded by what it shows
		return nil, nil
	}
	r.held = append(r.held, e)
	r.size += e.shown()
	if r.size < max(r.next, 2*redactReach) {
		return nil, nil
	}
	return r.release(redactReach)
}

// flush returns all that is held, at the end of the session.
func (r *redactor) flush() ([]castEvent, error) { return r.release(0) }

// match is a part of a text.
type match struct{ from, to int }

// release searches what is held and returns it but for about the last keep bytes.
func (r *redactor) release(keep int) ([]castEvent, error) {
	end := max(r.size-keep, 0)
	cut := end
	var at [castStreams][]int
	var found [castStreams][]match
	for s := range castStreams {
		var text []byte
		text, at[s] = r.text(s)
		found[s] = matches(r.patterns, text)
		if n := len(found[s]); n > 0 && found[s][n-1].to == len(text) && at[s][len(text)-1] >= end {
			// It may go on.
			begin := at[s][found[s][n-1].from]
			if keep > 0 && r.size-begin > maxRedacted {
				return nil, errRedact
			}
			if keep > 0 {
				cut = min(cut, begin)
			}
		}
	}
	marks := make([]mark, r.size)
	for s, ms := range found {
		for _, m := range ms {
			if at[s][m.from] >= cut {
				break // it is found again when more of its surroundings is known
			}
			for i := m.from; i < m.to; i++ {
				marks[at[s][i]] = hidden
			}
			marks[at[s][m.from]] = masked
		}
	}
	out := r.split(marks, cut)
	r.next = r.size + redactReach
	return out, nil
}

// text is what is held of one stream, and where each byte of it stands among those of all streams.
func (r *redactor) text(stream int) (text []byte, at []int) {
	pos := 0
	for _, e := range r.held {
		if n := e.shown(); e.stream == stream && n > 0 {
			text = append(text, e.data...)
			for i := range n {
				at = append(at, pos+i)
			}
		}
		pos += e.shown()
	}
	return text, at
}

// matches returns the matches of all patterns in order; overlapping ones are one.
func matches(patterns []*regexp.Regexp, text []byte) (all []match) {
	for _, p := range patterns {
		for _, m := range p.FindAllIndex(text, -1) {
			if m[0] < m[1] {
				all = append(all, match{m[0], m[1]})
			}
		}
	}
	slices.SortFunc(all, func(a, b match) int { return a.from - b.from })
	merged := all[:0]
	for _, m := range all {
		if n := len(merged); n > 0 && m.from < merged[n-1].to {
			merged[n-1].to = max(merged[n-1].to, m.to)
			continue
		}
		merged = append(merged, m)
	}
	return merged
}

// mark says what becomes of a byte.
type mark byte

const (
	kept mark = iota
	hidden
	masked // hidden, with the mask in its place
)

// split returns what lies before cut and holds the rest; of both what is hidden is gone.
func (r *redactor) split(marks []mark, cut int) (out []castEvent) {
	held := r.held
	r.held, r.size = nil, 0
	pos := 0
	for _, e := range held {
		if e.code != castOutput {
			if pos <= cut && len(r.held) == 0 {
				out = append(out, e)
			} else {
				r.held = append(r.held, e)
			}
			continue
		}
		n := len(e.data)
		whole := min(max(cut-pos, 0), n)
		before, after := e, e
		before.data = show(e.data[:whole], marks[pos:])
		after.data = show(e.data[whole:], marks[pos+whole:])
		pos += n
		if len(before.data) > 0 {
			out = append(out, before)
		}
		if len(after.data) > 0 {
			r.held = append(r.held, after)
			r.size += len(after.data)
		}
	}
	return out
}

func show(data []byte, marks []mark) []byte {
	var shown []byte
	for i, b := range data {
		switch marks[i] {
		case kept:
			shown = append(shown, b)
		case masked:
			shown = append(shown, redacted...)
		}
	}
	return shown
}
