// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The log on disk is bounded and keeps the newest lines, each of them whole, and goes on where an earlier run ended.
func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sshd.log")
	const most = 1000
	n := 0
	for range 3 {
		var other bytes.Buffer
		l, err := openLogFile(path, most, slog.New(slog.NewTextHandler(&other, nil)))
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			n++
			if w, err := fmt.Fprintf(l, "line %04d\n", n); w != 10 || err != nil {
				t.Fatalf("%d, %v", w, err)
			}
		}
		if err := l.Close(); err != nil || other.Len() > 0 {
			t.Errorf("%v, %s", err, &other)
		}
	}
	var text string
	for _, name := range []string{path + oldSuffix, path} {
		b, err := os.ReadFile(name)
		if err != nil || len(b) > most {
			t.Fatalf("%s: %d bytes, %v", name, len(b), err)
		}
		text += string(b)
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, line := range lines {
		if want := fmt.Sprintf("line %04d", n-len(lines)+1+i); line != want {
			t.Fatalf("line %d of %d: %q, want %q", i, len(lines), line, want)
		}
	}
	if len(lines) < most/10 {
		t.Errorf("only %d lines are kept", len(lines))
	}
}

// A file that cannot be turned over or written ends, and is told of once; nobody else loses a line.
func TestLogFileCannot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sshd.log")
	var other bytes.Buffer
	l, err := openLogFile(path, 30, slog.New(slog.NewTextHandler(&other, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path+oldSuffix, "in the way"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if n, err := l.Write([]byte("0123456789")); n != 10 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if b, err := os.ReadFile(path); len(b) != 30 || err != nil || strings.Count(other.String(), "ends here") != 1 {
		t.Errorf("%d bytes, %v, told %q", len(b), err, &other)
	}
	full, err := openLogFile("/dev/full", 10, slog.New(slog.NewTextHandler(&other, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if n, err := full.Write([]byte("0123456789")); n != 10 || err != nil {
			t.Errorf("full disk: %d, %v", n, err)
		}
	}
}
