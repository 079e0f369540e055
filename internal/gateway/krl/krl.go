// SPDX-License-Identifier: Apache-2.0

// Package krl reads key revocation lists as ssh-keygen -k writes them (PROTOCOL.krl of OpenSSH): keys, fingerprints, and
// certificates by serial number or key id.
//
// It refuses a list that it does not understand to the last byte: an unknown section, a critical extension, a bad length. What
// it left out would let somebody in. Signatures are skipped, as OpenSSH does: who may write the file may write any list.
package krl

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"
)

// Magic is what a list begins with; a list of public keys as text does not.
const Magic = "SSHKRL\n\x00"

const formatVersion = 1

// Types of sections.
const (
	sectionCertificates = 1
	sectionKeys         = 2
	sectionSHA1         = 3
	sectionSignature    = 4
	sectionSHA256       = 5
	sectionExtension    = 255
)

// Types of sections within one of certificates.
const (
	certSerials   = 0x20
	certRange     = 0x21
	certBitmap    = 0x22
	certKeyIDs    = 0x23
	certExtension = 0x39
)

// maxBitmap is SSHBUF_MAX_BIGNUM of OpenSSH, in bytes.
const maxBitmap = 16384 / 8

// A List is a revocation list. It keeps pieces of the text it was read from.
type List struct {
	keys   [][]byte // public keys, and their hashes, as they are on the wire
	sha1   [][]byte
	sha256 [][]byte
	certs  []certificates
}

// certificates are those of one CA, or of any.
type certificates struct {
	ca      []byte // empty: any
	ranges  []span
	bitmaps []bitmap
	ids     [][]byte
}

type span struct{ from, to uint64 }

type bitmap struct {
	from uint64
	bits []byte // big-endian: the last bit is from
}

// Parse reads a list.
func Parse(text []byte) (*List, error) {
	r := &reader{all: text, rest: text}
	l := &List{}
	if !bytes.HasPrefix(text, []byte(Magic)) {
		return nil, r.fail("not a key revocation list")
	}
	r.rest = r.rest[len(Magic):]
	if v := r.uint32(); r.err == nil && v != formatVersion {
		return nil, r.fail("format version %d is not known", v)
	}
	r.uint64() // the list's own version,
	r.uint64() // date
	r.uint64() // and flags, of which there are none
	r.string() // reserved
	r.string() // comment
	signed := false
	for r.err == nil && len(r.rest) > 0 {
		typ := r.byte()
		sect := r.section()
		if signed && typ != sectionSignature {
			return nil, r.fail("a section of type %d after a signature", typ)
		}
		switch typ {
		case sectionCertificates:
			l.certs = append(l.certs, sect.certificates())
		case sectionKeys:
			l.keys = append(l.keys, sect.strings(0)...)
		case sectionSHA1:
			l.sha1 = append(l.sha1, sect.strings(sha1.Size)...)
		case sectionSHA256:
			l.sha256 = append(l.sha256, sect.strings(sha256.Size)...)
		case sectionExtension:
			sect.extension()
		case sectionSignature: // its key was the section, its value follows
			signed = true
			sect.rest = nil
			r.string()
		default:
			return nil, r.fail("a section of unknown type %d", typ)
		}
		r.join(sect)
	}
	if r.err != nil {
		return nil, r.err
	}
	return l, nil
}

// Check says why pub is revoked, and returns nil if it is not. A certificate is revoked with its key, with its CA, by its
// serial number, unless that is 0, and by its id (ssh_krl_check_key of krl.c).
func (l *List) Check(pub ssh.PublicKey) error {
	cert, ok := pub.(*ssh.Certificate)
	if !ok {
		return l.key("key", pub)
	}
	if err := errors.Join(l.key("key", cert.Key), l.key("CA", cert.SignatureKey)); err != nil {
		return err
	}
	ca := cert.SignatureKey.Marshal()
	for _, c := range l.certs {
		if len(c.ca) > 0 && !bytes.Equal(c.ca, ca) {
			continue
		}
		if has(c.ids, []byte(cert.KeyId)) {
			return fmt.Errorf("certificate with the id %q is revoked", cert.KeyId)
		}
		if cert.Serial != 0 && c.serial(cert.Serial) {
			return fmt.Errorf("certificate with the serial number %d is revoked", cert.Serial)
		}
	}
	return nil
}

func (l *List) key(what string, pub ssh.PublicKey) error {
	wire := pub.Marshal()
	s1, s256 := sha1.Sum(wire), sha256.Sum256(wire)
	if has(l.keys, wire) || has(l.sha1, s1[:]) || has(l.sha256, s256[:]) {
		return fmt.Errorf("%s %s is revoked", what, ssh.FingerprintSHA256(pub))
	}
	return nil
}

func has(list [][]byte, b []byte) bool {
	for _, e := range list {
		if bytes.Equal(e, b) {
			return true
		}
	}
	return false
}

func (c *certificates) serial(n uint64) bool {
	for _, s := range c.ranges {
		if s.from <= n && n <= s.to {
			return true
		}
	}
	for _, b := range c.bitmaps {
		if n < b.from {
			continue
		}
		bit := n - b.from
		if bit/8 < uint64(len(b.bits)) && b.bits[uint64(len(b.bits))-1-bit/8]>>(bit%8)&1 == 1 {
			return true
		}
	}
	return false
}

// reader takes values off a text. After an error all of them are zero.
type reader struct {
	all  []byte
	rest []byte // at the end of all, or of the section, within it
	end  int    // bytes of all behind rest
	err  error
}

func (r *reader) fail(format string, args ...any) error {
	if r.err == nil {
		r.err = fmt.Errorf("offset %d: "+format, append([]any{len(r.all) - r.end - len(r.rest)}, args...)...)
	}
	r.rest = nil
	return r.err
}

func (r *reader) take(n uint64) []byte {
	if uint64(len(r.rest)) < n {
		r.fail("%d bytes are missing", n-uint64(len(r.rest)))
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) string() []byte { return r.take(uint64(r.uint32())) }

// section is a reader of the string that follows; join ends it.
func (r *reader) section() *reader {
	data := r.string()
	return &reader{all: r.all, rest: data, end: r.end + len(r.rest), err: r.err}
}

func (r *reader) join(sect *reader) {
	if sect.err == nil && len(sect.rest) > 0 {
		sect.fail("%d bytes left in the section", len(sect.rest))
	}
	if r.err == nil && sect.err != nil {
		r.err, r.rest = sect.err, nil
	}
}

// strings reads a section of strings, each of the given size unless that is 0.
func (r *reader) strings(size int) (list [][]byte) {
	for r.err == nil && len(r.rest) > 0 {
		s := r.string()
		if r.err == nil && size > 0 && len(s) != size {
			r.fail("a hash of %d bytes, not %d", len(s), size)
		}
		list = append(list, s)
	}
	return list
}

func (r *reader) extension() {
	name := r.string()
	critical := r.byte()
	r.string()
	if r.err == nil && critical != 0 {
		r.fail("the critical extension %q is not known", name)
	}
}

func (r *reader) certificates() (c certificates) {
	c.ca = r.string()
	r.string() // reserved
	if r.err == nil && len(c.ca) > 0 {
		if _, err := ssh.ParsePublicKey(c.ca); err != nil {
			r.fail("the key of a CA: %w", err)
		}
	}
	for r.err == nil && len(r.rest) > 0 {
		typ := r.byte()
		sect := r.section()
		switch typ {
		case certSerials:
			for sect.err == nil && len(sect.rest) > 0 {
				n := sect.uint64()
				c.add(sect, span{n, n})
			}
		case certRange:
			c.add(sect, span{sect.uint64(), sect.uint64()})
		case certBitmap:
			c.bitmaps = append(c.bitmaps, sect.bitmap())
		case certKeyIDs:
			c.ids = append(c.ids, sect.strings(0)...)
		case certExtension:
			sect.extension()
		default:
			r.fail("certificates by the unknown type %#x", typ)
		}
		r.join(sect)
	}
	return c
}

func (c *certificates) add(r *reader, s span) {
	if r.err == nil && (s.from == 0 || s.from > s.to) {
		r.fail("serial numbers from %d to %d", s.from, s.to)
	}
	c.ranges = append(c.ranges, s)
}

func (r *reader) bitmap() bitmap {
	b := bitmap{from: r.uint64(), bits: r.string()}
	if len(b.bits) > 0 && b.bits[0]&0x80 != 0 {
		r.fail("a negative bitmap")
	}
	b.bits = bytes.TrimLeft(b.bits, "\x00")
	switch n := uint64(len(b.bits)); {
	case r.err != nil || n == 0:
	case n > maxBitmap:
		r.fail("a bitmap of %d bytes, more than %d", n, maxBitmap)
	case b.from+8*n-1 < b.from:
		r.fail("serial numbers beyond 64 bits")
	case b.from == 0 && b.bits[n-1]&1 == 1:
		r.fail("the serial number 0")
	}
	return b
}
