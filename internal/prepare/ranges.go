// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"
)

const (
	rangesFrom = 64 << 20 // less comes as fast over one connection
	rangeSize  = 16 << 20
	streams    = 4
	window     = 2 * streams // ranges that may wait for an earlier one
)

// span is a range on its way.
type span struct {
	off, n int64
	landed chan struct{} // closed when it is in the file
}

// fitForRanges reports whether what resp begins may be fetched over several
// connections: only with a strong ETag can their bytes be joined.
func (d *download) fitForRanges(resp *http.Response) bool {
	return !d.single && d.etag != "" && d.size-d.offset >= d.tune.rangesFrom && resp.Header.Get("Accept-Ranges") == "bytes"
}

// receiveRanges receives what is missing over several connections; first brings
// the first range. The sum is made in order, of what has landed. After an error
// d.offset is the end of what is summed, and later ranges, of which there are
// few, count as not received.
func (d *download) receiveRanges(ctx context.Context, first *http.Response, alive func()) error {
	before := d.offset
	spans := make(chan *span, window)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(streams + 2) // with the two below
	defer context.AfterFunc(gctx, func() { first.Body.Close() })()
	from, size := d.offset, d.size
	g.Go(func() error {
		defer close(spans)
		for off := from; off < size; off += d.tune.rangeSize {
			s := &span{off, min(d.tune.rangeSize, size-off), make(chan struct{})}
			select {
			case spans <- s:
			case <-gctx.Done():
				return nil
			}
			g.Go(func() error {
				if s.off == from {
					return d.land(s, first, alive)
				}
				resp, err := d.src.request(gctx, fmt.Sprintf("bytes=%d-%d", s.off, s.off+s.n-1), d.etag)
				if err != nil {
					return err
				}
				alive()
				if err := d.acceptRange(resp, s.off, s.n); err != nil {
					resp.Body.Close()
					return err
				}
				return d.land(s, resp, alive)
			})
		}
		return nil
	})
	g.Go(func() error { return d.sum(gctx, spans) })
	err := g.Wait()
	if err != nil && d.offset-before < worthwhile {
		d.single = true
	}
	if _, serr := d.file.Seek(d.offset, io.SeekStart); serr != nil {
		return backoff.Permanent(serr)
	}
	return err
}

// land writes a range to its place.
func (d *download) land(s *span, resp *http.Response, alive func()) error {
	defer resp.Body.Close()
	buf := make([]byte, copyBuffer)
	for done := int64(0); done < s.n; {
		n, err := resp.Body.Read(buf[:min(int64(len(buf)), s.n-done)])
		if n > 0 {
			alive()
			if _, werr := d.file.WriteAt(buf[:n], s.off+done); werr != nil {
				return backoff.Permanent(explain(werr, s.off+done))
			}
			done += int64(n)
		}
		if err == io.EOF && done < s.n {
			err = fmt.Errorf("the server sent %d of %d bytes: %w", s.off+done, d.size, io.ErrUnexpectedEOF)
		}
		if err != nil && done < s.n {
			return d.src.redact(err)
		}
	}
	close(s.landed)
	return nil
}

// sum reads the ranges in order, as they land.
func (d *download) sum(ctx context.Context, spans <-chan *span) error {
	buf := make([]byte, copyBuffer)
	for s := range spans {
		select {
		case <-s.landed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		for end := s.off + s.n; d.offset < end; {
			b := buf[:min(int64(len(buf)), end-d.offset)]
			if _, err := d.file.ReadAt(b, d.offset); err != nil {
				return backoff.Permanent(err)
			}
			d.hash.Write(b)
			d.offset += int64(len(b))
		}
		d.bar.Update(d.offset, d.size)
	}
	return nil
}
