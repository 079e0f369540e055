// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"os"
	"slices"
	"sync"
)

// arrival is an object on its way to a file, for readers that do not wait for its end: a read waits for the units that
// hold its bytes, and these are fetched before others. What has landed is not received a second time, so that what a
// reader got is what is summed.
type arrival struct {
	file       *os.File
	size, unit int64
	head       int64 // what lies before it was there from the beginning

	mu     sync.Mutex
	moved  *sync.Cond
	units  []unitState
	wanted []int // by readers that wait, in the order of their coming
	err    error // why nothing more will come
}

type unitState uint8

const (
	unitMissing unitState = iota
	unitComing
	unitLanded
)

func newArrival(file *os.File, head, size, unit int64) *arrival {
	a := &arrival{file: file, size: size, unit: unit, head: head, units: make([]unitState, (size+unit-1)/unit)}
	a.moved = sync.NewCond(&a.mu)
	for i := range int(head / unit) {
		a.units[i] = unitLanded
	}
	return a
}

// span is where unit i lies, without what was there before.
func (a *arrival) span(i int) (from, to int64) {
	return max(int64(i)*a.unit, a.head), min(int64(i+1)*a.unit, a.size)
}

// next takes charge of a missing unit: of one that somebody waits for, else of the first.
func (a *arrival) next() (i int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	missing := func(s unitState) bool { return s == unitMissing }
	if at := slices.IndexFunc(a.wanted, func(i int) bool { return missing(a.units[i]) }); at >= 0 {
		i = a.wanted[at]
	} else if i = slices.IndexFunc(a.units, missing); i < 0 {
		return 0, false
	}
	a.units[i] = unitComing
	return i, true
}

// take takes charge of a unit that next has not given out.
func (a *arrival) take(i int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.units[i] = unitComing
}

func (a *arrival) land(i int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.units[i] = unitLanded
	a.moved.Broadcast()
}

// release makes units that were on their way missing again.
func (a *arrival) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, s := range a.units {
		if s == unitComing {
			a.units[i] = unitMissing
		}
	}
}

// fail ends all waiting, for ever.
func (a *arrival) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
	}
	a.moved.Broadcast()
}

// wait returns when unit i has landed.
func (a *arrival) wait(ctx context.Context, i int) error {
	stop := context.AfterFunc(ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.moved.Broadcast()
	})
	defer stop()
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		switch {
		case a.err != nil:
			return a.err
		case a.units[i] == unitLanded:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		a.moved.Wait()
	}
}

// ReadAt reads what has landed, after waiting for it.
func (a *arrival) ReadAt(p []byte, off int64) (int, error) {
	if end := min(off+int64(len(p)), a.size); end > a.head {
		for i := int(max(off, a.head) / a.unit); int64(i)*a.unit < end; i++ {
			if err := a.want(i); err != nil {
				return 0, err
			}
		}
	}
	return a.file.ReadAt(p, off)
}

// want is wait for a reader: the unit is fetched before others.
func (a *arrival) want(i int) error {
	a.mu.Lock()
	landed := a.err == nil && a.units[i] == unitLanded
	if !landed {
		a.wanted = append(a.wanted, i)
	}
	a.mu.Unlock()
	if landed {
		return nil
	}
	err := a.wait(context.Background(), i)
	a.mu.Lock()
	defer a.mu.Unlock()
	at := slices.Index(a.wanted, i)
	a.wanted = slices.Delete(a.wanted, at, at+1)
	return err
}
