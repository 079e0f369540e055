// SPDX-License-Identifier: Apache-2.0

package xz

// The probabilities of a decoder, one array so that assembly finds all of them
// behind one pointer: offsets and sizes in words of 16 bits.
const (
	states    = 12
	positions = 16 // 1 << the largest pb

	isMatch    = 0
	isRep      = isMatch + states*positions
	isRepG0    = isRep + states
	isRepG1    = isRepG0 + states
	isRepG2    = isRepG1 + states
	isRep0Long = isRepG2 + states
	distSlot   = isRep0Long + states*positions // by length, then a tree of 6 bits
	distLow    = distSlot + 4*64               // by slot from 4 on, then a tree of up to 5 bits
	distAlign  = distLow + 10*32
	matchLen   = distAlign + 16
	repLen     = matchLen + lenProbs
	literal    = repLen + lenProbs

	lenChoice  = 0
	lenChoice2 = 1
	lenLow     = 2
	lenMid     = lenLow + positions*8
	lenHigh    = lenMid + positions*8
	lenProbs   = lenHigh + 256

	literalProbs = 0x300
	numProbs     = literal + literalProbs<<maxLiteralBits

	maxLiteralBits = 4 // of lc and lp together, in LZMA2
	minMatch       = 2
	topRange       = 1 << 24
)

// lzma is the state of an LZMA decoder between two chunks, and between the
// assembly's part of a chunk and the rest.
type lzma struct {
	rng, code uint32
	state     uint32
	rep       [4]uint32 // the last distances, each less one
	dict      uint32    // distances reach no farther
	posMask   uint32    // of pb bits
	litMask   uint32    // see literalAt
	lc        uint32
	used      int // probabilities, with these properties
	probs     [numProbs]uint16
}

// setProperties takes the byte that encodes lc, lp and pb.
func (l *lzma) setProperties(b byte) bool {
	if b >= 9*5*5 {
		return false
	}
	lc, lp, pb := uint32(b%9), uint32(b/9%5), uint32(b/45)
	if lc+lp > maxLiteralBits {
		return false
	}
	l.lc, l.posMask = lc, 1<<pb-1
	l.litMask = 0x100<<lp - 0x100>>lc
	l.used = literal + literalProbs<<(lc+lp)
	return true
}

// reset makes all symbols equally likely.
func (l *lzma) reset() {
	l.state, l.rep = 0, [4]uint32{}
	probs := l.probs[:l.used]
	probs[0] = 1 << 10
	for n := 1; n < len(probs); n *= 2 {
		copy(probs[n:], probs[:n])
	}
}

// literalAt returns where the probabilities of the literal at pos begin. lp
// bits of the position and the upper lc bits of the byte before choose.
func (l *lzma) literalAt(pos int, prev byte) uint32 {
	return literal + 3*((uint32(pos)<<8|uint32(prev))&l.litMask<<l.lc)
}

// rangeCoder is where a decoder is in its input, as a value that the compiler
// keeps in registers.
type rangeCoder struct {
	pos       int
	rng, code uint32
}

// fill makes the range wide enough for the next bit. A chunk that ends too
// early reads as zeroes; pos tells afterwards.
func (r rangeCoder) fill(in []byte) rangeCoder {
	if r.rng < topRange {
		r.rng <<= 8
		r.code <<= 8
		if r.pos < len(in) {
			r.code |= uint32(in[r.pos])
		}
		r.pos++
	}
	return r
}

// bit decodes a bit and adapts its probability. fill must have been called.
func (r rangeCoder) bit(p *uint16) (rangeCoder, uint32) {
	v := *p
	bound := r.rng >> 11 * uint32(v)
	if r.code < bound {
		r.rng = bound
		*p = v + (1<<11-v)>>5
		return r, 0
	}
	r.rng -= bound
	r.code -= bound
	*p = v - v>>5
	return r, 1
}

// choose is bit without a branch, for bits that are hard to foretell.
func (r rangeCoder) choose(p *uint16) (rangeCoder, uint32) {
	v := uint32(*p)
	bound := r.rng >> 11 * v
	zero := uint32(int64(uint64(r.code)-uint64(bound)) >> 63) // all ones for a zero
	r.rng -= bound
	r.rng ^= (r.rng ^ bound) & zero
	r.code -= bound &^ zero
	*p = uint16(v - uint32(int32(v-2017&zero)>>5))
	return r, 1 + zero
}

// tree decodes a symbol of as many bits, the highest first.
func (r rangeCoder) tree(in []byte, probs []uint16, bits int) (rangeCoder, uint32) {
	m, limit := uint32(1), uint32(1)<<bits
	probs = probs[:limit]
	for m < uint32(len(probs)) {
		var b uint32
		r, b = r.fill(in).choose(&probs[m])
		m = m<<1 | b
	}
	return r, m - limit
}

// reverse decodes a symbol of as many bits, the lowest first.
func (r rangeCoder) reverse(in []byte, probs []uint16, bits int) (rangeCoder, uint32) {
	m, sym := uint32(1), uint32(0)
	probs = probs[:uint32(1)<<bits]
	for i := 0; m < uint32(len(probs)); i++ {
		var b uint32
		r, b = r.fill(in).choose(&probs[m])
		m = m<<1 | b
		sym |= b << i
	}
	return r, sym
}

// length decodes the length of a match.
func (r rangeCoder) length(in []byte, probs []uint16, posState uint32) (rangeCoder, int) {
	probs = probs[:lenProbs]
	r, b := r.fill(in).bit(&probs[lenChoice])
	if b == 0 {
		r, n := r.tree(in, probs[lenLow+posState*8:], 3)
		return r, minMatch + int(n)
	}
	r, b = r.fill(in).bit(&probs[lenChoice2])
	if b == 0 {
		r, n := r.tree(in, probs[lenMid+posState*8:], 3)
		return r, minMatch + 8 + int(n)
	}
	r, n := r.tree(in, probs[lenHigh:], 8)
	return r, minMatch + 16 + int(n)
}

// distance decodes the distance of a match of n bytes, less one.
func (r rangeCoder) distance(in []byte, probs *[numProbs]uint16, n int) (rangeCoder, uint32) {
	r, slot := r.tree(in, probs[distSlot+min(n-minMatch, 3)*64:], 6)
	if slot < 4 {
		return r, slot
	}
	bits := int(slot>>1) - 1
	dist := (2 | slot&1) << bits
	if slot < 14 {
		r, low := r.reverse(in, probs[distLow+(slot-4)*32:], bits)
		return r, dist + low
	}
	high := uint32(0)
	for range bits - 4 {
		r = r.fill(in)
		r.rng >>= 1
		high <<= 1
		if r.code >= r.rng {
			r.code -= r.rng
			high |= 1
		}
	}
	r, low := r.reverse(in, probs[distAlign:], 4)
	return r, dist + high<<4 + low
}

// The state remembers what the last symbols were; from literalStates on the
// last one was no literal.
const literalStates = 7

var afterLiteral = [16]uint32{0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 4, 5}

func (l *lzma) after(literal, other uint32) uint32 {
	if l.state < literalStates {
		return literal
	}
	return other
}

// decodeGo is the [decoder] that knows no processor.
func (l *lzma) decodeGo(dst []byte, out int, in []byte, pos int) (int, bool) {
	r := rangeCoder{pos, l.rng, l.code}
	p := &l.probs
	for out < len(dst) {
		posState := uint32(out) & l.posMask
		var b uint32
		r, b = r.fill(in).bit(&p[isMatch+l.state*positions+posState])
		if b == 0 {
			var prev byte
			if out > 0 {
				prev = dst[out-1]
			}
			probs := p[l.literalAt(out, prev):][:literalProbs]
			m := uint32(1)
			if l.state >= literalStates {
				// The byte at the last distance is likely to be wrong: its bits
				// are part of the context until one differs.
				match, same := uint32(dst[out-1-int(l.rep[0])]), uint32(0x100)
				for same != 0 && m < 0x100 {
					match <<= 1
					at := match & same
					r, b = r.fill(in).choose(&probs[same+at+m])
					m = m<<1 | b
					if at>>8 != b {
						same = 0
					}
				}
			}
			for m < 0x100 {
				r, b = r.fill(in).choose(&probs[m])
				m = m<<1 | b
			}
			dst[out] = byte(m)
			out++
			l.state = afterLiteral[l.state]
			continue
		}
		var n int
		r, b = r.fill(in).bit(&p[isRep+l.state])
		if b == 0 {
			r, n = r.length(in, p[matchLen:], posState)
			var dist uint32
			r, dist = r.distance(in, p, n)
			l.rep = [4]uint32{dist, l.rep[0], l.rep[1], l.rep[2]}
			l.state = l.after(7, 10)
		} else if r, b = r.fill(in).bit(&p[isRepG0+l.state]); b == 0 {
			if r, b = r.fill(in).bit(&p[isRep0Long+l.state*positions+posState]); b == 0 {
				n = 1
				l.state = l.after(9, 11)
			}
		} else if r, b = r.fill(in).bit(&p[isRepG1+l.state]); b == 0 {
			l.rep = [4]uint32{l.rep[1], l.rep[0], l.rep[2], l.rep[3]}
		} else if r, b = r.fill(in).bit(&p[isRepG2+l.state]); b == 0 {
			l.rep = [4]uint32{l.rep[2], l.rep[0], l.rep[1], l.rep[3]}
		} else {
			l.rep = [4]uint32{l.rep[3], l.rep[0], l.rep[1], l.rep[2]}
		}
		if n == 0 {
			r, n = r.length(in, p[repLen:], posState)
			l.state = l.after(8, 11)
		}
		if uint64(l.rep[0]) >= uint64(out) || l.rep[0] >= l.dict || n > len(dst)-out {
			return r.pos, false
		}
		copyMatch(dst, out, int(l.rep[0])+1, n)
		out += n
	}
	r = r.fill(in)
	l.rng, l.code = r.rng, r.code
	return r.pos, true
}

// copyMatch repeats at out the n bytes that end dist bytes before.
func copyMatch(dst []byte, out, dist, n int) {
	from := dst[out-dist : out+n]
	for to := dst[out : out+n]; len(to) > 0; {
		// What is written is part of the next round's source.
		c := copy(to, from[:dist])
		to, dist = to[c:], dist+c
	}
}
