// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits, in bytes. The first two are OpenSSH's, and what limits@openssh.com tells.
const (
	maxPacket = 256 << 10        // a packet without its length
	maxData   = maxPacket - 1024 // the data of one read or write

	inBuffer = 2 * maxPacket // packets are taken from it in one piece
	flushAt  = maxPacket     // answers are written at the latest when they are as large as this

	// maxNames is the size at which a directory listing's answer is full: every client must take 34,000 bytes
	// (section 3), and one entry is less than 1,500.
	maxNames = 32000
)

// errMalformed ends the session: after such a packet the stream cannot be trusted.
var errMalformed = errors.New("malformed SFTP packet")

// Status codes (section 7).
const (
	codeOK               = 0
	codeEOF              = 1
	codeNoSuchFile       = 2
	codePermissionDenied = 3
	codeFailure          = 4
	codeBadMessage       = 5
	codeUnsupported      = 8
)

// A fault is an answer that is not the error of a system call.
type fault struct {
	code uint32
	text string
}

func (f *fault) Error() string { return f.text }

var (
	errEOF         = &fault{codeEOF, "End of file"}
	errUnsupported = &fault{codeUnsupported, "Operation unsupported"}
	errHandle      = &fault{codeFailure, "Invalid handle"}
	errRefused     = &fault{codePermissionDenied, "Not permitted by the server's configuration"}
)

// server is one session. It does one request after the other, in the order of their arrival: what clients expect of
// overlapping writes holds, and answers need no sorting. Reading ahead and writing behind is done by the pipes.
type server struct {
	out     io.Writer
	buf     []byte // answers not yet written
	started int    // where the answer under construction begins in buf
	init    bool   // the client has told its version
	handles handles
	names   names

	opts    Options
	log     io.Writer // nil: none
	lost    int       // records it did not take
	record  Record    // of the request under way
	failing *openFile // the file it reads or writes
	refused [256]bool // packet types, by opts
}

// Serve answers the requests read from in on out until the end of in, and closes what the client left open. It works on
// the process's own file system: relative paths begin at its working directory, which the client takes for its home, and
// its umask applies; Umask and Dir of opts are for the caller to apply. Each record of what is done is written to log in
// one piece of at most MaxRecord bytes; one that log does not take at once is lost, and the next one that it takes tells
// how many were. The error is nil when in ends between two packets; otherwise it says why the session ended.
func Serve(in io.Reader, out io.Writer, opts Options, log io.Writer) error {
	s := &server{out: out, handles: newHandles(), names: newNames("/etc/passwd", "/etc/group"), opts: opts, log: log}
	for typ, name := range requestNames {
		s.refused[typ] = name != "" && opts.refused(name)
	}
	defer s.closeAll()
	return s.serve(in)
}

// closeAll closes what the client left open.
func (s *server) closeAll() {
	for _, f := range s.handles.files {
		if f == nil {
			continue
		}
		r := Record{}
		if r.closed(f); !f.dir {
			r.Op = "forced close"
			s.tell(r)
		}
	}
	s.handles.closeAll()
}

func (s *server) serve(in io.Reader) error {
	buf := make([]byte, inBuffer)
	begin, end := 0, 0 // of what has been read and not yet answered
	for {
		for end-begin >= 4 {
			n := int64(binary.BigEndian.Uint32(buf[begin:]))
			if n < 1 || n > maxPacket {
				return errors.Join(fmt.Errorf("%w: length %d", errMalformed, n), s.flush())
			}
			if int64(end-begin-4) < n {
				break
			}
			next := begin + 4 + int(n)
			err := s.request(packet{b: buf[begin+4 : next]})
			s.endRecord()
			if err != nil {
				return errors.Join(err, s.flush())
			}
			begin = next
			if len(s.buf) >= flushAt {
				if err := s.flush(); err != nil {
					return err
				}
			}
		}
		if err := s.flush(); err != nil {
			return err
		}
		if begin > 0 {
			end, begin = copy(buf, buf[begin:end]), 0
		}
		n, err := in.Read(buf[end:])
		end += n
		switch {
		case n > 0: // an error comes again
		case err == io.EOF && end == 0:
			return nil
		case err == io.EOF:
			return fmt.Errorf("input ends in the middle of a packet: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return fmt.Errorf("read request: %w", err)
		}
	}
}

func (s *server) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.out.Write(s.buf)
	s.buf = s.buf[:0]
	if err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	return nil
}

// request answers one packet. An error ends the session.
func (s *server) request(p packet) error {
	typ, id := p.uint8(), p.uint32()
	if p.bad {
		return errMalformed
	}
	if typ == typeInit { // its id is the client's version
		s.init = true
		s.version()
		return nil
	}
	if !s.init {
		return fmt.Errorf("%w: request %d before the version", errMalformed, typ)
	}
	s.beginRecord(requestNames[typ])
	if s.refused[typ] {
		s.status(id, errRefused)
		return nil
	}
	r := &s.record
	switch typ {
	case typeOpen:
		return s.open(id, &p)
	case typeClose:
		h := p.bytes()
		return s.act(id, &p, func() error {
			if f := s.handles.any(h); f != nil {
				r.closed(f)
			}
			return s.handles.close(h)
		})
	case typeRead:
		return s.read(id, &p)
	case typeWrite:
		return s.write(id, &p)
	case typeStat, typeLstat, typeFstat:
		return s.stat(id, &p, typ)
	case typeSetstat:
		path, a := p.text(), p.attrs()
		r.Path, r.Attrs = path, a.String()
		return s.act(id, &p, func() error { return a.apply(pathTarget(path)) })
	case typeFsetstat:
		h, a := p.bytes(), p.attrs()
		return s.act(id, &p, func() error {
			f := s.handles.file(h)
			if f == nil {
				return errHandle
			}
			r.Path, r.Attrs = f.path, a.String()
			return a.apply(fdTarget(f.fd))
		})
	case typeOpendir:
		return s.opendir(id, &p)
	case typeReaddir:
		return s.readdir(id, &p)
	case typeRemove:
		path := p.text()
		r.Path = path
		return s.act(id, &p, func() error { return unix.Unlink(path) })
	case typeMkdir:
		path, a := p.text(), p.attrs()
		r.Path, r.Mode = path, octal(mkdirMode(a))
		return s.act(id, &p, func() error { return unix.Mkdir(path, mkdirMode(a)) })
	case typeRmdir:
		path := p.text()
		r.Path = path
		return s.act(id, &p, func() error { return unix.Rmdir(path) })
	case typeRealpath:
		path := p.text()
		r.Path = path
		return s.name(id, &p, func() (string, error) { return realpath(path) })
	case typeRename:
		from, to := p.text(), p.text()
		r.Path, r.Target = from, to
		return s.act(id, &p, func() error { return rename(from, to) })
	case typeReadlink:
		path := p.text()
		r.Path = path
		return s.name(id, &p, func() (string, error) { return readlink(path) })
	case typeSymlink:
		// OpenSSH has the two in the order of symlink(2), the draft in the other one; clients follow OpenSSH.
		target, link := p.text(), p.text()
		r.Path, r.Target = link, target
		return s.act(id, &p, func() error { return unix.Symlink(target, link) })
	case typeExtended:
		return s.extended(id, &p)
	}
	s.status(id, errUnsupported)
	return nil
}

// act answers with the status of f.
func (s *server) act(id uint32, p *packet, f func() error) error {
	if p.bad {
		return errMalformed
	}
	s.status(id, retry(f))
	return nil
}

// name answers with one name, or a status if f fails.
func (s *server) name(id uint32, p *packet, f func() (string, error)) error {
	if p.bad {
		return errMalformed
	}
	name, err := f()
	if err != nil {
		s.status(id, err)
		return nil
	}
	s.begin(typeName, id)
	s.uint32(1)
	s.buf = appendString(s.buf, name)
	s.buf = appendString(s.buf, name)
	s.uint32(0) // no attributes
	s.end()
	return nil
}

// begin starts an answer; end completes it.
func (s *server) begin(typ uint8, id uint32) {
	s.started = len(s.buf)
	s.buf = append(s.buf, 0, 0, 0, 0, typ)
	s.uint32(id)
}

func (s *server) end() {
	binary.BigEndian.PutUint32(s.buf[s.started:], uint32(len(s.buf)-s.started-4))
}

func (s *server) uint32(v uint32) { s.buf = binary.BigEndian.AppendUint32(s.buf, v) }
func (s *server) uint64(v uint64) { s.buf = binary.BigEndian.AppendUint64(s.buf, v) }

// status answers with the code OpenSSH has for err and, other than OpenSSH, with what the system says about it: code 4
// alone does not tell a full disk from a directory that is not empty.
func (s *server) status(id uint32, err error) {
	code, text := describe(err)
	s.record.fault(err, code, text)
	s.begin(typeStatus, id)
	s.uint32(code)
	s.buf = appendString(s.buf, text)
	s.buf = appendString(s.buf, "") // language
	s.end()
}

func describe(err error) (code uint32, text string) {
	if err == nil {
		return codeOK, "Success"
	}
	var f *fault
	if errors.As(err, &f) {
		return f.code, f.text
	}
	text = err.Error()
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return codeFailure, text
	}
	if text = errno.Error(); text != "" {
		text = strings.ToUpper(text[:1]) + text[1:] // as strerror(3)
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.EBADF, unix.ELOOP:
		return codeNoSuchFile, text
	case unix.EPERM, unix.EACCES, unix.EFAULT:
		return codePermissionDenied, text
	case unix.ENAMETOOLONG, unix.EINVAL:
		return codeBadMessage, text
	case unix.ENOSYS:
		return codeUnsupported, text
	}
	return codeFailure, text
}

// retry repeats a system call that a signal of the Go runtime interrupted.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
