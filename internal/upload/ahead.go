// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"errors"
	"io"
	"math"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Sending ahead pays where the network is much slower than the making: elsewhere
// the second object costs the store, and both sides' processors, more than is won.
const (
	aheadLeast = 4        // parts of a body that must be there: few are sent as fast afterwards
	aheadBelow = 16 << 20 // bytes per second of one request
	aheadKnown = 1 << 20  // the shortest body that tells how fast requests are
)

// speed is how fast bodies were sent, one request each.
type speed struct {
	mu    sync.Mutex
	bytes int64
	time  time.Duration
}

func (s *speed) note(bytes int64, since time.Time) {
	if bytes < aheadKnown {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bytes, s.time = s.bytes+bytes, s.time+time.Since(since)
}

// slow reports whether they were slower than aheadBelow, once any were sent.
func (s *speed) slow() (slow, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return float64(s.bytes) < aheadBelow*s.time.Seconds(), s.bytes > 0
}

// SendAhead sends the parts of a body as they are made, to an object of their
// own under key, until p is whole or closed. Whether that pays it learns from
// what else is sent meanwhile. It returns that object as a base to copy from,
// which the caller deletes, or nil: then nothing is left of it, and everything is
// to be sent.
func (s *S3) SendAhead(ctx context.Context, key string, body io.ReaderAt, p *Pending) *Base {
	var from int64
	for parts, known := int64(aheadLeast), false; !known; parts++ {
		var ok, slow bool
		if from, ok = p.reaches(ctx, parts*s.partSize); !ok {
			return nil
		}
		if slow, known = s.speed.slow(); known && !slow {
			return nil
		}
	}
	began := time.Now()
	t := &transfer{s: s, part: s.partSize, parts: map[int32]sentPart{}, slots: make(chan struct{}, s.parallel),
		o: Object{Key: key, Body: io.NewSectionReader(body, from, math.MaxInt64-from), Progress: func(int64) {}}}
	if err := t.sendAhead(ctx, p); err != nil {
		if ctx.Err() == nil && !p.failed() {
			s.log.Info("all of the object is sent when it is whole", "object", s.URL(key), "why", err)
		}
		return nil
	}
	base := &Base{Key: key, ahead: true}
	for _, done := range t.inOrder() {
		base.Same = append(base.Same, Range{From: base.Size, To: from + done.off, N: done.n})
		base.Size += done.n
	}
	s.log.Info("sent before it is whole", "object", s.URL(key), "bytes", base.Size, "ms", time.Since(began).Milliseconds())
	return base
}

// discard deletes the object, should the store have completed it without our
// learning so.
func (t *transfer) discard(ctx context.Context) {
	ctx, cancel := afterwards(ctx)
	defer cancel()
	if err := t.s.Delete(ctx, t.o.Key); err != nil {
		t.s.log.Warn("an object that may exist could not be deleted", "object", t.s.URL(t.o.Key), "error", err)
	}
}

// sendAhead makes one multipart upload of what it can send before p is whole.
func (t *transfer) sendAhead(ctx context.Context, p *Pending) (err error) {
	if t.id, err = t.s.begin(ctx, t.o.Key, nil); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			t.s.abort(ctx, t.o.Key, t.id)
			t.discard(ctx)
		}
	}()
	if err := t.follow(ctx, p); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if p.failed() {
		return p.err
	}
	if len(t.parts) == 0 {
		return errors.New("no part of it arrived in time")
	}
	for _, done := range t.parts {
		t.o.Size += done.n
	}
	return t.s.complete(ctx, t.o, t.id, t.completed())
}

// follow sends each part once the body has come so far. When p is whole the
// parts under way may arrive, but those that failed are not tried again.
func (t *transfer) follow(ctx context.Context, p *Pending) error {
	g, gctx := errgroup.WithContext(ctx)
	defer t.outlive(gctx, ctx)()
	attempts, enough := context.WithCancel(gctx)
	defer enough()
	go func() {
		defer enough()
		select {
		case <-p.whole:
		case <-p.closed:
		case <-attempts.Done():
		}
	}()
	for i := range int64(maxParts) {
		if _, ok := p.reaches(attempts, (i+1)*t.part); !ok || acquire(attempts, t.slots) != nil {
			break
		}
		g.Go(func() error {
			defer release(t.slots)
			err := t.send(attempts, piece{number: int32(i + 1), off: i * t.part, n: t.part})
			if attempts.Err() != nil {
				return nil // whether it arrived or not
			}
			return err
		})
	}
	return g.Wait()
}

// spare are pieces that the store has and could as well be sent. Whoever copies
// takes them from the front, and whoever has nothing else to send from the back,
// so that the faster of the two ways does more.
type spare struct {
	pieces chan []piece // capacity 1: those that nobody took
}

func newSpare(pieces []piece) spare {
	s := spare{make(chan []piece, 1)}
	s.pieces <- pieces
	return s
}

func (s spare) take(last bool) (p piece, ok bool) {
	left := <-s.pieces
	defer func() { s.pieces <- left }()
	switch {
	case len(left) == 0:
		return piece{}, false
	case last:
		p, left = left[len(left)-1], left[:len(left)-1]
	default:
		p, left = left[0], left[1:]
	}
	return p, true
}
