// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (s *server) open(id uint32, p *packet) error {
	path, flags, a := p.text(), p.uint32(), p.attrs()
	if p.bad {
		return errMalformed
	}
	mode := uint32(0o666)
	if a.flags&attrMode != 0 {
		mode = a.mode & 0o7777
	}
	s.record.Path, s.record.Flags = path, flagNames(flags)
	if flags&openCreate != 0 {
		s.record.Mode = octal(mode)
	}
	how := openFlags(flags)
	if s.opts.ReadOnly && (how&unix.O_ACCMODE != unix.O_RDONLY || how&(unix.O_CREAT|unix.O_TRUNC) != 0) {
		s.status(id, errRefused)
		return nil
	}
	s.opened(id, path, how, mode)
	return nil
}

// openFlags translates as OpenSSH: a request for neither reading nor writing reads, appending without writing is nothing.
func openFlags(flags uint32) int {
	how := unix.O_RDONLY
	switch {
	case flags&openRead != 0 && flags&openWrite != 0:
		how = unix.O_RDWR
	case flags&openWrite != 0:
		how = unix.O_WRONLY
	}
	if flags&openWrite != 0 && flags&openAppend != 0 {
		how |= unix.O_APPEND
	}
	for _, f := range []struct {
		flag uint32
		how  int
	}{{openCreate, unix.O_CREAT}, {openTrunc, unix.O_TRUNC}, {openExcl, unix.O_EXCL}} {
		if flags&f.flag != 0 {
			how |= f.how
		}
	}
	return how
}

// opened opens path and answers with its handle.
func (s *server) opened(id uint32, path string, how int, mode uint32) {
	f := &openFile{path: path, appends: how&unix.O_APPEND != 0, dir: how&unix.O_DIRECTORY != 0}
	err := retry(func() (err error) {
		f.fd, err = unix.Open(path, how|unix.O_CLOEXEC|unix.O_NOCTTY, mode)
		return err
	})
	var handle string
	if err == nil {
		handle, err = s.handles.add(f)
	}
	if err != nil {
		s.status(id, err)
		return
	}
	s.begin(typeHandle, id)
	s.buf = appendString(s.buf, handle)
	s.end()
}

func (s *server) read(id uint32, p *packet) error {
	handle, offset, length := p.bytes(), p.uint64(), p.uint32()
	if p.bad {
		return errMalformed
	}
	f := s.handles.file(handle)
	if f == nil {
		s.status(id, errHandle)
		return nil
	}
	s.failing, s.record.Path = f, f.path
	length = min(length, maxData)
	s.begin(typeData, id)
	at := len(s.buf) + 4
	s.grow(4 + int(length))
	n := 0
	err := retry(func() (err error) {
		n, err = unix.Pread(f.fd, s.buf[at:at+int(length)], int64(offset))
		return err
	})
	if err == nil && n == 0 && length > 0 {
		err = errEOF
	}
	if err != nil {
		s.buf = s.buf[:s.started]
		s.status(id, err)
		return nil
	}
	f.read += int64(n)
	s.buf = s.buf[:at+n]
	binary.BigEndian.PutUint32(s.buf[at-4:], uint32(n))
	s.end()
	return nil
}

// grow makes buf n bytes longer; what they hold is to be written. The first answer with data takes the memory for all
// that can follow, so that no other is moved.
func (s *server) grow(n int) {
	if need := len(s.buf) + n; need > cap(s.buf) {
		b := make([]byte, len(s.buf), max(need, flushAt+maxPacket))
		copy(b, s.buf)
		s.buf = b
	}
	s.buf = s.buf[:len(s.buf)+n]
}

func (s *server) write(id uint32, p *packet) error {
	handle, offset, data := p.bytes(), p.uint64(), p.bytes()
	if p.bad {
		return errMalformed
	}
	f := s.handles.file(handle)
	if f == nil {
		s.status(id, errHandle)
		return nil
	}
	s.failing, s.record.Path = f, f.path
	err := f.write(data, int64(offset))
	if err == nil {
		f.written += int64(len(data))
	}
	s.status(id, err)
	return nil
}

// write writes all of data, so that the error that cuts a write short, a full disk, is seen and told.
func (f *openFile) write(data []byte, offset int64) error {
	for {
		var n int
		err := retry(func() (err error) {
			if f.appends {
				n, err = unix.Write(f.fd, data)
			} else {
				n, err = unix.Pwrite(f.fd, data, offset)
			}
			return err
		})
		switch {
		case err != nil:
			return err
		case n == len(data):
			return nil
		case n == 0:
			return unix.EIO
		}
		data, offset = data[n:], offset+int64(n)
	}
}

func (s *server) stat(id uint32, p *packet, typ uint8) error {
	target := p.bytes()
	if p.bad {
		return errMalformed
	}
	var st unix.Stat_t
	err := retry(func() error {
		path := (&packet{b: appendString(nil, target)}).text()
		if typ != typeFstat {
			s.record.Path = path
		}
		switch typ {
		case typeStat:
			return unix.Stat(path, &st)
		case typeLstat:
			return unix.Lstat(path, &st)
		}
		f := s.handles.file(target)
		if f == nil {
			return errHandle
		}
		s.record.Path = f.path
		return unix.Fstat(f.fd, &st)
	})
	if err != nil {
		s.status(id, err)
		return nil
	}
	s.begin(typeAttrs, id)
	s.attrs(&st)
	s.end()
	return nil
}

// attrs appends the attributes of st. Times have 32 bits in this version of the protocol.
func (s *server) attrs(st *unix.Stat_t) {
	s.uint32(attrSize | attrOwner | attrMode | attrTimes)
	s.uint64(uint64(st.Size))
	s.uint32(st.Uid)
	s.uint32(st.Gid)
	s.uint32(st.Mode)
	s.uint32(uint32(st.Atim.Sec))
	s.uint32(uint32(st.Mtim.Sec))
}

// target is the file that attributes are given to.
type target struct {
	truncate func(size int64) error
	chown    func(uid, gid int) error
	chmod    func(mode uint32) error
	utimes   func([]unix.Timespec) error
}

// apply gives the file all attributes and returns the last error, as OpenSSH. The owner comes before the mode, because a
// change of owner clears the setuid and setgid bits, root's too; OpenSSH has them the other way round and loses the bits.
func (a attrs) apply(t target) error {
	var failed error
	try := func(err error) {
		if err != nil {
			failed = err
		}
	}
	if a.flags&attrSize != 0 {
		try(retry(func() error { return t.truncate(int64(a.size)) }))
	}
	if a.flags&attrOwner != 0 {
		try(t.chown(int(int32(a.uid)), int(int32(a.gid)))) // 2^32-1 is -1: leave it
	}
	if a.flags&attrMode != 0 {
		try(t.chmod(a.mode & 0o7777))
	}
	if a.flags&attrTimes != 0 {
		try(t.utimes([]unix.Timespec{{Sec: int64(a.atime)}, {Sec: int64(a.mtime)}}))
	}
	return failed
}

// pathTarget follows links.
func pathTarget(path string) target {
	return target{
		truncate: func(size int64) error { return unix.Truncate(path, size) },
		chown:    func(uid, gid int) error { return unix.Chown(path, uid, gid) },
		chmod:    func(mode uint32) error { return unix.Chmod(path, mode) },
		utimes:   func(ts []unix.Timespec) error { return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, 0) },
	}
}

// linkTarget does not follow a link at the end of path.
func linkTarget(path string) target {
	return target{
		truncate: func(int64) error { return &fault{codeBadMessage, "A link has no size to set"} },
		chown:    func(uid, gid int) error { return unix.Lchown(path, uid, gid) },
		chmod:    func(mode uint32) error { return lchmod(path, mode) },
		utimes: func(ts []unix.Timespec) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW)
		},
	}
}

// lchmod is for kernels without fchmodat2, too (before 6.6). Between its two calls the file can become a link; the
// client could have named the link's target as well.
func lchmod(path string, mode uint32) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Chmod(path, mode)
}

func fdTarget(fd int) target {
	return target{
		truncate: func(size int64) error { return unix.Ftruncate(fd, size) },
		chown:    func(uid, gid int) error { return unix.Fchown(fd, uid, gid) },
		chmod:    func(mode uint32) error { return unix.Fchmod(fd, mode) },
		utimes:   func(ts []unix.Timespec) error { return futimens(fd, ts) },
	}
}

// futimens is utimensat(2) without a path. x/sys goes by /proc, which a jail may not have.
func futimens(fd int, ts []unix.Timespec) error {
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
