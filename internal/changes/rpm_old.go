// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// readNDB visits the headers of a Packages.db as lib/backend/ndb/rpmpkg.c of rpm
// writes it: a header and pages of slots, each of which refers to a blob. All
// numbers are little-endian, a block has 16 bytes.
func readNDB(ctx context.Context, f io.ReaderAt, size int64, visit func([]byte) error) error {
	const (
		blockSize = 16
		pageSize  = 4096
	)
	damaged := errors.New("the NDB database is damaged")
	head := make([]byte, 32)
	if _, err := f.ReadAt(head, 0); err != nil || string(head[:4]) != "RpmP" {
		return errors.Join(errors.New("not an NDB database"), err)
	}
	if version := binary.LittleEndian.Uint32(head[4:]); version != 0 {
		return fmt.Errorf("an NDB database of version %d, not 0", version)
	}
	pages := int64(binary.LittleEndian.Uint32(head[12:]))
	if pages > size/pageSize {
		return fmt.Errorf("%w: %d pages of slots", damaged, pages)
	}
	left := size // blobs cannot have more bytes than the file, unless they overlap
	slots := make([]byte, pageSize)
	for page := range pages {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.ReadAt(slots, page*pageSize); err != nil {
			return err
		}
		for at := 0; at < pageSize; at += blockSize {
			slot := slots[at:]
			if page == 0 && at < len(head) {
				continue
			}
			if string(slot[:4]) != "Slot" {
				return fmt.Errorf("%w: no slot at %d", damaged, page*pageSize+int64(at))
			}
			index := binary.LittleEndian.Uint32(slot[4:])
			if index == 0 {
				continue
			}
			pos := int64(binary.LittleEndian.Uint32(slot[8:])) * blockSize
			blob := make([]byte, blockSize)
			if _, err := f.ReadAt(blob, pos); err != nil {
				return fmt.Errorf("%w: package %d: %w", damaged, index, err)
			}
			n := int64(binary.LittleEndian.Uint32(blob[12:]))
			if string(blob[:4]) != "BlbS" || binary.LittleEndian.Uint32(blob[4:]) != index || n > left {
				return fmt.Errorf("%w: package %d", damaged, index)
			}
			left -= n
			header := make([]byte, n)
			if _, err := f.ReadAt(header, pos+blockSize); err != nil {
				return fmt.Errorf("%w: package %d: %w", damaged, index, err)
			}
			if err := visit(header); err != nil {
				return err
			}
		}
	}
	return nil
}

// bdbFile is a hash of Berkeley DB, whose pages src/dbinc/db_page.h describes.
type bdbFile struct {
	f        io.ReaderAt
	order    binary.ByteOrder
	pageSize int64
	pages    int64
	left     int64 // pages that may still be read; without circles they suffice
}

// Kinds of pages, and of items on them.
const (
	bdbHashUnsorted = 2
	bdbOverflow     = 7
	bdbHash         = 13

	bdbPageHeader = 26
	bdbOffPage    = 3 // an item that lies on overflow pages
	bdbKeyData    = 1
)

var errBDB = errors.New("the Berkeley DB database is damaged")

// readBDB visits the headers of a Packages hash, whose keys are numbers. The one
// of number zero is no package, but holds the highest number in use.
func readBDB(ctx context.Context, f io.ReaderAt, size int64, visit func([]byte) error) error {
	head := make([]byte, 72)
	if _, err := f.ReadAt(head, 0); err != nil {
		return errors.Join(errors.New("not a Berkeley DB database"), err)
	}
	const magic = 0x061561
	db := &bdbFile{f: f, order: binary.LittleEndian}
	if db.order.Uint32(head[12:]) != magic {
		db.order = binary.BigEndian
	}
	if db.order.Uint32(head[12:]) != magic {
		return errors.New("not a hash of Berkeley DB")
	}
	db.pageSize = int64(db.order.Uint32(head[20:]))
	if db.pageSize < 512 || db.pageSize > 64<<10 || db.pageSize&(db.pageSize-1) != 0 || head[24] != 0 {
		return fmt.Errorf("%w: pages of %d bytes, encryption %d", errBDB, db.pageSize, head[24])
	}
	db.pages = size / db.pageSize
	db.left = 2 * db.pages
	for n := int64(1); n < db.pages; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := db.page(n)
		if err != nil {
			return err
		}
		if kind := b[25]; kind != bdbHash && kind != bdbHashUnsorted {
			continue
		}
		items := int64(db.order.Uint16(b[20:]))
		if bdbPageHeader+2*items > db.pageSize {
			return fmt.Errorf("%w: page %d has %d items", errBDB, n, items)
		}
		for i := int64(1); i < items; i += 2 { // keys have even numbers
			// An item ends where the one before it begins; the first ends with the page.
			from := int64(db.order.Uint16(b[bdbPageHeader+2*i:]))
			to := int64(db.order.Uint16(b[bdbPageHeader+2*(i-1):]))
			if from >= to || to > db.pageSize {
				return fmt.Errorf("%w: item %d of page %d", errBDB, i, n)
			}
			item := b[from:to]
			if item[0] == bdbKeyData {
				item = item[1:]
			} else if item, err = db.offPage(item); err != nil {
				return err
			}
			if len(item) <= 4 { // the value of number zero
				continue
			}
			if err := visit(item); err != nil {
				return err
			}
		}
	}
	return nil
}

func (db *bdbFile) page(n int64) ([]byte, error) {
	if db.left--; n >= db.pages || db.left < 0 {
		return nil, fmt.Errorf("%w: page %d of %d is outside, or referred to too often", errBDB, n, db.pages)
	}
	b := make([]byte, db.pageSize)
	if k, err := db.f.ReadAt(b, n*db.pageSize); k < len(b) {
		return nil, err
	}
	return b, nil
}

// offPage reads an item from its chain of overflow pages.
func (db *bdbFile) offPage(item []byte) ([]byte, error) {
	if len(item) < 12 || item[0] != bdbOffPage {
		return nil, fmt.Errorf("%w: an item of kind %d", errBDB, item[0])
	}
	next, length := int64(db.order.Uint32(item[4:])), int64(db.order.Uint32(item[8:]))
	if length > db.pages*db.pageSize {
		return nil, fmt.Errorf("%w: an item of %d bytes", errBDB, length)
	}
	var value []byte
	for next != 0 && int64(len(value)) < length {
		b, err := db.page(next)
		if err != nil {
			return nil, err
		}
		n := int64(db.order.Uint16(b[22:])) // HOFFSET: bytes on this page
		if b[25] != bdbOverflow || n == 0 || bdbPageHeader+n > db.pageSize {
			return nil, fmt.Errorf("%w: page %d is no overflow page", errBDB, next)
		}
		value = append(value, b[bdbPageHeader:][:n]...)
		next = int64(db.order.Uint32(b[16:]))
	}
	if int64(len(value)) != length {
		return nil, fmt.Errorf("%w: an item has %d bytes of %d", errBDB, len(value), length)
	}
	return value, nil
}
