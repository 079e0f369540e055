// SPDX-License-Identifier: Apache-2.0

package config

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"
)

// NewLogger writes key=value lines to w; attrs, such as "job", id, are on
// each of them. On a terminal the date is left out, because a person who
// looks on knows it.
func NewLogger(w io.Writer, level slog.Level, attrs ...any) *slog.Logger {
	opt := &slog.HandlerOptions{Level: level}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		opt.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				a.Value = slog.StringValue(a.Value.Time().Format("15:04:05"))
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, opt)).With(attrs...)
}
