// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"sync"
)

// Pending is a body that is still being made while Publish uploads the other
// artifacts, and what is there of it. Its maker calls Close in any case, after
// Whole if it came so far; each of them once.
type Pending struct {
	whole  chan struct{}
	closed chan struct{}
	news   chan struct{} // capacity 1: the body has grown
	size   int64
	base   *Base
	err    error

	mu       sync.Mutex
	from, to int64
}

// NewPending returns one of which nothing is known.
func NewPending() *Pending {
	return &Pending{whole: make(chan struct{}), closed: make(chan struct{}), news: make(chan struct{}, 1)}
}

// Grown says that the body has come as far as to, and that its bytes from
// there on, from `from`, can be read. They should not change; where they do all
// the same, what was sent of them meanwhile is sent again. It does not wait.
func (p *Pending) Grown(from, to int64) {
	p.mu.Lock()
	p.from, p.to = from, to
	p.mu.Unlock()
	select {
	case p.news <- struct{}{}:
	default:
	}
}

// Whole says that the body can be read and has this size, and which bytes of it
// are in the store already; base may be nil. The upload begins.
func (p *Pending) Whole(size int64, base *Base) {
	p.size, p.base = size, base
	close(p.whole)
}

// Close says that the body is good, so that its object may come into being, or
// that it is not, which ends the upload with err.
func (p *Pending) Close(err error) {
	p.err = err
	close(p.closed)
}

// failed reports whether it was closed with an error.
func (p *Pending) failed() bool {
	select {
	case <-p.closed:
		return p.err != nil
	default:
		return false
	}
}

// reaches waits until the body has come n bytes beyond where it begins to be
// readable, and returns that place. false means that it will not be told.
func (p *Pending) reaches(ctx context.Context, n int64) (from int64, ok bool) {
	for {
		p.mu.Lock()
		from, to := p.from, p.to
		p.mu.Unlock()
		if to-from >= n {
			return from, true
		}
		select {
		case <-p.news:
		case <-p.whole:
			return 0, false
		case <-p.closed:
			return 0, false
		case <-ctx.Done():
			return 0, false
		}
	}
}

// await waits for Whole.
func (p *Pending) await(ctx context.Context) (int64, *Base, error) {
	select {
	case <-p.whole:
		return p.size, p.base, nil
	case <-p.closed:
		return p.size, p.base, p.err
	case <-ctx.Done():
		return 0, nil, context.Cause(ctx)
	}
}

// confirmed waits for Close.
func (p *Pending) confirmed(ctx context.Context) error {
	select {
	case <-p.closed:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
