// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"encoding/binary"
	"testing"
)

// All entries are found while the table grows, and no others. Digests with the
// same first word make chains, which start anywhere, as those of a hash do.
func TestContentTable(t *testing.T) {
	key := func(i uint32) *digest {
		var d digest
		binary.LittleEndian.PutUint32(d[:], i/3*2654435761)
		binary.LittleEndian.PutUint32(d[4:], i%3*1e9)
		return &d
	}
	var table contentTable
	const n = 100_000
	for i := range uint32(n) {
		if _, ok := table.find(key(i)); ok {
			t.Fatalf("entry %d is there before it was added", i)
		}
		table.add(key(i), fragmentPlace{i, i + 1})
	}
	for i := range uint32(n) {
		if at, ok := table.find(key(i)); !ok || at != (fragmentPlace{i, i + 1}) {
			t.Fatalf("entry %d: %v, %v", i, at, ok)
		}
	}
}
