// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// harmless are the requests that name no path and change no file: what a fuzzer may do to the machine it runs on.
var harmless = []uint8{typeInit, typeClose, typeRead, typeFstat, typeReaddir, typeExtended, 99}

// tame turns every request of a stream into a harmless one, along the packets as the server finds them.
func tame(stream []byte) []byte {
	b := bytes.Clone(stream)
	for rest := b; len(rest) >= 5; {
		n := binary.BigEndian.Uint32(rest)
		rest[4] = harmless[int(rest[4])%len(harmless)]
		if n == 0 || uint64(n)+4 > uint64(len(rest)) {
			break
		}
		if packet := rest[5 : 4+n : 4+n]; rest[4] == typeExtended && len(packet) > 8 {
			if known := "users-groups-by-id@openssh.com"; bytes.Contains(packet, []byte(known)) {
				copy(packet[4:], request(0, known)[5:])
			} else {
				packet[8] = 0 // the name of no extension
			}
		}
		rest = rest[4+n:]
	}
	return b
}

// FuzzStream promises that no stream of requests makes the server panic, answer in anything but whole packets, or answer
// more than was asked.
func FuzzStream(f *testing.F) {
	hello := request(typeInit, uint32(3))
	for _, seed := range [][]byte{
		{}, {0, 0, 0, 0}, {255, 255, 255, 255, 1},
		request(1, uint32(1), handle(0)),
		request(2, uint32(2), handle(0), uint64(3), uint32(9)),
		request(3, uint32(3), handle(1)),
		append(request(4, uint32(4), handle(1)), request(4, uint32(5), handle(1))...),
		request(5, uint32(6), "users-groups-by-id@openssh.com", handle(0)+handle(1), handle(0)),
		request(5, uint32(7), "limits@openssh.com"),
		request(6, uint32(8), mode(0o600)),
	} {
		f.Add(seed)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, stream []byte) {
		var out bytes.Buffer
		s := &server{out: &out, handles: newHandles(), names: newNames("/etc/passwd", "/etc/group")}
		defer s.handles.closeAll()
		for _, how := range []int{unix.O_RDONLY, unix.O_RDONLY | unix.O_DIRECTORY} {
			name := dir
			if how&unix.O_DIRECTORY == 0 {
				name = os.DevNull
			}
			s.opened(0, name, how, 0)
		}
		s.buf = nil
		stream = tame(append(hello[:len(hello):len(hello)], stream...))
		stream[4] = typeInit
		s.serve(bytes.NewReader(stream))
		answers := 0
		for b := out.Bytes(); len(b) > 0; answers++ {
			if len(b) < 9 || uint64(binary.BigEndian.Uint32(b))+4 > uint64(len(b)) || binary.BigEndian.Uint32(b) > maxPacket {
				t.Fatalf("answer %q", b)
			}
			b = b[4+binary.BigEndian.Uint32(b):]
		}
		if answers > len(stream)/5 {
			t.Errorf("%d answers to %d bytes", answers, len(stream))
		}
	})
}

// FuzzFields promises that what is read of a packet lies within it, and that attributes mean the same when written again.
func FuzzFields(f *testing.F) {
	f.Add([]byte{})
	f.Add(request(0, "name", attrs{flags: attrSize | attrOwner | attrMode | attrTimes, size: 1, uid: 2, gid: 3, mode: 4, atime: 5, mtime: 6})[5:])
	f.Add(request(0, "name", uint32(attrExtended), uint32(1<<31), "a", "b")[5:])
	f.Add([]byte("\xff\xff\xff\xffname"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := packet{b: b}
		name, a := p.text(), p.attrs()
		if p.bad {
			return
		}
		if len(name)+8 > len(b) {
			t.Errorf("%q of %d bytes", name, len(b))
		}
		a.flags &= attrSize | attrOwner | attrMode | attrTimes
		again := packet{b: appendAttrs(nil, a)}
		if got := again.attrs(); again.bad || got != a {
			t.Errorf("%+v became %+v", a, got)
		}
	})
}

// FuzzDirent promises that reading a directory ends, whatever a file system returns.
func FuzzDirent(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 24, 0, 8}, "file\x00"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			name, _, rest := dirent(b)
			if len(rest) >= len(b) || len(name) > len(b) {
				t.Fatalf("%q of %q", name, b)
			}
			b = rest
		}
	})
}
