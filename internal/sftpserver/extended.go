// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"
	"math"
	"strings"

	"golang.org/x/sys/unix"
)

// An extension is answered by do, which reads the rest of the request.
type extension struct {
	name, version string
	do            func(s *server, id uint32, p *packet) error
}

// request is the extension's name in sftp-server(8).
func (e *extension) request() string {
	name, _, _ := strings.Cut(e.name, "@")
	return name
}

// extensions are those of OpenSSH 9 (its file PROTOCOL, section 4), in the order in which it tells them. copy-data and
// home-directory are from draft-ietf-secsh-filexfer-extensions-00.
var extensions = []extension{
	{"posix-rename@openssh.com", "1", func(s *server, id uint32, p *packet) error {
		from, to := p.text(), p.text()
		s.record.Path, s.record.Target = from, to
		return s.act(id, p, func() error { return unix.Rename(from, to) })
	}},
	{"statvfs@openssh.com", "2", func(s *server, id uint32, p *packet) error {
		path := p.text()
		s.record.Path = path
		return s.statvfs(id, p, func(st *unix.Statfs_t) error { return unix.Statfs(path, st) })
	}},
	{"fstatvfs@openssh.com", "2", func(s *server, id uint32, p *packet) error {
		h := p.bytes()
		return s.statvfs(id, p, func(st *unix.Statfs_t) error {
			f := s.handles.file(h)
			if f == nil {
				return errHandle
			}
			return unix.Fstatfs(f.fd, st)
		})
	}},
	{"hardlink@openssh.com", "1", func(s *server, id uint32, p *packet) error {
		from, to := p.text(), p.text()
		s.record.Path, s.record.Target = to, from
		return s.act(id, p, func() error { return unix.Link(from, to) })
	}},
	{"fsync@openssh.com", "1", func(s *server, id uint32, p *packet) error {
		h := p.bytes()
		return s.act(id, p, func() error {
			f := s.handles.file(h)
			if f == nil {
				return &fault{codeNoSuchFile, errHandle.text}
			}
			s.record.Path = f.path
			return unix.Fsync(f.fd)
		})
	}},
	{"lsetstat@openssh.com", "1", func(s *server, id uint32, p *packet) error {
		path, a := p.text(), p.attrs()
		s.record.Path, s.record.Attrs = path, a.String()
		return s.act(id, p, func() error { return a.apply(linkTarget(path)) })
	}},
	{"limits@openssh.com", "1", (*server).limits},
	{"expand-path@openssh.com", "1", func(s *server, id uint32, p *packet) error {
		path := p.text()
		s.record.Path = path
		return s.name(id, p, func() (string, error) { return s.expand(path) })
	}},
	{"copy-data", "1", (*server).copyData},
	{"home-directory", "1", func(s *server, id uint32, p *packet) error {
		user := p.text()
		return s.name(id, p, func() (string, error) { return s.home(user) })
	}},
	{"users-groups-by-id@openssh.com", "1", (*server).usersGroups},
}

// version answers the client's first packet.
func (s *server) version() {
	s.begin(typeVersion, protocolVersion)
	for _, e := range extensions {
		if s.opts.refused(e.request()) {
			continue
		}
		s.buf = appendString(s.buf, e.name)
		s.buf = appendString(s.buf, e.version)
	}
	s.end()
}

func (s *server) extended(id uint32, p *packet) error {
	name := p.text()
	if p.bad {
		return errMalformed
	}
	for _, e := range extensions {
		if e.name == name {
			s.beginRecord(e.request())
			if s.opts.refused(e.request()) {
				s.status(id, errRefused)
				return nil
			}
			return e.do(s, id, p)
		}
	}
	s.status(id, errUnsupported)
	return nil
}

func (s *server) statvfs(id uint32, p *packet, statfs func(*unix.Statfs_t) error) error {
	if p.bad {
		return errMalformed
	}
	var st unix.Statfs_t
	if err := retry(func() error { return statfs(&st) }); err != nil {
		s.status(id, err)
		return nil
	}
	fragment := uint64(st.Frsize)
	if fragment == 0 {
		fragment = uint64(st.Bsize)
	}
	const readOnlyNoSUID = unix.ST_RDONLY | unix.ST_NOSUID // have the protocol's values
	s.begin(typeExtendedReply, id)
	for _, v := range []uint64{
		uint64(st.Bsize), fragment, st.Blocks, st.Bfree, st.Bavail,
		st.Files, st.Ffree, st.Ffree,
		uint64(uint32(st.Fsid.Val[0])) | uint64(uint32(st.Fsid.Val[1]))<<32,
		uint64(st.Flags) & readOnlyNoSUID, uint64(st.Namelen),
	} {
		s.uint64(v)
	}
	s.end()
	return nil
}

func (s *server) limits(id uint32, p *packet) error {
	s.begin(typeExtendedReply, id)
	for _, v := range []uint64{maxPacket, maxData, maxData, uint64(s.handles.max)} {
		s.uint64(v)
	}
	s.end()
	return nil
}

// expand is realpath for paths that may begin with ~ or ~user. The client's own home is where the session began.
func (s *server) expand(path string) (string, error) {
	rest, tilde := strings.CutPrefix(path, "~")
	if !tilde {
		return realpath(path)
	}
	user, rest, _ := strings.Cut(rest, "/")
	home := "."
	if user != "" {
		h, err := s.home(user)
		if err != nil {
			return "", &fault{codeNoSuchFile, "No such user"}
		}
		home = h
	}
	return realpath(home + "/" + rest)
}

// home returns a user's home as the passwd file has it; that of no user in particular is where the session began.
func (s *server) home(user string) (string, error) {
	if user == "" {
		return realpath(".")
	}
	s.names.refresh()
	if home, ok := s.names.homes[user]; ok {
		return home, nil
	}
	return "", &fault{codeFailure, "No such user"}
}

// copyData copies between two open files; a length of 0 means up to the end of the first.
func (s *server) copyData(id uint32, p *packet) error {
	from, at, length := p.bytes(), p.uint64(), p.uint64()
	to, toAt := p.bytes(), p.uint64()
	if p.bad {
		return errMalformed
	}
	r, w := s.handles.file(from), s.handles.file(to)
	if r == nil || w == nil {
		s.status(id, errHandle)
		return nil
	}
	s.record.Path, s.record.Target = r.path, w.path
	s.status(id, copyFile(r, int64(at), length, w, int64(toAt)))
	return nil
}

// copyFile copies in chunks of OpenSSH's size, because it shows: it reports the end of the source as an error only if it
// falls before the last chunk. One file is not copied into itself, also not by another name.
func copyFile(r *openFile, at int64, length uint64, w *openFile, toAt int64) error {
	var rs, ws unix.Stat_t
	if err := unix.Fstat(r.fd, &rs); err != nil {
		return err
	}
	if err := unix.Fstat(w.fd, &ws); err != nil {
		return err
	}
	if rs.Dev == ws.Dev && rs.Ino == ws.Ino {
		return &fault{codeFailure, "Source and destination are the same file"}
	}
	untilEOF := length == 0
	if untilEOF {
		length = math.MaxUint64
	}
	buf := make([]byte, 64<<10)
	for length > 0 {
		chunk := buf[:min(uint64(len(buf)), length)]
		n, err := r.readFull(chunk, at)
		if err != nil {
			return err
		}
		length -= uint64(len(chunk))
		if n == 0 && (untilEOF || length == 0) {
			return nil
		}
		if n == 0 {
			return errEOF
		}
		if err := w.write(chunk[:n], toAt); err != nil {
			return err
		}
		at, toAt = at+int64(n), toAt+int64(n)
	}
	return nil
}

// readFull reads until b is full or the file ends.
func (f *openFile) readFull(b []byte, at int64) (total int, err error) {
	for total < len(b) {
		var n int
		err := retry(func() (err error) {
			n, err = unix.Pread(f.fd, b[total:], at+int64(total))
			return err
		})
		if err != nil {
			return total, err
		}
		if n == 0 {
			break
		}
		total += n
	}
	return total, nil
}

// usersGroups answers with a name for each id, in the same order, empty where there is none.
func (s *server) usersGroups(id uint32, p *packet) error {
	uids, gids := packet{b: p.bytes()}, packet{b: p.bytes()}
	if p.bad {
		return errMalformed
	}
	s.names.refresh()
	s.begin(typeExtendedReply, id)
	for _, list := range []struct {
		ids   packet
		known map[uint32]string
	}{{uids, s.names.users}, {gids, s.names.groups}} {
		at := len(s.buf)
		s.uint32(0)
		for len(list.ids.b) > 0 {
			number := list.ids.uint32()
			if list.ids.bad {
				s.buf = s.buf[:s.started] // no half an answer
				return errMalformed
			}
			s.buf = appendString(s.buf, list.known[number])
			if len(s.buf)-s.started > maxPacket {
				s.buf = s.buf[:s.started]
				s.status(id, &fault{codeFailure, "Too many names for one answer"})
				return nil
			}
		}
		binary.BigEndian.PutUint32(s.buf[at:], uint32(len(s.buf)-at-4))
	}
	s.end()
	return nil
}
