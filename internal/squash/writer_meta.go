// SPDX-License-Identifier: Apache-2.0

package squash

import "encoding/binary"

// metaBlock appends one metadata block, header included, to dst.
func appendMetaBlock(dst []byte, c compressor, content []byte) ([]byte, error) {
	var packed [metaBlockSize]byte
	n, ok, err := c.Compress(packed[:], content)
	if err != nil {
		return dst, err
	}
	if !ok {
		dst = binary.LittleEndian.AppendUint16(dst, metaHeader(len(content), true))
		return append(dst, content...), nil
	}
	dst = binary.LittleEndian.AppendUint16(dst, metaHeader(n, false))
	return append(dst, packed[:n]...), nil
}

// metaWriter builds a table that is one stream cut into metadata blocks. The
// packed blocks wait: the place of a table in the image is not known before the
// ones in front of it are complete.
type metaWriter struct {
	comp    compressor
	pending []byte // less than a block
	packed  stream
}

// ref returns the position of the next byte written.
func (m *metaWriter) ref() metaRef { return makeRef(uint64(m.packed.size()), len(m.pending)) }

func (m *metaWriter) write(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), metaBlockSize-len(m.pending))
		m.pending = append(m.pending, p[:n]...)
		p = p[n:]
		if len(m.pending) == metaBlockSize {
			if err := m.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush ends the current block; with it the table, unless it is full.
func (m *metaWriter) flush() error {
	if len(m.pending) == 0 {
		return nil
	}
	var packed [metaHeaderSize + metaBlockSize]byte
	block, err := appendMetaBlock(packed[:0], m.comp, m.pending)
	if err != nil {
		return err
	}
	m.pending = m.pending[:0]
	return m.packed.write(block)
}
