// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// direntBuffer is how much of a directory is read at once and kept with its handle.
const direntBuffer = 16 << 10

func (s *server) opendir(id uint32, p *packet) error {
	path := p.text()
	if p.bad {
		return errMalformed
	}
	s.record.Path = path
	s.opened(id, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	return nil
}

// readdir answers with as many entries as fit, "." and ".." among them, in the directory's order. An entry that is gone
// by the time it is looked at is left out.
func (s *server) readdir(id uint32, p *packet) error {
	handle := p.bytes()
	if p.bad {
		return errMalformed
	}
	f := s.handles.directory(handle)
	if f == nil {
		s.status(id, errHandle)
		return nil
	}
	s.names.refresh()
	now := time.Now().Unix()
	s.begin(typeName, id)
	at := len(s.buf)
	s.uint32(0)
	count := uint32(0)
	for len(s.buf)-s.started < maxNames {
		name, err := f.next()
		if err != nil && count == 0 {
			s.buf = s.buf[:s.started]
			s.status(id, err)
			return nil
		}
		if err != nil {
			break // comes again
		}
		var st unix.Stat_t
		if retry(func() error { return unix.Fstatat(f.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) }) != nil {
			continue
		}
		s.buf = appendString(s.buf, name)
		long := len(s.buf)
		s.uint32(0)
		s.buf = s.names.appendLine(s.buf, &st, now)
		s.buf = append(s.buf, name...)
		binary.BigEndian.PutUint32(s.buf[long:], uint32(len(s.buf)-long-4))
		s.attrs(&st)
		count++
	}
	binary.BigEndian.PutUint32(s.buf[at:], count)
	s.end()
	return nil
}

// next returns the name of the directory's next entry, or errEOF.
func (f *openFile) next() (string, error) {
	for {
		if len(f.dirents) == 0 {
			if f.complete {
				return "", errEOF
			}
			if f.buf == nil {
				f.buf = make([]byte, direntBuffer)
			}
			var n int
			err := retry(func() (err error) {
				n, err = unix.ReadDirent(f.fd, f.buf)
				return err
			})
			if err != nil {
				return "", err
			}
			if n <= 0 {
				f.buf, f.complete = nil, true
				return "", errEOF
			}
			f.dirents = f.buf[:n]
		}
		name, inode, rest := dirent(f.dirents)
		f.dirents = rest
		if inode != 0 && name != "" {
			return name, nil
		}
	}
}

// dirent takes one struct linux_dirent64 off b: inode and offset of 8 bytes each, length of the record, type, name with
// a NUL at its end (getdents64(2)).
func dirent(b []byte) (name string, inode uint64, rest []byte) {
	const header = 8 + 8 + 2 + 1
	if len(b) < header {
		return "", 0, nil
	}
	size := int(binary.NativeEndian.Uint16(b[16:]))
	if size < header || size > len(b) {
		return "", 0, nil
	}
	raw := b[header:size]
	if i := bytes.IndexByte(raw, 0); i >= 0 {
		raw = raw[:i]
	}
	return string(raw), binary.NativeEndian.Uint64(b), b[size:]
}

// appendLine appends what ls -l tells about a file, up to its name, in the columns of OpenSSH (ls_file in sftp-common.c).
func (n *names) appendLine(b []byte, st *unix.Stat_t, now int64) []byte {
	b = appendMode(b, st.Mode)
	b = append(b, ' ', ' ')
	b = appendPadded(b, strconv.FormatUint(uint64(st.Nlink), 10), -3)
	b = append(b, ' ')
	b = appendPadded(b, n.user(st.Uid), 8)
	b = append(b, ' ')
	b = appendPadded(b, n.group(st.Gid), 8)
	b = append(b, ' ')
	b = appendPadded(b, strconv.FormatUint(uint64(st.Size), 10), -8)
	b = append(b, ' ')
	layout, mtime := "Jan _2  2006", int64(st.Mtim.Sec)
	if now-mtime < 365*24*60*60/2 && now >= mtime {
		layout = "Jan _2 15:04"
	}
	b = time.Unix(mtime, 0).AppendFormat(b, layout)
	return append(b, ' ')
}

// appendPadded fills up s to width, to the right; to the left if width is negative.
func appendPadded(b []byte, s string, width int) []byte {
	for i := len(s); i < -width; i++ {
		b = append(b, ' ')
	}
	b = append(b, s...)
	for i := len(s); i < width; i++ {
		b = append(b, ' ')
	}
	return b
}

// appendMode is strmode(3).
func appendMode(b []byte, mode uint32) []byte {
	kind := byte('?')
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		kind = '-'
	case unix.S_IFDIR:
		kind = 'd'
	case unix.S_IFLNK:
		kind = 'l'
	case unix.S_IFCHR:
		kind = 'c'
	case unix.S_IFBLK:
		kind = 'b'
	case unix.S_IFIFO:
		kind = 'p'
	case unix.S_IFSOCK:
		kind = 's'
	}
	b = append(b, kind)
	for i, special := range []struct {
		bit uint32
		on  string // with and without the right to execute
	}{{unix.S_ISUID, "sS"}, {unix.S_ISGID, "sS"}, {unix.S_ISVTX, "tT"}} {
		bits := mode >> (6 - 3*i)
		b = append(b, "-r"[bits>>2&1], "-w"[bits>>1&1])
		switch x := bits & 1; {
		case mode&special.bit != 0:
			b = append(b, special.on[1-x])
		default:
			b = append(b, "-x"[x])
		}
	}
	return b
}
