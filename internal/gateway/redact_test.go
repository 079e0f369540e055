// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

var secrets = []*regexp.Regexp{regexp.MustCompile(`secret=[a-z]+`), regexp.MustCompile(`(?s)<.*?>`), regexp.MustCompile(`=x[^ ]`)}

// redact passes text through a redactor in pieces of random sizes, and checks what is held meanwhile.
func redact(t *testing.T, r *rand.Rand, streams [castStreams]string) (got [castStreams]string) {
	t.Helper()
	red := &redactor{patterns: secrets}
	began := time.Now()
	take := func(events []castEvent, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.code == castOutput {
				got[e.stream] += string(e.data)
			}
			if e.at.Before(began) {
				t.Fatal("the order of events has changed")
			}
			began = e.at
		}
	}
	for n := 1; streams[0]+streams[1] != ""; n++ {
		at := began.Add(time.Hour + time.Duration(n))
		s := r.IntN(castStreams)
		size := min(1+r.IntN(1<<r.IntN(12)), len(streams[s]))
		take(red.add(castEvent{at, castOutput, s, []byte(streams[s][:size])}))
		streams[s] = streams[s][size:]
		if n%7 == 0 {
			take(red.add(castEvent{at, castResize, 0, []byte("80x24")}))
		}
		if red.size > maxRedacted+redactReach || len(red.held) > 2*red.size+1 {
			t.Fatalf("%d bytes are held in %d events", red.size, len(red.held))
		}
	}
	take(red.flush())
	return got
}

// TestRedact: however the text comes, it is masked as if it came at once.
func TestRedact(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	words := []string{"secret=", "abc", " ", "<", ">", "=x", "\n", "ä", "\xff", strings.Repeat("lorem ipsum ", 40)}
	for range 8 {
		var streams, want [castStreams]string
		for s := range streams {
			var text strings.Builder
			for range r.IntN(800) {
				word := words[r.IntN(len(words))]
				if r.IntN(4) > 0 && strings.Contains("<>", word) {
					continue
				}
				text.WriteString(word)
			}
			streams[s] = strings.ReplaceAll(text.String(), "<", "<>") // no match is out of reach
			want[s] = streams[s]
			for i, m := len(want[s]), matches(secrets, []byte(want[s])); len(m) > 0; m = m[:len(m)-1] {
				last := m[len(m)-1]
				if last.to > i {
					t.Fatal("matches overlap")
				}
				i = last.from
				want[s] = want[s][:last.from] + redacted + want[s][last.to:]
			}
		}
		if got := redact(t, r, streams); got != want {
			t.Fatalf("seed %d: %d and %d bytes, want %d and %d", seed, len(got[0]), len(got[1]), len(want[0]), len(want[1]))
		}
	}
}

// TestRedactReach: a match in pieces is found within redactReach, whatever the other stream does meanwhile, and one without
// an end ends the recording, not its own secrecy.
func TestRedactReach(t *testing.T) {
	red := &redactor{patterns: secrets}
	var shown bytes.Buffer
	add := func(stream int, text string) error {
		events, err := red.add(castEvent{time.Now(), castOutput, stream, []byte(text)})
		for _, e := range events {
			shown.Write(e.data)
		}
		return err
	}
	lines := strings.Repeat("line\n", (redactReach-100)/5)
	for _, text := range []string{"\nsecret=abc", lines, "def\n"} {
		if err := add(min(len(text), 100)/100, text); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 { // the other stream's end is no match that goes on
		if err := add(1, lines); err != nil {
			t.Fatal(err)
		}
	}
	if s := shown.String(); strings.Contains(s, "abc") || strings.Contains(s, "def") || !strings.Contains(s, redacted) {
		t.Errorf("%.200q", s)
	}

	dir := t.TempDir()
	recs, err := newRecordings(&sshdconf.Settings{RecordDirectory: dir, RecordRedact: secrets}, t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	rec, err := recs.start("1.1", "title", nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	rec.add(castOutput, 0, []byte("before secret="))
	for range maxRedacted >> 10 {
		rec.add(castOutput, 0, bytes.Repeat([]byte("q"), 2<<10))
	}
	rec.stop()
	recs.close()
	path := casts(t, dir, ".cast")[0]
	if c := readCast(t, path); !strings.Contains(c.text(castMarker), "64 KiB") || !strings.HasPrefix("before ", c.text(castOutput)) {
		t.Errorf("%.200q, marker %q", c.text(castOutput), c.text(castMarker))
	}
	if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte("qq")) {
		t.Errorf("what did not come to its end is in the file: %v", err)
	}
}
