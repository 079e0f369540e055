// SPDX-License-Identifier: Apache-2.0

package xz

import "encoding/binary"

// Kinds of chunks, by their first byte. From chunkLZMA on the lower five bits
// belong to the size.
const (
	chunkEnd         = 0x00
	chunkStoredReset = 0x01 // and an empty dictionary
	chunkStored      = 0x02
	chunkLZMA        = 0x80
	chunkState       = 0xa0 // and a new state
	chunkProperties  = 0xc0 // and new properties
	chunkDictionary  = 0xe0 // and an empty dictionary
)

// decoder decodes the LZMA symbols in the rest of in, from pos on, into the rest
// of dst, from out on, of which none may lead beyond the end of dst. It returns
// where it stopped in in, which need not be its end.
type decoder func(l *lzma, dst []byte, out int, in []byte, pos int) (int, bool)

// lzma2 decodes a sequence of chunks into dst and returns how many bytes it
// made, and how many of src it took.
func (l *lzma) lzma2(dst, src []byte, decode decoder) (out, in int, err error) {
	needDictionary, needProperties := true, true
	start := 0 // of the dictionary
	for {
		if in >= len(src) {
			return 0, 0, errShort
		}
		kind := src[in]
		in++
		if kind == chunkEnd {
			return out, in, nil
		}
		if kind == chunkStoredReset || kind >= chunkDictionary {
			start, needDictionary, needProperties = out, false, true
		} else if needDictionary {
			return 0, 0, errDamaged
		}
		if len(src)-in < 5 {
			return 0, 0, errShort
		}
		n := int(binary.BigEndian.Uint16(src[in:])) + 1
		in += 2
		if kind < chunkLZMA {
			if kind > chunkStored {
				return 0, 0, errDamaged
			}
			if n > len(src)-in {
				return 0, 0, errShort
			}
			if n > len(dst)-out {
				return 0, 0, errLong
			}
			out += copy(dst[out:], src[in:in+n])
			in += n
			continue
		}
		n += int(kind&0x1f) << 16
		packed := int(binary.BigEndian.Uint16(src[in:])) + 1
		in += 2
		if kind >= chunkProperties {
			if !l.setProperties(src[in]) {
				return 0, 0, errDamaged
			}
			in++
			needProperties = false
		} else if needProperties {
			return 0, 0, errDamaged
		}
		if kind >= chunkState {
			l.reset()
		}
		if packed > len(src)-in {
			return 0, 0, errShort
		}
		if n > len(dst)-out {
			return 0, 0, errLong
		}
		if !l.chunk(dst[start:out+n], out-start, src[in:in+packed], decode) {
			return 0, 0, errDamaged
		}
		out += n
		in += packed
	}
}

// chunk decodes an LZMA chunk, all of in, into dst from out on. What is before
// is the dictionary.
func (l *lzma) chunk(dst []byte, out int, in []byte, decode decoder) bool {
	const header = 5 // of which the first is always zero
	if len(in) < header || in[0] != 0 {
		return false
	}
	l.rng, l.code = 0xffffffff, binary.BigEndian.Uint32(in[1:])
	pos, ok := decode(l, dst, out, in, header)
	return ok && pos == len(in) && l.code == 0
}
