// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/s2"
)

// recordLog is a queue of records: all are added, then all are taken. A tree
// may have millions, so they wait packed, and their memory is given back as
// they are taken.
type recordLog struct {
	chunks [][]byte // packed
	adding []byte
	taking recordReader
	buf    []byte
}

// recordChunk is how many bytes of records are packed at a time.
const recordChunk = 64 << 10

func (l *recordLog) add(record []byte) {
	if len(l.adding) > 0 && len(l.adding)+len(record) > recordChunk {
		l.seal()
	}
	l.adding = append(l.adding, record...)
}

func (l *recordLog) seal() {
	l.buf = s2.Encode(l.buf[:cap(l.buf)], l.adding)
	l.chunks = append(l.chunks, append([]byte(nil), l.buf...))
	l.adding = l.adding[:0]
}

// next returns a reader at the next record, or nil behind the last.
func (l *recordLog) next() (*recordReader, error) {
	if len(l.adding) > 0 {
		l.seal()
		l.adding = nil
	}
	if len(l.taking.rest) > 0 {
		return &l.taking, nil
	}
	if len(l.chunks) == 0 {
		return nil, nil
	}
	var err error
	if l.buf, err = s2.Decode(l.buf[:cap(l.buf)], l.chunks[0]); err != nil {
		return nil, fmt.Errorf("records of the tree: %w", err)
	}
	l.chunks[0], l.chunks = nil, l.chunks[1:]
	l.taking.rest = l.buf
	return &l.taking, nil
}

// recordReader takes apart what was put together with binary.AppendUvarint,
// binary.AppendVarint and appendBytes by this process.
type recordReader struct{ rest []byte }

func (r *recordReader) uint() uint64 {
	v, n := binary.Uvarint(r.rest)
	r.rest = r.rest[n:]
	return v
}

func (r *recordReader) int() int64 {
	v, n := binary.Varint(r.rest)
	r.rest = r.rest[n:]
	return v
}

// bytes returns what is valid until the next record.
func (r *recordReader) bytes() []byte {
	n := r.uint()
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func appendBytes[T []byte | string](dst []byte, b T) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(b))), b...)
}
