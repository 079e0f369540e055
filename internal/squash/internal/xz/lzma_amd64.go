// SPDX-License-Identifier: Apache-2.0

package xz

import "unsafe"

const (
	// maxSymbolIn bounds what one symbol reads: no more than a byte for each of
	// its bits, of which the longest has 1+1 for its kind, 2+8 for the length, 6
	// for the slot, 26+4 for the distance.
	maxSymbolIn = 48
	// maxSymbolOut bounds what one symbol writes: its length, and less than two
	// vectors behind that.
	maxSymbolOut = 273 + 32
)

// decodeAsm begins at out and pos, of which neither is beyond its limit, with a
// byte before out; it ends with the first symbol that begins beyond one. It
// cannot be preempted, which in a chunk of 64 KiB is some milliseconds.
//
//go:noescape
func decodeAsm(l *lzma, dst *byte, out int, outLimit *byte, in *byte, pos int, inLimit *byte) (outNow, posNow int, ok bool)

// decode leaves the first byte, which has none before it, and the ends of both
// buffers to decodeGo.
func (l *lzma) decode(dst []byte, out int, in []byte, pos int) (int, bool) {
	if out == 0 {
		var ok bool
		if pos, ok = l.decodeGo(dst[:1], 0, in, pos); !ok {
			return pos, false
		}
		out = 1
	}
	outLimit, inLimit := len(dst)-maxSymbolOut, len(in)-maxSymbolIn
	if out <= outLimit && pos <= inLimit {
		var ok bool
		out, pos, ok = decodeAsm(l, unsafe.SliceData(dst), out, &dst[outLimit], unsafe.SliceData(in), pos, &in[inLimit])
		if !ok {
			return pos, false
		}
	}
	return l.decodeGo(dst, out, in, pos)
}
