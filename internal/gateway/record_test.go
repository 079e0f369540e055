// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// cast is a recording, read strictly.
type cast struct {
	head   castHeader
	events [][3]string
}

func readCast(t *testing.T, path string) cast {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !utf8.Valid(b) || !bytes.HasSuffix(b, []byte("\n")) {
		t.Errorf("%s is not lines of UTF-8", path)
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	var c cast
	dec := json.NewDecoder(strings.NewReader(lines[0]))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c.head); err != nil || c.head.Version != 2 || c.head.Width == 0 || c.head.Height == 0 || c.head.Timestamp == 0 {
		t.Errorf("header %s: %v", lines[0], err)
	}
	last := 0.0
	for _, l := range lines[1:] {
		var e []any
		if err := json.Unmarshal([]byte(l), &e); err != nil || len(e) != 3 {
			t.Fatalf("event %s: %v", l, err)
		}
		at, ok1 := e[0].(float64)
		code, ok2 := e[1].(string)
		data, ok3 := e[2].(string)
		if !ok1 || !ok2 || !ok3 || at < last || !strings.Contains("orm", code) {
			t.Errorf("event %s after %v", l, last)
		}
		last = at
		c.events = append(c.events, [3]string{fmt.Sprint(at), code, data})
	}
	return c
}

// text joins what all events of one code hold.
func (c cast) text(code string) string {
	var b strings.Builder
	for _, e := range c.events {
		if e[1] == code {
			b.WriteString(e[2])
		}
	}
	return b.String()
}

func casts(t *testing.T, dir, suffix string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// TestRecording: every session with a terminal is recorded, whatever it runs, and none other; what is typed is not.
func TestRecording(t *testing.T) {
	testkit.NeedTool(t, "asciinema")
	dir := filepath.Join(t.TempDir(), "deep", "casts")
	j := start(t, options{config: "RecordDirectory " + dir})
	if _, errs, code := run(t, j.tool("ssh", host, "echo not recorded")); code != 0 {
		t.Fatal(errs)
	}
	c := j.dial()
	s := newSession(t, c)
	if err := s.RequestPty("xterm-256color", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	in, _ := s.StdinPipe()
	out, _ := s.StdoutPipe()
	// A character cut in two by time, a byte that is none, an escape sequence.
	if err := s.Start(`stty -echo; printf 'ready\n'; read secret; printf 'a\303'; sleep 0.1; printf '\244b\377\033[1m<&>\033[0m'; read resized; stty size`); err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	await := func(text string) {
		buf := make([]byte, 4096)
		for !strings.Contains(shown.String(), text) {
			n, err := out.Read(buf)
			if shown.Write(buf[:n]); err != nil {
				t.Fatalf("%v after %q", err, &shown)
			}
		}
	}
	await("ready")
	io.WriteString(in, "my password\n")
	await("<&>")
	if err := s.WindowChange(50, 132); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "\n")
	await("50 132")
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "the recording is complete", func() bool { return len(casts(t, dir, ".cast")) == 1 && len(casts(t, dir, ".part")) == 0 })
	path := casts(t, dir, ".cast")[0]
	if name := filepath.Base(path); !regexp.MustCompile(`^11111111-2222-3333-4444-555555555555-\d{8}T\d{6}\.\d{3}Z-2\.1\.cast$`).MatchString(name) {
		t.Errorf("name %s", name)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	got := readCast(t, path)
	if h := got.head; h.Width != 80 || h.Height != 24 || h.Env["TERM"] != "xterm-256color" || !strings.Contains(h.Title, j.key.fingerprint()) {
		t.Errorf("header %+v", h)
	}
	if want := "ready\r\naäb\ufffd\x1b[1m<&>\x1b[0m50 132\r\n"; got.text(castOutput) != want {
		t.Errorf("output %q, want %q", got.text(castOutput), want)
	}
	if got.text(castResize) != "132x50" || got.text(castMarker) != "" {
		t.Errorf("resize %q, marker %q", got.text(castResize), got.text(castMarker))
	}
	if b, _ := os.ReadFile(path); bytes.Contains(b, []byte("password")) {
		t.Error("what was typed is in the recording")
	}
	// asciinema wants a terminal, even for this.
	if replay, errs, code := run(t, j.tool("ssh", "-tt", host, "stty -opost; LC_ALL=C.UTF-8 asciinema cat "+path)); code != 0 || replay != got.text(castOutput) {
		t.Errorf("asciinema shows %q, %d %s", replay, code, errs)
	}
}

// prompting is an output of a command that gets a line of input for each piece that arrives.
type prompting struct {
	text bytes.Buffer
	in   io.Writer
}

func (p *prompting) Write(b []byte) (int, error) {
	io.WriteString(p.in, "\n") // fails when that was the last piece
	return p.text.Write(b)
}

// TestRecordCommands: with RecordCommands a command without a terminal is recorded, both its outputs, and SFTP is not. What
// RecordRedact matches is in none of the files, also when it is shown piece by piece; the client gets it as it is.
func TestRecordCommands(t *testing.T) {
	dir := t.TempDir()
	j := start(t, options{config: "RecordDirectory " + dir + "\nRecordCommands yes\n" +
		`RecordRedact (?i)password=\S+` + "\n" + `RecordRedact "-----BEGIN [A-Z ]+-----[^-]+-----END [A-Z ]+-----"`})
	const pause = "; read x; " // what has arrived has been recorded
	secret := "printf 'a passw'" + pause + "printf 'ord=hun'" + pause + "printf 'ter2 b\\n'"
	for _, tt := range []struct {
		name, command, client, errs, recorded string
		tty                                   bool
	}{
		{"pieces", secret, "a password=hunter2 b\n", "", "a [redacted] b\r\n", false},
		{"terminal", "stty -echo; " + secret, "a password=hunter2 b\r\n", "", "a [redacted] b\r\n", true},
		{"both outputs", "printf 'PASS' >&2" + pause + "echo out" + pause + "echo WORD=x >&2", "out\n", "PASSWORD=x\n", "[redacted]out\r\n\r\n", false},
		{"lines", "echo -----BEGIN A KEY-----; echo xyz; echo -----END A KEY-----", "-----BEGIN A KEY-----\nxyz\n-----END A KEY-----\n", "", "[redacted]\r\n", false},
		{"end", "printf password=x", "password=x", "", "[redacted]", false},
	} {
		args := []string{"-q", host, tt.command}
		if tt.tty {
			args = append([]string{"-tt"}, args...)
		}
		cmd := j.tool("ssh", args...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, errs := &prompting{in: in}, &prompting{in: in}
		cmd.Stdout, cmd.Stderr = out, errs
		if err := cmd.Run(); out.text.String() != tt.client || errs.text.String() != tt.errs || err != nil {
			t.Errorf("%s: the client gets %q, %q, %v", tt.name, &out.text, &errs.text, err)
		}
		eventually(t, "the recording is complete", func() bool { return len(casts(t, dir, ".cast")) == 1 && len(casts(t, dir, ".part")) == 0 })
		path := casts(t, dir, ".cast")[0]
		c := readCast(t, path)
		if got := c.text(castOutput); got != tt.recorded {
			t.Errorf("%s: recorded %q, want %q", tt.name, got, tt.recorded)
		}
		if plain := strings.HasSuffix(c.head.Title, ", without a terminal"); plain == tt.tty || plain == (c.head.Env["TERM"] != "") {
			t.Errorf("%s: header %+v", tt.name, c.head)
		}
		if tt.name == "pieces" && len(c.events) == 2 && c.events[0][0] == c.events[1][0] {
			t.Errorf("the pieces have lost their times: %v", c.events)
		}
		os.Remove(path)
	}
	sftp := j.tool("sftp", "-b", "-", host)
	sftp.Stdin = strings.NewReader("ls /\n")
	if _, errs, code := run(t, sftp); code != 0 || len(casts(t, dir, "")) != 0 {
		t.Errorf("sftp: %d %s, recorded in %q", code, errs, casts(t, dir, ""))
	}
}

// TestRecordingPlace: what lies in the image would be packed.
func TestRecordingPlace(t *testing.T) {
	root := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(root, "casts")
	for _, dir := range []string{root, inside, link, filepath.Join(link, "casts"), "relative"} {
		if _, err := newRecordings(&sshdconf.Settings{RecordDirectory: dir}, root, ""); err == nil {
			t.Errorf("records in %s", dir)
		}
	}
	if _, err := os.Stat(inside); err == nil {
		t.Error("a directory was made in the image")
	}
}

// TestRecordingFull: a full disk ends the recording, not the session.
func TestRecordingFull(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "mount", "umount")
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=256k", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	j := start(t, options{config: "RecordDirectory " + dir})
	s := newSession(t, j.dial())
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	out, err := s.Output("head -c 2000000 /dev/zero | tr '\\0' x; echo; echo end")
	if err != nil || len(out) != 2000000+len("\r\nend\r\n") || !bytes.HasSuffix(out, []byte("\r\nend\r\n")) {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	j.awaitLog("recording stopped")
	eventually(t, "the file has its name", func() bool { return len(casts(t, dir, ".cast")) == 1 })
	if c := readCast(t, casts(t, dir, ".cast")[0]); len(c.text(castOutput)) < 50000 {
		t.Errorf("only %d bytes were recorded", len(c.text(castOutput)))
	}
	j.cancel()
	<-j.ended
}

// TestRecordingLimits: a recording ends, with a marker, at its limit and when the disk does not keep up; neither blocks.
func TestRecordingLimits(t *testing.T) {
	start := func(total int64) (*recordings, *recording, string) {
		dir := t.TempDir()
		r, err := newRecordings(&sshdconf.Settings{RecordDirectory: dir}, t.TempDir(), "job")
		if err != nil {
			t.Fatal(err)
		}
		r.total.Store(total)
		rec, err := r.start("1.1", "title", &jail.TTY{Term: "vt100"}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return r, rec, dir
	}
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	end := func(r *recordings, rec *recording, dir string) cast {
		rec.stop()
		r.close()
		return readCast(t, casts(t, dir, ".cast")[0])
	}

	r, rec, dir := start(maxRecordings - 100<<10)
	rec.add(castOutput, 0, chunk)
	if c := end(r, rec, dir); !strings.Contains(c.text(castMarker), "this job's recordings") || c.head.Width != 80 || c.head.Height != 24 {
		t.Errorf("marker %q, header %+v", c.text(castMarker), c.head)
	}
	w := &castWriter{file: os.NewFile(0, "unused"), total: &atomic.Int64{}, most: maxPlain, size: maxPlain - reserve - 100}
	if err := w.event(castEvent{time.Now(), castOutput, 0, chunk[:200]}); err == nil || err.Error() != "it has reached 4 MiB" {
		t.Errorf("beyond the limit: %v", err)
	}

	// Nobody writes this one.
	stuck := &recording{wake: make(chan struct{}, 1)}
	for range 100 {
		stuck.add(castOutput, 0, chunk)
	}
	if !stuck.ended || stuck.size > maxUnwritten || stuck.cut == "" {
		t.Errorf("%d bytes wait for a disk that hangs", stuck.size)
	}
}

// FuzzCastWriter: whatever a terminal shows, in whatever pieces, each line is valid and nothing but invalid bytes is lost.
func FuzzCastWriter(f *testing.F) {
	f.Add([]byte("a\xc3\xa4b\xff\xe2\x82"), uint8(2))
	f.Add([]byte("\xf0\x9f\x98\x80\xf0\x9f"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		w := &castWriter{file: file, total: &atomic.Int64{}, most: maxRecording, began: time.Now()}
		if err := w.line(castHeader{Version: 2, Width: 80, Height: 24, Timestamp: 1}); err != nil {
			t.Fatal(err)
		}
		for rest := data; len(rest) > 0; {
			n := min(int(piece)+1, len(rest))
			if err := w.event(castEvent{time.Now(), castOutput, 0, rest[:n]}); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if len(w.rest[0]) >= utf8.UTFMax {
			t.Errorf("%d bytes held back", len(w.rest[0]))
		}
		whole := data[:len(data)-len(w.rest[0])]
		if got, want := readCast(t, file.Name()).text(castOutput), string([]rune(string(whole))); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	})
}
