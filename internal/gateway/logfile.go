// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"log/slog"
	"os"
)

// maxLogFile is how large the file of -E may become, in bytes; then it becomes the old one, of which there is one. A job
// may be open for weeks, and who is root in it can make the gateway write 5000 lines a second.
const maxLogFile = 64 << 20

// oldSuffix names the file before.
const oldSuffix = ".1"

// logFile is the file of -E. The logger writes one line at a time, and one after the other.
type logFile struct {
	path  string
	most  int64
	file  *os.File // nil: there is none any more
	size  int64
	other *slog.Logger // is told why
}

func openLogFile(path string, most int64, other *slog.Logger) (*logFile, error) {
	l := &logFile{path: path, most: most, other: other}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.file, l.size = f, st.Size()
	if !st.Mode().IsRegular() { // a terminal, /dev/null, a pipe: they have no end
		l.most = 0
	}
	return nil
}

// Write never fails: the log's other reader, standard error, is not to lose a line because a disk is full.
func (l *logFile) Write(b []byte) (int, error) {
	if l.file != nil && l.most > 0 && l.size > 0 && l.size+int64(len(b)) > l.most {
		if err := l.turn(); err != nil {
			l.file = nil
			l.other.Error("the log file ends here: it has reached its size", "file", l.path, "bytes", l.most, "err", err)
		}
	}
	if l.file != nil {
		n, _ := l.file.Write(b)
		l.size += int64(n)
	}
	return len(b), nil
}

// turn makes the file the old one and begins a new one.
func (l *logFile) turn() error {
	err := os.Rename(l.path, l.path+oldSuffix)
	if err = errors.Join(err, l.file.Close()); err != nil {
		return err
	}
	return l.open()
}

// Close closes the file.
func (l *logFile) Close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}
