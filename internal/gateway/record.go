// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// Limits of recordings, in bytes. What a terminal shows is text: an hour of busy work is a few megabytes.
const (
	maxRecording  = 64 << 20 // one file
	maxPlain      = 4 << 20  // one file of a session without a terminal, which may well be moving files
	maxRecordings = 1 << 30  // all files of one gateway
	maxUnwritten  = 4 << 20  // of one session's output, waiting for the disk
)

// recordings keeps what the sessions of a job showed: one file per session with a terminal, whatever its command, and with
// RecordCommands also per command without one, in the asciicast format, version 2. Input is not recorded, because passwords
// are typed; nor is SFTP, of which the log has each operation.
//
// A recording never holds its session up: output is copied to memory, and a goroutine of its own writes it. When that
// cannot keep up, the disk is full or a limit is reached, the recording ends with a marker that says so, and the session
// goes on.
type recordings struct {
	dir   *os.Root
	job   string
	plain bool // commands without a terminal, too
	masks []*regexp.Regexp
	total atomic.Int64   // bytes written
	open  sync.WaitGroup // recordings
}

// newRecordings prepares dir, which must not lie in the image root.
func newRecordings(set *sshdconf.Settings, imageRoot, job string) (*recordings, error) {
	dir := set.RecordDirectory
	fail := func(err error) (*recordings, error) { return nil, fmt.Errorf("RecordDirectory %s: %w", dir, err) }
	if !filepath.IsAbs(dir) {
		return fail(errors.New("not an absolute path"))
	}
	image, err := filepath.EvalSymlinks(imageRoot)
	if err != nil {
		return fail(err)
	}
	real, err := resolve(dir)
	if err != nil {
		return fail(err)
	}
	if rel, err := filepath.Rel(image, real); err == nil && filepath.IsLocal(rel) {
		return fail(errors.New("it lies in the image root and would be packed; choose a directory outside"))
	}
	if err := os.MkdirAll(real, 0o700); err != nil {
		return fail(err)
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return fail(err)
	}
	if job == "" {
		job = "job"
	}
	return &recordings{dir: root, job: strings.ReplaceAll(job, "/", "_"), plain: set.RecordCommands, masks: set.RecordRedact}, nil
}

// resolve follows the links of a path, of which the end need not exist yet.
func resolve(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) || path == "/" {
		return real, err
	}
	dir, err := resolve(filepath.Dir(path))
	return filepath.Join(dir, filepath.Base(path)), err
}

// recordingsEnd is how long the last bytes may take at the end of the job.
const recordingsEnd = 2 * time.Second

// close waits for the files to be complete, but not for a disk that hangs.
func (r *recordings) close() {
	if r == nil {
		return
	}
	done := make(chan struct{})
	go func() {
		r.open.Wait()
		r.dir.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(recordingsEnd):
	}
}

// record starts the recording of the session, if there shall be one; tty is nil without a terminal. The caller holds mu. A
// session that cannot be recorded goes on without.
func (ss *session) record(tty *jail.TTY) {
	r := ss.c.srv.recorder
	if r == nil || tty == nil && !r.plain {
		return
	}
	title := fmt.Sprintf("%s from %s, key %s %s", user, ss.c.RemoteAddr(), ss.login.key.Fingerprint(), ss.login.key.Comment)
	rec, err := r.start(ss.name(), title, tty, ss.log)
	if err != nil {
		ss.log.Warn("session is not recorded", "err", err)
		return
	}
	ss.recording = rec
	ss.out.w = rec.tee(ss.out.w, 0)
}

// castHeader is the first line of an asciicast v2 file.
type castHeader struct {
	Version   int               `json:"version"`
	Width     uint32            `json:"width"`
	Height    uint32            `json:"height"`
	Timestamp int64             `json:"timestamp"`
	Title     string            `json:"title"`
	Env       map[string]string `json:"env,omitempty"`
}

// Codes of events.
const (
	castOutput = "o"
	castResize = "r"
	castMarker = "m"
)

// castStreams is how many outputs a session has; asciicast has but one code for both.
const castStreams = 2

type castEvent struct {
	at     time.Time
	code   string
	stream int // of output: 0, or 1 for standard error
	data   []byte
}

// shown is how many bytes of output the event holds.
func (e castEvent) shown() int {
	if e.code != castOutput {
		return 0
	}
	return len(e.data)
}

// recording is one session's. A nil one takes everything and records nothing.
type recording struct {
	rec   *recordings
	log   *slog.Logger
	file  *os.File
	name  string // it has partSuffix until it is complete
	began time.Time
	plain bool // no terminal

	mu    sync.Mutex
	queue []castEvent
	size  int    // bytes in queue
	ended bool   // nothing is queued any more
	cut   string // why, if before the session's end
	wake  chan struct{}
}

const partSuffix = ".part"

// slow is why a recording ends whose writer is behind: with the disk, or with RecordRedact.
const slow = "the disk, or the search for RecordRedact, is too slow"

// start begins a recording with the terminal's size as it is now; tty is nil without one.
func (r *recordings) start(id, title string, tty *jail.TTY, log *slog.Logger) (*recording, error) {
	began := time.Now()
	name := fmt.Sprintf("%s-%s-%s.cast", r.job, began.UTC().Format("20060102T150405.000Z"), id)
	file, err := r.dir.OpenFile(name+partSuffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	rec := &recording{rec: r, log: log, file: file, name: name, began: began, plain: tty == nil, wake: make(chan struct{}, 1)}
	head := castHeader{Version: 2, Width: 80, Height: 24, Timestamp: began.Unix(), Title: title + ", without a terminal"}
	if tty != nil {
		head.Width, head.Height, head.Title = sizeOr(tty.Cols, 80), sizeOr(tty.Rows, 24), title
		head.Env = map[string]string{"TERM": tty.Term}
	}
	r.open.Go(func() { rec.write(head) })
	log.Info("session is recorded", "file", filepath.Join(r.dir.Name(), name))
	return rec, nil
}

// sizeOr stands in for the size that a client without a window sends, 0.
func sizeOr(n, instead uint32) uint32 {
	if n == 0 {
		return instead
	}
	return n
}

// tee records what is written to w, the session's given stream.
func (r *recording) tee(w io.Writer, stream int) io.Writer {
	if r == nil {
		return w
	}
	return tee{w, r, stream}
}

type tee struct {
	io.Writer
	r      *recording
	stream int
}

func (t tee) Write(b []byte) (int, error) {
	t.r.add(castOutput, t.stream, b)
	return t.Writer.Write(b)
}

func (r *recording) resize(cols, rows uint32) {
	if r != nil {
		r.add(castResize, 0, fmt.Appendf(nil, "%dx%d", sizeOr(cols, 80), sizeOr(rows, 24)))
	}
}

func (r *recording) add(code string, stream int, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Now() // two outputs are written at a time
	if r.ended {
		return
	}
	if r.size+len(data) > maxUnwritten {
		r.ended, r.cut = true, slow
	} else {
		r.queue = append(r.queue, castEvent{at, code, stream, bytes.Clone(data)})
		r.size += len(data)
	}
	r.signal()
}

func (r *recording) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// stop ends the recording; the file is complete a moment later.
func (r *recording) stop() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.signal()
}

// contain turns a panic into the end of the recording; the session goes on.
func (r *recording) contain() {
	if p := recover(); p != nil {
		r.log.Error("panic in recording", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		r.mu.Lock()
		r.ended, r.queue = true, nil
		r.mu.Unlock()
	}
}

// write writes the file until the recording has ended.
func (r *recording) write(head castHeader) {
	defer r.contain()
	w := &castWriter{file: r.file, total: &r.rec.total, began: r.began, most: maxRecording}
	if r.plain {
		w.most, w.plain = maxPlain, true
	}
	masks := &redactor{patterns: r.rec.masks}
	err := w.line(head)
	for ended := false; err == nil && !ended; {
		<-r.wake
		var queue []castEvent
		r.mu.Lock()
		queue, r.queue, r.size, ended = r.queue, nil, 0, r.ended
		r.mu.Unlock()
		for _, e := range queue {
			var known []castEvent
			if known, err = masks.add(e); err == nil {
				err = w.events(known)
			}
			if err != nil {
				break
			}
		}
	}
	r.mu.Lock()
	r.ended, r.queue = true, nil
	cut := r.cut
	r.mu.Unlock()
	if err == nil && cut == "" { // else the end of a match may be missing
		var known []castEvent
		if known, err = masks.flush(); err == nil {
			err = w.events(known)
		}
	}
	if err != nil && cut == "" {
		cut = err.Error()
	}
	if cut != "" {
		r.log.Warn("recording stopped", "why", cut)
		w.marker("recording stopped: " + cut)
	}
	if err := errors.Join(r.file.Close(), r.rec.dir.Rename(r.name+partSuffix, r.name)); err != nil {
		r.log.Warn("recording is incomplete", "err", err)
	}
}

// castWriter writes lines to a file within the limits.
type castWriter struct {
	file  *os.File
	total *atomic.Int64 // bytes of all recordings
	most  int64         // bytes of this one
	plain bool          // no terminal has made CR LF of each LF
	size  int64
	began time.Time
	buf   bytes.Buffer
	rest  [castStreams][]byte // the beginning of a character whose other bytes are still to come
}

// reserve is kept of each recording's limit for the marker at its end.
const reserve = 512

var errTotalLimit = fmt.Errorf("this job's recordings have reached %d MiB", maxRecordings>>20)

func (w *castWriter) events(es []castEvent) error {
	for _, e := range es {
		if err := w.event(e); err != nil {
			return err
		}
	}
	return nil
}

// event writes one event. Output is cut between characters only, since each event is a JSON string of its own; a byte
// that belongs to no character becomes U+FFFD.
func (w *castWriter) event(e castEvent) error {
	if e.code == castOutput {
		e.data = append(w.rest[e.stream], e.data...)
		whole := len(e.data) - incomplete(e.data)
		w.rest[e.stream] = bytes.Clone(e.data[whole:])
		if e.data = e.data[:whole]; whole == 0 {
			return nil
		}
		if w.plain {
			e.data = bytes.ReplaceAll(e.data, []byte("\n"), []byte("\r\n"))
		}
	}
	seconds := json.Number(fmt.Sprintf("%.6f", max(e.at.Sub(w.began), 0).Seconds()))
	return w.line([]any{seconds, e.code, string(e.data)})
}

// incomplete returns how many bytes at the end of b may begin a character.
func incomplete(b []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if c := b[len(b)-n]; utf8.RuneStart(c) {
			if c >= utf8.RuneSelf && !utf8.FullRune(b[len(b)-n:]) {
				return n
			}
			return 0
		}
	}
	return 0
}

func (w *castWriter) line(v any) error {
	w.buf.Reset()
	enc := json.NewEncoder(&w.buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	n := int64(w.buf.Len())
	switch {
	case w.size+n > w.most-reserve:
		return fmt.Errorf("it has reached %d MiB", w.most>>20)
	case w.total.Load()+n > maxRecordings-reserve:
		return errTotalLimit
	}
	return w.flush()
}

// flush writes the line in buf, or none of it, so that what is there can be replayed.
func (w *castWriter) flush() error {
	n, err := w.file.Write(w.buf.Bytes())
	if err != nil && n > 0 {
		n = 0
		if terr := w.file.Truncate(w.size); terr == nil {
			_, terr = w.file.Seek(w.size, io.SeekStart)
			err = errors.Join(err, terr)
		}
	}
	w.size += int64(n)
	w.total.Add(int64(n))
	return err
}

// marker writes the last line, outside the limits; on a full disk it may be missing.
func (w *castWriter) marker(text string) {
	w.buf.Reset()
	line, err := json.Marshal([]any{json.Number(fmt.Sprintf("%.6f", time.Since(w.began).Seconds())), castMarker, text})
	if err != nil {
		return
	}
	w.buf.Write(append(line, '\n'))
	_ = w.flush() // there is nobody left to tell but the log, which has the reason already
}
