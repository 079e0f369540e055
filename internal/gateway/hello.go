// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"
)

// The client's list decides the cipher (RFC 4253, section 7.1), and OpenSSH's puts
// chacha20-poly1305 first, which the SSH library runs at half to a third of the speed of
// AES-GCM where the processor has AES instructions. So the server looks at the client's
// first key exchange packet before it sends its own: to a client that has AES-GCM it offers
// nothing else, to all others everything. A Ciphers line in sshd_config switches that off.
//
// Looking changes nothing: every byte is handed on to the SSH library as it came.

// softwareVersion begins the version line (RFC 4253, section 4.2); who we are follows as
// the comment. OpenSSH's client tells only servers whose version matches "OpenSSH*"
// (compat.c) that nobody reads any more (eow@openssh.com), without which
// `ssh job yes | head -1` does not end. No client knows a fault of a version without a number.
const softwareVersion = "OpenSSH_compatible"

const (
	// helloWait is how long to wait for the packet. OpenSSH sends it at once; a client that
	// waits for ours first, as libssh does, is offered everything.
	helloWait = 250 * time.Millisecond

	maxVersionLine = 255   // RFC 4253, section 4.2
	maxHelloPacket = 35000 // RFC 4253, section 6.1

	msgKexInit  = 20
	kexInitHead = 4 + 1 + 1 + 16 // packet length, padding length, message, cookie
)

var gcmCiphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM}

// fastAES reports whether the processor does AES-GCM in hardware.
func fastAES() bool {
	return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
}

// greet sends our version line, reads the client's, and returns the ciphers to offer.
func (c *conn) greet() []string {
	all := c.srv.algs.ciphers
	line := "SSH-2.0-" + c.srv.ssh.Version + "\r\n"
	c.reader = bufio.NewReaderSize(incoming{c}, maxVersionLine+maxHelloPacket)
	if _, err := c.Conn.Write([]byte(line)); err != nil {
		return all // the library meets the same error
	}
	c.sent = []byte(line)
	version := c.peekLine()
	if !strings.HasPrefix(version, "SSH-2.0-OpenSSH_") {
		return all
	}
	c.Conn.SetReadDeadline(time.Now().Add(helloWait))
	defer c.Conn.SetReadDeadline(time.Time{})
	if !c.hasGCM(len(version)) {
		return all
	}
	return gcmCiphers
}

// peekLine returns the first line, with its end, without consuming it; empty if there is
// none of a permitted length.
func (c *conn) peekLine() string {
	for n := 1; n <= maxVersionLine; n++ {
		b, err := c.reader.Peek(n)
		if err != nil {
			return ""
		}
		if b[n-1] == '\n' {
			return string(b)
		}
	}
	return ""
}

// hasGCM reads the packet after the first skip bytes: whether the client can do AES-GCM in
// both directions.
func (c *conn) hasGCM(skip int) bool {
	head, err := c.reader.Peek(skip + kexInitHead)
	if err != nil {
		return false
	}
	size := binary.BigEndian.Uint32(head[skip:])
	if size > maxHelloPacket-4 || head[skip+5] != msgKexInit {
		return false
	}
	packet, err := c.reader.Peek(skip + 4 + int(size))
	if err != nil {
		return false
	}
	lists := nameLists(packet[min(skip+kexInitHead, len(packet)):], 4) // kex, host keys, ciphers out, ciphers in
	if len(lists) < 4 {
		return false
	}
	can := func(l []string) bool {
		return slices.ContainsFunc(gcmCiphers, func(g string) bool { return slices.Contains(l, g) })
	}
	return can(lists[2]) && can(lists[3])
}

// nameLists decodes up to n name-lists (RFC 4251, section 5).
func nameLists(b []byte, n int) (lists [][]string) {
	for range n {
		if len(b) < 4 {
			break
		}
		size := binary.BigEndian.Uint32(b)
		if uint64(size) > uint64(len(b)-4) {
			break
		}
		lists = append(lists, strings.Split(string(b[4:4+size]), ","))
		b = b[4+size:]
	}
	return lists
}

var errVersionLine = errors.New("the SSH library sent another version line than announced")

// swallow drops the library's version line, which greet has sent already.
func (c *conn) swallow(b []byte) error {
	if !bytes.Equal(b, c.sent) {
		return errVersionLine
	}
	c.sent = nil
	return nil
}
