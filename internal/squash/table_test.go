// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

func testSpool(t testing.TB, held int) *spool {
	s := &spool{dir: t.TempDir(), held: held}
	t.Cleanup(s.close)
	return s
}

// All records are found while the table grows, in memory and beyond, and no
// others.
func TestTable(t *testing.T) {
	for _, held := range []int{1, segmentBytes} {
		table := newTable(testSpool(t, held), 12, 20)
		const n = 60_000
		key := func(i int) []byte {
			return binary.LittleEndian.AppendUint64([]byte{byte(i), 1, 2, 3}, uint64(i/256))
		}
		for i := range n {
			if _, ok := table.find(key(i)); ok {
				t.Fatalf("%d is there before it was added", i)
			}
			number, err := table.add(key(i))
			if err != nil || number != i {
				t.Fatalf("record %d: number %d, %v", i, number, err)
			}
			binary.LittleEndian.PutUint64(table.at(number)[12:], uint64(i)*3)
		}
		for i := range n {
			number, ok := table.find(key(i))
			if !ok || number != i || binary.LittleEndian.Uint64(table.at(number)[12:]) != uint64(i)*3 {
				t.Fatalf("record %d: number %d, %v", i, number, ok)
			}
		}
	}
}

// A stream reads back what was written, wherever it lies, also after its end was
// cut off and written anew.
func TestStream(t *testing.T) {
	for _, held := range []int{1, 100, heldBytes} {
		s := stream{spool: testSpool(t, held)}
		var want []byte
		step := func(n int, b byte) {
			for i := range n {
				p := strings.Repeat(string(rune(b)), i%300)
				want = append(want, p...)
				if err := s.write([]byte(p)); err != nil {
					t.Fatal(err)
				}
			}
		}
		step(2000, 'a')
		for _, cut := range []int{len(want) - 10, len(want) - 1000, 5, 0} {
			s.truncate(int64(cut))
			want = want[:cut]
			step(700, 'b')
			from := int64(len(want) / 3)
			r := s.from(from)
			var got []byte
			for n := 1; r.left() > 0; n = n*7%1009 + 1 {
				b, err := r.take(int(min(int64(n), r.left())))
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, b...)
			}
			if string(got) != string(want[from:]) || s.size() != int64(len(want)) {
				t.Errorf("held %d, cut at %d: read %d bytes, want %d", held, cut, len(got), len(want)-int(from))
			}
			if _, err := r.take(1); err == nil {
				t.Error("read beyond the end")
			}
		}
	}
}

// Room that a full volume does not have is an error when it is made.
func TestTableNoSpace(t *testing.T) {
	testkit.NeedRoot(t)
	dir := t.TempDir()
	mounted(t, "-t", "tmpfs", "-o", "size=3m", "none", dir)
	s := &spool{dir: dir, held: 1}
	defer s.close()
	r := region{spool: s, size: 8}
	err := r.grow(1 << 20)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "free space") {
		t.Errorf("error %v", err)
	}
	list := stream{spool: s}
	for range 10 {
		if err = list.write(make([]byte, 1<<20)); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir) {
		t.Errorf("error %v", err)
	}
}

// A disk that fails under a mapped table ends the packing, not the program.
func TestTableFault(t *testing.T) {
	r := region{spool: testSpool(t, 1), size: 8}
	if err := r.grow(1); err != nil {
		t.Fatal(err)
	}
	if err := r.file.Truncate(0); err != nil {
		t.Fatal(err)
	}
	err := guard(t.Context(), func(context.Context) error {
		r.at(0)[0]++
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "cannot be read or written") {
		t.Errorf("error %v", err)
	}
}
