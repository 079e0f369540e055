// SPDX-License-Identifier: Apache-2.0

// Package progress reports how far a long transfer or pass has come: as a bar
// to a person at a terminal, as an occasional log line to everybody else.
//
// It refuses to flood a log: a line comes per tenth of the whole, but not within
// 2 s of the one before, and after 30 s without one, however often it is updated.
// It measures nothing itself.
package progress

import (
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

const (
	lineEvery = 30 * time.Second
	lineApart = 2 * time.Second
	step      = 10 // percent between two lines
	drawEvery = 100 * time.Millisecond
)

// P reports on one piece of work. It may be updated from several goroutines.
type P struct {
	mu       sync.Mutex
	name     string
	bar      *progressbar.ProgressBar // nil: log lines
	log      *slog.Logger
	now      func() time.Time
	start    time.Time
	lastLine time.Time
	lastStep int64
	done     int64
	total    int64 // bytes; 0 or less: not known
	finished bool
}

// New reports to w: with a bar if it is a terminal, else with lines. total
// may be 0 while it is not known.
func New(w io.Writer, name string, total int64) *P {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return NewLog(slog.New(slog.NewTextHandler(w, nil)), name, total)
	}
	p := NewLog(nil, name, total)
	p.bar = progressbar.NewOptions64(barTotal(total), progressbar.OptionSetDescription(name), progressbar.OptionSetWriter(w),
		progressbar.OptionShowBytes(true), progressbar.OptionThrottle(drawEvery), progressbar.OptionFullWidth(),
		progressbar.OptionOnCompletion(func() { _, _ = io.WriteString(w, "\n") }))
	return p
}

// NewLog reports with lines to log.
func NewLog(log *slog.Logger, name string, total int64) *P {
	now := time.Now()
	return &P{name: name, log: log, now: time.Now, start: now, lastLine: now, total: total}
}

// barTotal is how the bar is told that the total is not known.
func barTotal(total int64) int64 {
	if total <= 0 {
		return -1
	}
	return total
}

// Update says that done bytes of total are done. A total of 0 or less leaves
// the one known so far. A smaller done than before counts as a fresh start.
func (p *P) Update(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.finished {
		return
	}
	if total > 0 && total != p.total {
		p.total = total
		if p.bar != nil {
			p.bar.ChangeMax64(total)
		}
	}
	if done < p.done {
		p.lastStep = 0
	}
	p.done = done
	if p.bar != nil {
		_ = p.bar.Set64(done)
		return
	}
	now, at := p.now(), p.lastStep
	if p.total > 0 {
		at = percent(done, p.total) / step
	}
	since := now.Sub(p.lastLine)
	if at > p.lastStep && since >= lineApart || since >= lineEvery {
		p.lastStep, p.lastLine = max(at, p.lastStep), now
		p.line()
	}
}

// Finish ends the report. Further updates are ignored.
func (p *P) Finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.finished {
		return
	}
	p.finished = true
	if p.bar != nil {
		_ = p.bar.Finish()
		return
	}
	p.log.Info(p.name+" done", "bytes", p.done, "seconds", p.now().Sub(p.start).Round(10*time.Millisecond).Seconds())
}

func (p *P) line() {
	attrs := []any{"bytes", p.done}
	if p.total > 0 {
		attrs = append(attrs, "of", p.total, "percent", percent(p.done, p.total))
	}
	p.log.Info(p.name, attrs...)
}

// percent avoids the overflow that 100*done has for large images.
func percent(done, total int64) int64 {
	return min(100, int64(100*(float64(done)/float64(total))))
}
