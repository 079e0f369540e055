// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/list"
	"fmt"
	"sync"
)

// FragmentBlock returns where a fragment block is in the image and its size
// word, which is like those of [Inode.Blocks].
func (img *Image) FragmentBlock(index uint32) (start int64, word uint32, err error) {
	if img.fragments == nil {
		return 0, 0, corruptf("fragment %d of an image without fragments", index)
	}
	b, err := img.fragments.entry(img, uint64(index))
	if err != nil {
		return 0, 0, err
	}
	e := decodeFragmentEntry(b)
	n, _ := dataWordSize(e.Size)
	if err := checkDataWord(e.Size, img.sb.BlockSize); err != nil {
		return 0, 0, fmt.Errorf("fragment %d: %w", index, err)
	}
	if end := img.sb.InodeTable; n == 0 || e.Start < uint64(img.dataAt) || e.Start > end || uint64(n) > end-e.Start {
		return 0, 0, corruptf("fragment %d: %d bytes at %d lie outside the data area, from %d to %d", index, n, e.Start, img.dataAt, end)
	}
	return int64(e.Start), e.Size, nil
}

// unpackBlock unpacks one block, whose bytes in the image are src, into dst.
// The result may be src itself.
func unpackBlock(dec decompressor, dst, src []byte, word uint32) ([]byte, error) {
	if _, stored := dataWordSize(word); stored {
		return src, nil
	}
	n, err := dec.Decompress(dst, src)
	return dst[:n], err
}

// dataCacheBytes bounds the cache of unpacked blocks that file system readers
// share.
const dataCacheBytes = 16 << 20

// dataCache keeps the unpacked blocks used last, by their place in the image.
type dataCache struct {
	mu     sync.Mutex
	blocks map[int64]*list.Element // of *dataBlock
	order  list.List               // most recently used first
	size   int
}

type dataBlock struct {
	pos  int64
	word uint32
	data []byte
}

// block returns the unpacked block at pos, which is shared and not to be
// changed.
func (img *Image) block(pos int64, word uint32) ([]byte, error) {
	c := &img.data
	c.mu.Lock()
	if e, ok := c.blocks[pos]; ok && e.Value.(*dataBlock).word == word {
		c.order.MoveToFront(e)
		c.mu.Unlock()
		return e.Value.(*dataBlock).data, nil
	}
	c.mu.Unlock()

	n, stored := dataWordSize(word)
	src := make([]byte, n)
	if err := img.readAt(src, pos); err != nil {
		return nil, err
	}
	data := src
	if !stored {
		dst := make([]byte, img.sb.BlockSize)
		m, err := img.decompress(dst, src)
		if err != nil {
			return nil, fmt.Errorf("block at %d: %w", pos, err)
		}
		data = dst[:m:m]
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocks == nil {
		c.blocks = make(map[int64]*list.Element)
	}
	if old, ok := c.blocks[pos]; ok {
		c.drop(old)
	}
	c.blocks[pos] = c.order.PushFront(&dataBlock{pos, word, data})
	c.size += cap(data)
	for c.size > dataCacheBytes && c.order.Len() > 1 {
		c.drop(c.order.Back())
	}
	return data, nil
}

func (c *dataCache) drop(e *list.Element) {
	b := c.order.Remove(e).(*dataBlock)
	delete(c.blocks, b.pos)
	c.size -= cap(b.data)
}

// tail returns a file's bytes in its fragment.
func (img *Image) tail(ino *Inode) ([]byte, error) {
	pos, word, err := img.FragmentBlock(ino.Fragment)
	if err != nil {
		return nil, err
	}
	b, err := img.block(pos, word)
	if err != nil {
		return nil, err
	}
	return cutTail(b, ino, int64(img.sb.BlockSize))
}

// cutTail cuts a file's tail out of its unpacked fragment block.
func cutTail(b []byte, ino *Inode, blockSize int64) ([]byte, error) {
	from, n := int64(ino.FragOffset), ino.tailLen(blockSize)
	if from+n > int64(len(b)) {
		return nil, corruptf("fragment %d has %d bytes, inode %d needs %d at %d", ino.Fragment, len(b), ino.Number, n, from)
	}
	return b[from : from+n], nil
}

// blockLen is the unpacked length of block i of a file.
func (i *Inode) blockLen(block int, blockSize int64) int64 {
	return min(blockSize, i.Size-int64(block)*blockSize)
}
