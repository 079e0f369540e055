// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

var errSQLite = errors.New("the SQLite database is damaged")

// sqliteFile reads tables of a database as https://www.sqlite.org/fileformat.html
// describes it. Every page is visited once at most, so that no circle of pages
// keeps a reader busy.
type sqliteFile struct {
	f        io.ReaderAt
	pageSize int64
	usable   int64 // of a page, without what is reserved at its end
	pages    int64
	seen     []uint64 // bit set of pages
}

// readSQLite visits the column "blob" of the table Packages, whose columns are
// (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL).
func readSQLite(ctx context.Context, f io.ReaderAt, size int64, visit func([]byte) error) error {
	head := make([]byte, 100)
	if _, err := f.ReadAt(head, 0); err != nil || !bytes.HasPrefix(head, []byte("SQLite format 3\x00")) {
		return errors.Join(errors.New("not a SQLite database"), err)
	}
	db := &sqliteFile{f: f, pageSize: int64(binary.BigEndian.Uint16(head[16:]))}
	if db.pageSize == 1 {
		db.pageSize = 64 << 10
	}
	if db.pageSize < 512 || db.pageSize&(db.pageSize-1) != 0 {
		return fmt.Errorf("%w: pages of %d bytes", errSQLite, db.pageSize)
	}
	db.usable = db.pageSize - int64(head[20])
	if db.usable < 480 {
		return fmt.Errorf("%w: %d bytes of a page are reserved", errSQLite, head[20])
	}
	db.pages = size / db.pageSize
	db.seen = make([]uint64, db.pages/64+1)
	var root int64
	err := db.table(ctx, 1, 0, func(record []byte) error {
		// sqlite_schema: type, name, tbl_name, rootpage, sql
		columns, err := sqliteColumns(record, 4)
		if err == nil && string(columns[0]) == "table" && string(columns[1]) == "Packages" {
			for _, b := range columns[3] {
				root = root<<8 | int64(b)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	if root == 0 {
		return errors.New("no table Packages")
	}
	return db.table(ctx, root, 0, func(record []byte) error {
		columns, err := sqliteColumns(record, 2)
		if err != nil {
			return err
		}
		return visit(columns[1])
	})
}

// page reads a page that was not read before.
func (db *sqliteFile) page(n int64) ([]byte, error) {
	if n < 1 || n > db.pages || db.seen[n/64]&(1<<(n%64)) != 0 {
		return nil, fmt.Errorf("%w: page %d of %d is outside or referred to twice", errSQLite, n, db.pages)
	}
	db.seen[n/64] |= 1 << (n % 64)
	b := make([]byte, db.pageSize)
	if k, err := db.f.ReadAt(b, (n-1)*db.pageSize); k < len(b) {
		return nil, err
	}
	return b, nil
}

// Kinds of B-tree pages of tables.
const (
	sqliteInterior = 5
	sqliteLeaf     = 13
)

// table visits the records of the table whose root, or a node of whose tree, is
// page n.
func (db *sqliteFile) table(ctx context.Context, n int64, depth int, visit func([]byte) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	const maxDepth = 32 // a tree of four levels holds a terabyte
	if depth > maxDepth {
		return fmt.Errorf("%w: its trees are too deep", errSQLite)
	}
	b, err := db.page(n)
	if err != nil {
		return err
	}
	head := b
	if n == 1 {
		head = b[100:]
	}
	cells := int64(binary.BigEndian.Uint16(head[3:]))
	var at []byte // the array of offsets
	switch head[0] {
	case sqliteLeaf:
		at = head[8:]
	case sqliteInterior:
		at = head[12:]
	default:
		return fmt.Errorf("%w: page %d is of kind %d", errSQLite, n, head[0])
	}
	if 2*cells > int64(len(at)) {
		return fmt.Errorf("%w: page %d has %d cells", errSQLite, n, cells)
	}
	for i := range cells {
		offset := int64(binary.BigEndian.Uint16(at[2*i:]))
		if offset+4 > db.usable {
			return fmt.Errorf("%w: page %d", errSQLite, n)
		}
		cell := b[offset:db.usable]
		if head[0] == sqliteInterior {
			if err := db.table(ctx, int64(binary.BigEndian.Uint32(cell)), depth+1, visit); err != nil {
				return err
			}
			continue
		}
		record, err := db.record(cell)
		if err == nil {
			err = visit(record)
		}
		if err != nil {
			return err
		}
	}
	if head[0] == sqliteInterior {
		return db.table(ctx, int64(binary.BigEndian.Uint32(head[8:])), depth+1, visit)
	}
	return nil
}

// record returns the payload of a cell: its length, the row's number, then the
// payload, of which a part may lie on overflow pages.
func (db *sqliteFile) record(cell []byte) ([]byte, error) {
	length, n := sqliteVarint(cell)
	_, m := sqliteVarint(cell[n:])
	if n == 0 || m == 0 || length < 0 || length > min(maxRPMHeader, db.pages*db.pageSize) {
		return nil, fmt.Errorf("%w: a record of %d bytes", errSQLite, length)
	}
	cell = cell[n+m:]
	local := length
	if most := db.usable - 35; length > most {
		least := (db.usable-12)*32/255 - 23
		if local = least + (length-least)%(db.usable-4); local > most {
			local = least
		}
	}
	if local > int64(len(cell)) {
		return nil, fmt.Errorf("%w: a record reaches beyond its page", errSQLite)
	}
	if local == length {
		return cell[:local], nil
	}
	if int64(len(cell)) < local+4 {
		return nil, fmt.Errorf("%w: a record reaches beyond its page", errSQLite)
	}
	record := append([]byte(nil), cell[:local]...)
	next := int64(binary.BigEndian.Uint32(cell[local:]))
	for int64(len(record)) < length {
		b, err := db.page(next)
		if err != nil {
			return nil, err
		}
		next = int64(binary.BigEndian.Uint32(b))
		record = append(record, b[4:4+min(db.usable-4, length-int64(len(record)))]...)
	}
	return record, nil
}

// sqliteColumns returns the first columns of a record as their bytes; of a number
// these are its big-endian digits.
func sqliteColumns(record []byte, count int) ([][]byte, error) {
	size, n := sqliteVarint(record)
	if n == 0 || size < int64(n) || size > int64(len(record)) {
		return nil, fmt.Errorf("%w: a record's header", errSQLite)
	}
	types, data := record[n:size], record[size:]
	columns := make([][]byte, 0, count)
	for len(columns) < count {
		typ, n := sqliteVarint(types)
		if n == 0 {
			return nil, fmt.Errorf("%w: a record has %d columns", errSQLite, len(columns))
		}
		types = types[n:]
		var width int64
		switch {
		case typ < 0 || typ == 10 || typ == 11:
			return nil, fmt.Errorf("%w: a column of type %d", errSQLite, typ)
		case typ >= 12:
			width = (typ - 12) / 2
		default:
			width = [...]int64{0, 1, 2, 3, 4, 6, 8, 8, 0, 0}[typ]
		}
		if width > int64(len(data)) {
			return nil, fmt.Errorf("%w: a column reaches beyond its record", errSQLite)
		}
		columns = append(columns, data[:width])
		data = data[width:]
	}
	return columns, nil
}

// sqliteVarint reads a number of one to nine bytes; a length of zero says that
// there is none.
func sqliteVarint(b []byte) (v int64, n int) {
	for i := range min(len(b), 9) {
		if i == 8 {
			return v<<8 | int64(b[8]), 9
		}
		v = v<<7 | int64(b[i]&0x7f)
		if b[i] < 0x80 {
			return v, i + 1
		}
	}
	return 0, 0
}
