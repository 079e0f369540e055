// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// peer is the client's end of a session with one of the servers, packet by packet.
type peer struct {
	t   testing.TB
	in  io.Reader
	out io.WriteCloser
	dir string // where the server began; the answers show it as $DIR
	end func() error
}

// newPeer starts our own server in the current directory. It has not yet told its version.
func newPeer(t testing.TB) *peer {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	reqR, reqW := pipe(t)
	ansR, ansW := pipe(t)
	ended := make(chan error, 1)
	go func() {
		err := Serve(reqR, ansW, Options{}, nil)
		ansW.Close()
		ended <- err
	}()
	p := &peer{t: t, in: ansR, out: reqW, dir: dir}
	p.end = func() error { reqW.Close(); return <-ended }
	t.Cleanup(func() { reqW.Close() })
	return p
}

// newOpenSSHPeer starts OpenSSH's server in dir.
func newOpenSSHPeer(t testing.TB, dir string) *peer {
	t.Helper()
	cmd := exec.Command(opensshServer)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	in, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, in: in, out: out, dir: dir}
	p.end = func() error { out.Close(); return cmd.Wait() }
	t.Cleanup(func() { out.Close(); cmd.Process.Kill(); cmd.Wait() })
	return p
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// request encodes a packet: strings with their lengths, numbers by their types, raw bytes as they are.
func request(typ uint8, fields ...any) []byte {
	b := []byte{0, 0, 0, 0, typ}
	for _, f := range fields {
		switch f := f.(type) {
		case string:
			b = appendString(b, f)
		case []byte:
			b = append(b, f...)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, f)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, f)
		case attrs:
			b = appendAttrs(b, f)
		default:
			panic(fmt.Sprintf("field of type %T", f))
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

func appendAttrs(b []byte, a attrs) []byte {
	b = binary.BigEndian.AppendUint32(b, a.flags)
	if a.flags&attrSize != 0 {
		b = binary.BigEndian.AppendUint64(b, a.size)
	}
	if a.flags&attrOwner != 0 {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, a.uid), a.gid)
	}
	if a.flags&attrMode != 0 {
		b = binary.BigEndian.AppendUint32(b, a.mode)
	}
	if a.flags&attrTimes != 0 {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, a.atime), a.mtime)
	}
	return b
}

func (p *peer) send(packets ...[]byte) {
	p.t.Helper()
	for _, b := range packets {
		if _, err := p.out.Write(b); err != nil {
			p.t.Fatalf("send: %v", err)
		}
	}
}

// receive returns the next answer without its length.
func (p *peer) receive() []byte {
	p.t.Helper()
	var size [4]byte
	if _, err := io.ReadFull(p.in, size[:]); err != nil {
		p.t.Fatalf("receive: %v", err)
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxPacket {
		p.t.Fatalf("an answer of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(p.in, b); err != nil {
		p.t.Fatalf("receive: %v", err)
	}
	return b
}

// call sends one request and returns what the answer says.
func (p *peer) call(typ uint8, fields ...any) string {
	p.t.Helper()
	const id = uint32(0x12345678)
	p.send(request(typ, append([]any{id}, fields...)...))
	b := p.receive()
	if got := binary.BigEndian.Uint32(b[1:]); got != id {
		p.t.Fatalf("an answer to request %x", got)
	}
	return p.show(b)
}

func (p *peer) hello() string {
	p.t.Helper()
	p.send(request(typeInit, uint32(protocolVersion)))
	return p.show(p.receive())
}

// show puts an answer in words, without what may differ from one run to the next. The message of a status is left out.
func (p *peer) show(b []byte) string {
	r := packet{b: b}
	typ, id := r.uint8(), r.uint32()
	var s strings.Builder
	switch typ {
	case typeVersion:
		fmt.Fprintf(&s, "version %d", id)
		for len(r.b) > 0 && !r.bad {
			fmt.Fprintf(&s, " %s=%s", r.bytes(), r.bytes())
		}
	case typeStatus:
		fmt.Fprintf(&s, "status %d", r.uint32())
		if text, lang := r.bytes(), r.bytes(); len(text) == 0 || len(lang) != 0 {
			fmt.Fprintf(&s, " text %q language %q", text, lang)
		}
	case typeHandle:
		fmt.Fprintf(&s, "handle %x", r.bytes())
	case typeData:
		d := r.bytes()
		fmt.Fprintf(&s, "data %d %.80q", len(d), d)
	case typeName:
		n := r.uint32()
		fmt.Fprintf(&s, "names %d", n)
		for range n {
			name, long := r.bytes(), r.bytes()
			fmt.Fprintf(&s, "\n  %q %q %s", name, long, showAttrs(r.attrs()))
		}
	case typeAttrs:
		s.WriteString(showAttrs(r.attrs()))
	case typeExtendedReply:
		fmt.Fprintf(&s, "reply %x", r.b)
		r.b = nil
	default:
		fmt.Fprintf(&s, "answer %d %x", typ, b)
	}
	if r.bad || len(r.b) != 0 {
		fmt.Fprintf(&s, " MALFORMED, rest %x", r.b)
	}
	return strings.ReplaceAll(s.String(), p.dir, "$DIR")
}

func showAttrs(a attrs) string {
	recent := func(t uint32) string {
		if d := time.Since(time.Unix(int64(t), 0)); d > -time.Hour && d < time.Hour {
			return "now"
		}
		return fmt.Sprint(t)
	}
	if a.flags == 0 {
		return "no attributes"
	}
	size, atime := fmt.Sprint(a.size), recent(a.atime)
	switch a.mode & 0o170000 {
	case 0o040000:
		size = "any"
	case 0o120000:
		atime = "any" // following a link is access
	}
	return fmt.Sprintf("flags %x size %s owner %d:%d mode %o times %s %s", a.flags, size, a.uid, a.gid, a.mode, atime, recent(a.mtime))
}
