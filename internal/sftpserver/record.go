// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// MaxRecord bounds a record with its newline, in bytes: writes up to this size to a pipe are atomic (PIPE_BUF, pipe(7)).
const MaxRecord = 4096

// longPath is where paths are cut when a record would be too long, in bytes; JSON may need six for one.
const longPath = 300

// Record is one operation in the log, written as a line of JSON.
type Record struct {
	Op      string `json:"op"`               // a request of sftp-server(8), closedir, or forced close
	Path    string `json:"path,omitempty"`   // as the client named it
	Target  string `json:"target,omitempty"` // the second path: the new name, or what the link holds
	Flags   string `json:"flags,omitempty"`  // of open: READ,WRITE,APPEND,CREATE,TRUNCATE,EXCL
	Mode    string `json:"mode,omitempty"`   // octal, of open and mkdir
	Attrs   string `json:"attrs,omitempty"`  // what setstat sets
	Read    int64  `json:"read,omitempty"`   // bytes, at close
	Written int64  `json:"written,omitempty"`
	Err     string `json:"err,omitempty"`
	Full    bool   `json:"full,omitempty"` // the error is that of a full disk or quota
	Lost    int    `json:"lost,omitempty"` // records before this one that the reader of the log did not take
}

// beginRecord starts the record of a request.
func (s *server) beginRecord(op string) { s.record, s.failing = Record{Op: op}, nil }

// endRecord writes the record of the request that has been answered, if the level asks for it. Reads and writes are
// only told of when they fail, and then once for each opening of a file.
func (s *server) endRecord() {
	r := &s.record
	switch r.Op {
	case "":
		return
	case "read", "write", "readdir", "limits", "users-groups-by-id":
		if r.Err == "" {
			return
		}
		if f := s.failing; f != nil {
			if f.failed {
				return
			}
			f.failed = true
		}
	}
	if requests[r.Op].level <= s.opts.Level {
		s.tell(*r)
	}
}

// tell writes a record to the log.
func (s *server) tell(r Record) {
	if s.log == nil || s.opts.Level == LogNothing {
		return
	}
	r.Lost = s.lost
	r.Path, r.Target = readable(r.Path), readable(r.Target)
	line, err := json.Marshal(r)
	if err == nil && len(line) >= MaxRecord {
		r.Path, r.Target = shorten(r.Path), shorten(r.Target)
		line, err = json.Marshal(r)
	}
	if err == nil {
		_, err = s.log.Write(append(line, '\n'))
	}
	if err != nil {
		s.lost++
		return
	}
	s.lost = 0
}

// readable is s, or s with what is no UTF-8 as \xff, which JSON could not tell.
func readable(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

func shorten(s string) string {
	if len(s) <= longPath {
		return s
	}
	return strings.ToValidUTF8(s[:longPath], "") + "..."
}

// fault notes why the request under way failed.
func (r *Record) fault(err error, code uint32, text string) {
	if code <= codeEOF {
		return
	}
	r.Err = text
	r.Full = errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// closed notes what was done with a file that is closed now.
func (r *Record) closed(f *openFile) {
	r.Path, r.Read, r.Written = f.path, f.read, f.written
	if f.dir {
		r.Op = "closedir"
	}
}

func flagNames(flags uint32) string {
	var names []string
	for _, f := range []struct {
		flag uint32
		name string
	}{{openRead, "READ"}, {openWrite, "WRITE"}, {openAppend, "APPEND"}, {openCreate, "CREATE"}, {openTrunc, "TRUNCATE"}, {openExcl, "EXCL"}} {
		if flags&f.flag != 0 {
			names = append(names, f.name)
		}
	}
	return strings.Join(names, ",")
}

func octal(mode uint32) string { return fmt.Sprintf("%04o", mode&0o7777) }

// String is what a record tells of attributes.
func (a attrs) String() string {
	var told []string
	if a.flags&attrSize != 0 {
		told = append(told, fmt.Sprintf("size=%d", a.size))
	}
	if a.flags&attrOwner != 0 {
		told = append(told, fmt.Sprintf("owner=%d:%d", int32(a.uid), int32(a.gid)))
	}
	if a.flags&attrMode != 0 {
		told = append(told, "mode="+octal(a.mode))
	}
	if a.flags&attrTimes != 0 {
		told = append(told, fmt.Sprintf("mtime=%d", a.mtime))
	}
	return strings.Join(told, " ")
}
