// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"cmp"
	"context"
	"crypto/md5"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"
)

// Copies of ranges: few and large, because stores really copy, and each request
// has its own cost there.
const (
	copyEach     = 32 << 20 // what one of several requests for a range copies at least
	copyRequests = 4        // as long as none copies more than copyMost
	copyAhead    = 32       // of two parts or more where what is copied can as well be sent
	copyMost     = 4 << 30  // S3 allows 5 GiB
	mostRanges   = 512      // so that the parts' numbers suffice
)

// worthCopying is the shortest range of an object that is copied.
func worthCopying(size int64) int64 { return max(minPartSize, size/mostRanges) }

// piece is a range of the body that becomes a part. One that is copied can be
// longer than a part; its number stands for as many as it would be if sent.
type piece struct {
	number int32
	off, n int64
	base   *Base // it is copied from there; nil: it is sent
	from   int64 // where it lies in the base
}

// cut makes pieces of a body, of about a part where they are sent. What is sent
// before a range must be as long as a part must be, and takes what that lacks
// from the range.
func cut(size, part int64, bases []*Base) []piece {
	var list []piece
	var off int64
	number := int32(1)
	for _, r := range ranges(bases) {
		to := max(r.To, off)
		if to != off {
			to = max(to, off+minPartSize)
		}
		n := r.To + r.N - to
		if n < worthCopying(size) {
			continue
		}
		if to > off {
			sent := split(piece{number: number, off: off, n: to - off}, part)
			list, off, number = append(list, sent...), to, number+int32(len(sent))
		}
		requests := min(n/copyEach, copyRequests)
		if r.base.ahead {
			requests = min(n/(2*part), copyAhead)
		}
		requests = max(requests, (n+copyMost-1)/copyMost, 1)
		span := ((n+requests-1)/requests + part - 1) / part * part
		for n > 0 {
			step := min(span, n)
			if n-step < part {
				step = n
			}
			list = append(list, piece{number, off, step, r.base, off - r.To + r.From})
			off, n, number = off+step, n-step, number+int32((step+part-1)/part)
		}
	}
	for ; off < size; number++ {
		n := min(part, size-off)
		list = append(list, piece{number: number, off: off, n: n})
		off += n
	}
	return list
}

// rangeOf is a range of one of several bases.
type rangeOf struct {
	Range
	base *Base
}

// ranges lists those of all bases by their place in the new object. Neighbours
// that are neighbours in their base, too, are one.
func ranges(bases []*Base) (list []rangeOf) {
	for _, b := range bases {
		for _, r := range b.Same {
			if i := len(list) - 1; i >= 0 && list[i].base == b && list[i].To+list[i].N == r.To && list[i].From+list[i].N == r.From {
				list[i].N += r.N
				continue
			}
			list = append(list, rangeOf{r, b})
		}
	}
	slices.SortStableFunc(list, func(a, b rangeOf) int { return cmp.Compare(a.To, b.To) })
	return list
}

// transfer is one multipart upload.
type transfer struct {
	s        *S3
	o        Object
	id       string
	part     int64
	requests context.Context // ends a while after the upload has failed
	slots    chan struct{}   // for parts that are sent
	copying  chan struct{}   // for those that are copied

	mu    sync.Mutex
	parts map[int32]sentPart
}

type sentPart struct {
	piece
	etag string // as the store gave it
}

// partGrace is how long parts on their way may take to arrive after the upload
// has failed or was cancelled. A part that arrives after the abort stays in
// some stores for ever, where no listing shows it.
const partGrace = 3 * time.Second

// run uploads the pieces, a few at a time. When it returns, no request is under
// way.
func (t *transfer) run(ctx context.Context, pieces []piece) error {
	g, gctx := errgroup.WithContext(ctx)
	defer t.outlive(gctx, ctx)()
	send := func(p piece) (ok bool) {
		if acquire(gctx, t.slots) != nil {
			return false
		}
		g.Go(func() error {
			defer release(t.slots)
			return t.send(gctx, p)
		})
		return true
	}
	var either, sent []piece
	for _, p := range pieces {
		switch {
		case p.base == nil:
			sent = append(sent, p)
		case p.base.ahead:
			either = append(either, p)
		default:
			g.Go(func() error { return t.copy(gctx, p) })
		}
	}
	left := newSpare(either)
	for range copyRequests {
		p, ok := left.take(false) // before anybody who sends does
		g.Go(func() error {
			for ; ok; p, ok = left.take(false) {
				if err := t.copy(gctx, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for _, p := range sent {
		if !send(p) {
			break
		}
	}
	for p, ok := left.take(true); ok; p, ok = left.take(true) {
		for _, p := range split(p, t.part) {
			if !send(p) {
				break
			}
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx) // set when the loop ended before any part noticed
}

// outlive sets the context of requests: it ends partGrace after ctx has, and
// with a call of what is returned. values is what it inherits from.
func (t *transfer) outlive(ctx, values context.Context) (end func()) {
	requests, cancel := context.WithCancelCause(context.WithoutCancel(values))
	t.requests = requests
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(partGrace, func() { cancel(context.Cause(ctx)) })
	})
	return func() {
		stop()
		cancel(nil)
	}
}

func acquire(ctx context.Context, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func release(slots chan struct{}) { <-slots }

func (t *transfer) note(p piece, etag string) {
	t.mu.Lock()
	t.parts[p.number] = sentPart{p, etag}
	t.mu.Unlock()
	t.o.Progress(p.n)
}

// send uploads one part. ctx ends the attempts, t.requests the one under way.
func (t *transfer) send(ctx context.Context, p piece) error {
	s, o := t.s, t.o
	h := md5.New()
	if _, err := io.Copy(h, io.NewSectionReader(o.Body, p.off, p.n)); err != nil {
		return fmt.Errorf("read part %d of %s: %w", p.number, s.URL(o.Key), err)
	}
	sum := base64.StdEncoding.EncodeToString(h.Sum(nil))
	var etag string
	err := s.retry(ctx, fmt.Sprintf("upload part %d of %s", p.number, s.URL(o.Key)), func(context.Context) error {
		began := time.Now()
		out, err := s.client.UploadPart(t.requests, &s3.UploadPartInput{
			Bucket: &s.bucket, Key: &o.Key, UploadId: &t.id, PartNumber: &p.number,
			ContentMD5: &sum, ContentLength: &p.n, Body: bodyOf(o, p.off, p.n),
		})
		if err != nil {
			return err
		}
		s.speed.note(p.n, began)
		etag = aws.ToString(out.ETag)
		return nil
	})
	if err == nil {
		t.note(p, etag)
	}
	return err
}

// split makes a copied piece pieces that are sent, none of them too short to have
// another behind it.
func split(p piece, part int64) (list []piece) {
	for ; p.n >= part+minPartSize; p.number, p.off, p.n = p.number+1, p.off+part, p.n-part {
		list = append(list, piece{number: p.number, off: p.off, n: part})
	}
	return append(list, piece{number: p.number, off: p.off, n: p.n})
}

// copy has the store copy a piece from the base's object. Whether that still
// holds the same bytes, and whether the store takes a precondition seriously,
// nobody knows; the part's ETag, the MD5 of its bytes, is the proof. A piece
// that cannot be copied is sent.
func (t *transfer) copy(ctx context.Context, p piece) error {
	if err := acquire(ctx, t.copying); err != nil {
		return err
	}
	defer release(t.copying)
	etag, err := t.tryCopy(ctx, p)
	if err == nil {
		t.note(p, etag)
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	t.s.log.Warn("a range is sent instead of copied in the store", "object", t.s.URL(t.o.Key), "from", t.s.URL(p.base.Key),
		"at", p.off, "bytes", p.n, "why", err)
	for _, p := range split(p, t.part) {
		if err := acquire(ctx, t.slots); err != nil {
			return err
		}
		err := t.send(ctx, p)
		release(t.slots)
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *transfer) tryCopy(ctx context.Context, p piece) (etag string, err error) {
	g, _ := errgroup.WithContext(ctx)
	var sum string
	g.Go(func() (err error) {
		sum, err = md5Of(ctx, io.NewSectionReader(t.o.Body, p.off, p.n), p.n)
		return err
	})
	// One attempt: what is sent instead is tried for longer.
	etag, err = t.s.copyRange(t.requests, t.s.bucket+"/"+escapeKey(p.base.Key), t.o.Key, t.id, p)
	if err != nil {
		err = t.s.explain("copy part "+fmt.Sprint(p.number), err)
	}
	if err := errors.Join(err, g.Wait()); err != nil {
		return "", err
	}
	if unquote(etag) != sum {
		return "", fmt.Errorf("the copy has the MD5 %s, the image has %s there: the object was replaced, or the store has other ETags", unquote(etag), sum)
	}
	return etag, nil
}

// copyRange makes a part of a range of another object.
func (s *S3) copyRange(ctx context.Context, source, key, id string, p piece) (etag string, err error) {
	span := fmt.Sprintf("bytes=%d-%d", p.from, p.from+p.n-1)
	out, err := s.client.UploadPartCopy(withPatience(ctx, completePatience), &s3.UploadPartCopyInput{
		Bucket: &s.bucket, Key: &key, UploadId: &id, PartNumber: &p.number, CopySource: &source, CopySourceRange: &span,
	})
	if err != nil {
		return "", err
	}
	if out.CopyPartResult == nil {
		return "", errors.New("the store sent no CopyPartResult")
	}
	return aws.ToString(out.CopyPartResult.ETag), nil
}

// complete assembles the parts, after sending again those that the store has
// otherwise than it said.
func (t *transfer) complete(ctx context.Context) error {
	err := t.s.complete(ctx, t.o, t.id, t.completed())
	var se *Error
	if !errors.As(err, &se) || se.Code != "InvalidPart" {
		return err
	}
	// A part's late first try may have replaced the acknowledged one.
	stored, err := t.s.storedParts(ctx, t.o.Key, t.id)
	if err != nil {
		return err
	}
	t.s.log.Warn("the store has other parts than it acknowledged; sending those again", "object", t.s.URL(t.o.Key))
	var again []piece
	for number, part := range t.parts {
		if stored[number] != unquote(part.etag) {
			again = append(again, split(part.piece, t.part)...)
		}
	}
	if err := t.run(ctx, again); err != nil {
		return err
	}
	return t.s.complete(ctx, t.o, t.id, t.completed())
}

// completed lists the parts in their order.
func (t *transfer) completed() []types.CompletedPart {
	var list []types.CompletedPart
	for _, p := range t.inOrder() {
		list = append(list, types.CompletedPart{PartNumber: &p.number, ETag: &p.etag})
	}
	return list
}

func (t *transfer) inOrder() (list []sentPart) {
	for _, number := range slices.Sorted(maps.Keys(t.parts)) {
		list = append(list, t.parts[number])
	}
	return list
}
