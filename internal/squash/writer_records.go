// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/s2"
)

// recordLog is a queue of records: all are added, then all are taken. A tree
// may have millions, so they wait packed.
type recordLog struct {
	packed stream // chunks, each behind its length
	adding []byte
	reader *streamReader
	taking recordReader
	buf    []byte
}

// recordChunk is how many bytes of records are packed at a time.
const recordChunk = 64 << 10

func (l *recordLog) add(record []byte) error {
	if len(l.adding) > 0 && len(l.adding)+len(record) > recordChunk {
		if err := l.seal(); err != nil {
			return err
		}
	}
	l.adding = append(l.adding, record...)
	return nil
}

func (l *recordLog) seal() error {
	l.buf = s2.Encode(l.buf[:cap(l.buf)], l.adding)
	l.adding = l.adding[:0]
	if err := l.packed.write(binary.LittleEndian.AppendUint32(nil, uint32(len(l.buf)))); err != nil {
		return err
	}
	return l.packed.write(l.buf)
}

// next returns a reader at the next record, or nil behind the last.
func (l *recordLog) next() (*recordReader, error) {
	if len(l.taking.rest) > 0 {
		return &l.taking, nil
	}
	if len(l.adding) > 0 {
		if err := l.seal(); err != nil {
			return nil, err
		}
		l.adding = nil
	}
	if l.reader == nil {
		l.reader = l.packed.from(0)
	}
	if l.reader.left() <= 0 {
		l.packed.release()
		return nil, nil
	}
	n, err := l.reader.take(4)
	if err == nil {
		n, err = l.reader.take(int(binary.LittleEndian.Uint32(n)))
	}
	if err == nil {
		l.buf, err = s2.Decode(l.buf[:cap(l.buf)], n)
	}
	if err != nil {
		return nil, fmt.Errorf("records of the tree: %w", err)
	}
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
