// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/list"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
)

// metaCacheBlocks bounds the cache of decoded metadata blocks: 4 MiB.
const metaCacheBlocks = 512

// metaBlock is one decoded metadata block. Its content is shared and never
// changed.
type metaBlock struct {
	pos  int64 // byte offset in the image
	next int64 // of the block behind it
	data []byte
}

// metaCache keeps the metadata blocks used last.
type metaCache struct {
	last   atomic.Pointer[metaBlock] // used last; inodes are mostly read in their order
	mu     sync.Mutex
	blocks map[int64]*list.Element // of *metaBlock
	order  list.List               // most recently used first
}

func (c *metaCache) get(pos int64) *metaBlock {
	if b := c.last.Load(); b != nil && b.pos == pos {
		return b
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.blocks[pos]
	if !ok {
		return nil
	}
	c.order.MoveToFront(e)
	b := e.Value.(*metaBlock)
	c.last.Store(b)
	return b
}

func (c *metaCache) put(b *metaBlock) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.blocks[b.pos]; ok {
		return
	}
	if c.blocks == nil {
		c.blocks = make(map[int64]*list.Element)
	}
	c.blocks[b.pos] = c.order.PushFront(b)
	if len(c.blocks) > metaCacheBlocks {
		last := c.order.Back()
		c.order.Remove(last)
		delete(c.blocks, last.Value.(*metaBlock).pos)
	}
}

// metaTable is a run of metadata blocks: byte offsets in the image.
type metaTable struct {
	name       string
	start, end int64
}

// metaBlockAt returns the metadata block at pos, which must lie before end.
func (img *Image) metaBlockAt(pos, end int64) (*metaBlock, error) {
	if pos < superblockSize || pos > end-metaHeaderSize {
		return nil, corruptf("metadata block at %d, outside its table, which ends at %d", pos, end)
	}
	if b := img.meta.get(pos); b != nil {
		if b.next > end {
			return nil, corruptf("metadata block at %d reaches beyond its table's end at %d", pos, end)
		}
		return b, nil
	}
	buf := make([]byte, min(int64(metaHeaderSize+metaBlockSize), end-pos))
	if err := img.readAt(buf, pos); err != nil {
		return nil, fmt.Errorf("metadata block: %w", err)
	}
	n, stored := metaHeaderLen(binary.LittleEndian.Uint16(buf))
	if n > metaBlockSize {
		return nil, corruptf("metadata block at %d claims %d bytes: the limit is %d", pos, n, metaBlockSize)
	}
	if n > len(buf)-metaHeaderSize {
		return nil, corruptf("metadata block at %d reaches beyond its table's end at %d", pos, end)
	}
	b := &metaBlock{pos: pos, next: pos + metaHeaderSize + int64(n), data: buf[metaHeaderSize:][:n]}
	if !stored {
		out := make([]byte, metaBlockSize)
		m, err := img.decompress(out, b.data)
		if err != nil {
			return nil, fmt.Errorf("metadata block at %d: %w", pos, err)
		}
		b.data = out[:m]
	}
	if len(b.data) == 0 {
		return nil, corruptf("metadata block at %d is empty", pos)
	}
	img.meta.put(b)
	return b, nil
}

// rawBound returns an upper bound of the length a table has when decoded, from
// its block headers alone.
func (img *Image) rawBound(t metaTable) (int64, error) {
	var raw int64
	buf := make([]byte, 64<<10)
	have, at := 0, t.start // buf[:have] is the image from at
	for pos := t.start; pos < t.end; {
		if pos-at+metaHeaderSize > int64(have) {
			at, have = pos, int(min(int64(len(buf)), t.end-pos))
			if have < metaHeaderSize {
				break // too short for a block, so nothing can refer to it
			}
			if err := img.readAt(buf[:have], at); err != nil {
				return 0, fmt.Errorf("%s table: %w", t.name, err)
			}
		}
		n, _ := metaHeaderLen(binary.LittleEndian.Uint16(buf[pos-at:]))
		pos += metaHeaderSize + int64(n)
		raw += metaBlockSize
	}
	return raw, nil
}

// metaCursor reads a table's content from some place on, across blocks.
type metaCursor struct {
	img     *Image
	table   metaTable
	block   *metaBlock
	rest    []byte // of the current block
	scratch []byte // for what lies in more than one block
}

// cursor returns a cursor at a reference into table t.
func (img *Image) cursor(t metaTable, ref metaRef) (*metaCursor, error) {
	c := &metaCursor{img: img}
	return c, c.seek(t, ref)
}

// seek moves the cursor.
func (c *metaCursor) seek(t metaTable, ref metaRef) error {
	c.table = t
	if ref.block() > uint64(t.end-t.start) {
		return corruptf("reference %#x lies outside the %s table", uint64(ref), t.name)
	}
	b, err := c.img.metaBlockAt(t.start+int64(ref.block()), t.end)
	if err != nil {
		return fmt.Errorf("%s table: %w", t.name, err)
	}
	if ref.offset() >= len(b.data) {
		return corruptf("reference %#x lies behind the end of its %s table block", uint64(ref), t.name)
	}
	c.block, c.rest = b, b.data[ref.offset():]
	return nil
}

// ref returns where the cursor is.
func (c *metaCursor) ref() metaRef {
	if len(c.rest) == 0 {
		return makeRef(uint64(c.block.next-c.table.start), 0)
	}
	return makeRef(uint64(c.block.pos-c.table.start), len(c.block.data)-len(c.rest))
}

// take returns the next n bytes; the slice is only valid until the next call.
func (c *metaCursor) take(n int) ([]byte, error) {
	if n <= len(c.rest) {
		b := c.rest[:n]
		c.rest = c.rest[n:]
		return b, nil
	}
	c.scratch = append(c.scratch[:0], c.rest...)
	for {
		b, err := c.img.metaBlockAt(c.block.next, c.table.end)
		if err != nil {
			return nil, fmt.Errorf("%s table: %w", c.table.name, err)
		}
		c.block = b
		if need := n - len(c.scratch); need <= len(b.data) {
			c.scratch = append(c.scratch, b.data[:need]...)
			c.rest = b.data[need:]
			return c.scratch, nil
		}
		c.scratch = append(c.scratch, b.data...)
	}
}

// lookupTable is a table of entries of one size, found through an index of
// pointers to its metadata blocks.
type lookupTable struct {
	metaTable
	entrySize int
	count     uint64
	blocks    []int64 // byte offsets in the image
}

// loadTable reads the index of the table of count entries at pos and checks
// that its blocks lie between lowest and the index, which ends before end.
func (img *Image) loadTable(name string, pos, lowest, end int64, count uint64, entrySize int) (*lookupTable, error) {
	n := tableBlocks(count, entrySize)
	if pos < lowest || pos > end || n > uint64(end-pos)/tablePointerSize {
		return nil, corruptf("%s table at %d: %d entries do not fit before %d", name, pos, count, end)
	}
	t := &lookupTable{metaTable: metaTable{name, pos, pos}, entrySize: entrySize, count: count}
	buf := make([]byte, n*tablePointerSize)
	if err := img.readAt(buf, pos); err != nil {
		return nil, fmt.Errorf("%s table: %w", name, err)
	}
	t.blocks = make([]int64, n)
	prev := lowest
	for i := range t.blocks {
		p := binary.LittleEndian.Uint64(buf[i*tablePointerSize:])
		if p < uint64(prev) || p >= uint64(pos) {
			return nil, corruptf("%s table: block %d at %d: want it from %d to %d", name, i, p, prev, pos)
		}
		t.blocks[i] = int64(p)
		prev = int64(p) + metaHeaderSize + 1
	}
	if n > 0 {
		t.start = t.blocks[0]
	}
	return t, nil
}

// entry returns entry i. The result is only valid until the block leaves the
// cache's hands, so it is not to be changed.
func (t *lookupTable) entry(img *Image, i uint64) ([]byte, error) {
	if i >= t.count {
		return nil, corruptf("entry %d of the %s table, which has %d", i, t.name, t.count)
	}
	at := i * uint64(t.entrySize)
	b, err := img.metaBlockAt(t.blocks[at/metaBlockSize], t.end)
	if err != nil {
		return nil, fmt.Errorf("%s table: %w", t.name, err)
	}
	off := int(at % metaBlockSize)
	if off+t.entrySize > len(b.data) {
		return nil, corruptf("%s table: its block %d is too short for entry %d", t.name, at/metaBlockSize, i)
	}
	return b.data[off : off+t.entrySize], nil
}
