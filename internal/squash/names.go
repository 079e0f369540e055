// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"container/heap"
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// nameReader reads directories in byte order. Their names are held in memory while
// what is below them is walked; those of large directories are in sorted runs in a
// file. Directories are done with in the reverse of the order they were read in.
type nameReader struct {
	runs stream // names behind their lengths
	held int    // bytes of names in memory
}

// fewNames is how many bytes of names a directory may have in memory in any case.
const fewNames = 16 << 10

// nameList is the sorted names of one directory.
type nameList struct {
	of    *nameReader
	names []string
	bytes int   // of names, when it was read
	from  int64 // of the runs in the reader's stream
	runs  nameRuns
}

// read reads the directory open at fd.
func (r *nameReader) read(fd int) (*nameList, error) {
	buf := make([]byte, 32<<10)
	return r.list(func(names []string) (_ []string, bytes int, err error) {
		err = ignoringEINTR(func() (err error) {
			bytes, err = unix.ReadDirent(fd, buf)
			return err
		})
		if err != nil {
			return names, 0, err
		}
		_, _, names = unix.ParseDirent(buf[:bytes], -1, names)
		return names, bytes, nil
	})
}

// list sorts the names that more adds, which says how many bytes they are; none
// follow when they are none.
func (r *nameReader) list(more func(names []string) (_ []string, bytes int, err error)) (*nameList, error) {
	l := &nameList{of: r, from: r.runs.size()}
	var ends []int64 // of runs
	spill := func() error {
		slices.Sort(l.names)
		for _, name := range l.names {
			if err := r.runs.write(appendName(nil, name)); err != nil {
				return err
			}
		}
		clear(l.names)
		l.names, l.bytes = l.names[:0], 0
		ends = append(ends, r.runs.size())
		return nil
	}
	for {
		names, n, err := more(l.names)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		l.names, l.bytes = names, l.bytes+n
		if l.bytes > fewNames && r.held+l.bytes > r.runs.spool.holds() {
			if err := spill(); err != nil {
				return nil, err
			}
		}
	}
	if len(ends) == 0 {
		slices.Sort(l.names)
		r.held += l.bytes
		return l, nil
	}
	err := spill()
	if err == nil {
		err = r.runs.flush() // so that readers need not mind what is added later
	}
	at := l.from
	for _, end := range ends {
		run := &nameRun{r: r.runs.from(at), left: end - at}
		at = end
		if err == nil && run.left > 0 {
			err = run.next()
			l.runs = append(l.runs, run)
		}
	}
	heap.Init(&l.runs)
	l.names = nil
	return l, err
}

// appendName appends a name behind its length.
func appendName(dst []byte, name string) []byte {
	return append(binary.LittleEndian.AppendUint16(dst, uint16(len(name))), name...)
}

// next returns the next name, if there is one.
func (l *nameList) next() (name string, ok bool, err error) {
	if len(l.runs) == 0 {
		if len(l.names) == 0 {
			return "", false, nil
		}
		name, l.names = l.names[0], l.names[1:]
		return name, true, nil
	}
	first := l.runs[0]
	name = first.name
	if first.left == 0 {
		heap.Pop(&l.runs)
		return name, true, nil
	}
	err = first.next()
	heap.Fix(&l.runs, 0)
	return name, err == nil, err
}

// done gives the directory's names back.
func (l *nameList) done() {
	l.of.held -= l.bytes
	l.of.runs.truncate(l.from)
}

// nameRun is a row of sorted names.
type nameRun struct {
	r    *streamReader
	left int64
	name string // the first
}

func (n *nameRun) next() error {
	b, err := n.r.take(2)
	if err == nil {
		size := int(binary.LittleEndian.Uint16(b))
		n.left -= int64(2 + size)
		b, err = n.r.take(size)
	}
	n.name = string(b)
	return err
}

// nameRuns is a heap of runs by their first names.
type nameRuns []*nameRun

func (h nameRuns) Len() int           { return len(h) }
func (h nameRuns) Less(i, j int) bool { return h[i].name < h[j].name }
func (h nameRuns) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *nameRuns) Push(x any)        { *h = append(*h, x.(*nameRun)) }

func (h *nameRuns) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	*h = (*h)[:last]
	return x
}
