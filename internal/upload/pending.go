// SPDX-License-Identifier: Apache-2.0

package upload

import "context"

// Pending is a body that is still being made while Publish uploads the other
// artifacts. Its maker calls Close in any case, after Whole if it came so far;
// each of them once.
type Pending struct {
	whole  chan struct{}
	closed chan struct{}
	size   int64
	base   *Base
	err    error
}

// NewPending returns one of which nothing is known.
func NewPending() *Pending {
	return &Pending{whole: make(chan struct{}), closed: make(chan struct{})}
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
