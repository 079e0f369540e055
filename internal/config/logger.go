// SPDX-License-Identifier: Apache-2.0

package config

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"
)

// NewLogger writes key=value lines to w, or with LogJSON one JSON object a
// line; attrs, such as "job", id, are on each of them. On a terminal the date
// is left out of the former, because a person who looks on knows it.
func NewLogger(w io.Writer, format string, level slog.Level, attrs ...any) *slog.Logger {
	opt := &slog.HandlerOptions{Level: level}
	if format == LogJSON {
		opt.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			if a.Value.Kind() == slog.KindDuration { // else a number of nanoseconds
				a.Value = slog.StringValue(a.Value.String())
			}
			return a
		}
		return slog.New(slog.NewJSONHandler(w, opt)).With(attrs...)
	}
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
