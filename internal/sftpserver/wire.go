// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"
	"strings"
)

// Packet types of draft-ietf-secsh-filexfer-02, section 3.
const (
	typeInit          = 1
	typeVersion       = 2
	typeOpen          = 3
	typeClose         = 4
	typeRead          = 5
	typeWrite         = 6
	typeLstat         = 7
	typeFstat         = 8
	typeSetstat       = 9
	typeFsetstat      = 10
	typeOpendir       = 11
	typeReaddir       = 12
	typeRemove        = 13
	typeMkdir         = 14
	typeRmdir         = 15
	typeRealpath      = 16
	typeStat          = 17
	typeRename        = 18
	typeReadlink      = 19
	typeSymlink       = 20
	typeStatus        = 101
	typeHandle        = 102
	typeData          = 103
	typeName          = 104
	typeAttrs         = 105
	typeExtended      = 200
	typeExtendedReply = 201
)

const protocolVersion = 3

// Flags of an open request (section 6.3).
const (
	openRead   = 1 << 0
	openWrite  = 1 << 1
	openAppend = 1 << 2
	openCreate = 1 << 3
	openTrunc  = 1 << 4
	openExcl   = 1 << 5
)

// Flags of file attributes (section 5).
const (
	attrSize     = 1 << 0
	attrOwner    = 1 << 1
	attrMode     = 1 << 2
	attrTimes    = 1 << 3
	attrExtended = 1 << 31
)

// attrs are the attributes a client sends; what flags does not name is zero.
type attrs struct {
	flags        uint32
	size         uint64
	uid, gid     uint32
	mode         uint32
	atime, mtime uint32
}

// packet reads the fields of one packet, without its length. A field that is not there sets bad and is zero; the caller
// looks at bad once, before it acts. Bytes after the last field are ignored, as OpenSSH does.
type packet struct {
	b   []byte
	bad bool
}

// take returns the next n bytes, which belong to the packet's buffer.
func (p *packet) take(n uint64) []byte {
	if p.bad || uint64(len(p.b)) < n {
		p.bad, p.b = true, nil
		return nil
	}
	f := p.b[:n:n]
	p.b = p.b[n:]
	return f
}

func (p *packet) uint8() uint8 {
	if f := p.take(1); f != nil {
		return f[0]
	}
	return 0
}

func (p *packet) uint32() uint32 {
	if f := p.take(4); f != nil {
		return binary.BigEndian.Uint32(f)
	}
	return 0
}

func (p *packet) uint64() uint64 {
	if f := p.take(8); f != nil {
		return binary.BigEndian.Uint64(f)
	}
	return 0
}

// bytes returns a string field without copying it.
func (p *packet) bytes() []byte { return p.take(uint64(p.uint32())) }

// text returns a name or path, byte for byte but for one NUL at its end, which OpenSSH takes for a terminator. A NUL
// elsewhere reaches the system call's wrapper, which refuses it with EINVAL.
func (p *packet) text() string { return strings.TrimSuffix(string(p.bytes()), "\x00") }

func (p *packet) attrs() attrs {
	a := attrs{flags: p.uint32()}
	if a.flags&attrSize != 0 {
		a.size = p.uint64()
	}
	if a.flags&attrOwner != 0 {
		a.uid, a.gid = p.uint32(), p.uint32()
	}
	if a.flags&attrMode != 0 {
		a.mode = p.uint32()
	}
	if a.flags&attrTimes != 0 {
		a.atime, a.mtime = p.uint32(), p.uint32()
	}
	if a.flags&attrExtended != 0 {
		for n := p.uint32(); n > 0 && !p.bad; n-- { // ends with the packet, whatever n says
			p.bytes()
			p.bytes()
		}
	}
	return a
}

func appendString[T string | []byte](b []byte, s T) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
