// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	rangesFrom = 64 << 20 // less comes as fast over one connection
	rangeSize  = 16 << 20
	streams    = 4
)

// errAppended says that the file is written from front to back, over what had landed.
var errAppended = errors.New("the server does not serve ranges")

// fitForRanges reports whether what resp begins may be fetched over several
// connections: only with a strong ETag can their bytes be joined.
func (d *download) fitForRanges(resp *http.Response) bool {
	return !d.single && d.etag != "" && (d.have != nil || d.size-d.offset >= d.tune.rangesFrom) && resp.Header.Get("Accept-Ranges") == "bytes"
}

// receiveRanges receives what is missing over several connections; first brings
// what begins at d.offset. The sum is made in order, of what has landed. After an
// error d.offset is the end of what is summed.
func (d *download) receiveRanges(ctx context.Context, first *http.Response, alive func()) error {
	before := d.offset
	if d.have == nil {
		if err := d.reserve(); err != nil {
			return backoff.Permanent(err)
		}
		d.have = newArrival(d.file, d.offset, d.size, d.tune.rangeSize)
		if d.arriving != nil {
			d.arriving(d.have)
			d.arriving = nil
		}
	}
	i := int(d.offset / d.have.unit)
	d.have.take(i)
	g, gctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(gctx, func() { first.Body.Close() })()
	g.Go(func() error {
		if err := d.land(i, first, alive); err != nil {
			return err
		}
		return d.fetchUnits(gctx, alive)
	})
	for range streams - 1 {
		g.Go(func() error { return d.fetchUnits(gctx, alive) })
	}
	g.Go(func() error { return d.sum(gctx) })
	err := g.Wait()
	if err == nil {
		return nil
	}
	d.have.release()
	_ = d.sum(gctx) // which has ended: it waits for nothing that has not landed
	if d.offset-before < worthwhile {
		d.single = true
	}
	if _, serr := d.file.Seek(d.offset, io.SeekStart); serr != nil {
		return backoff.Permanent(serr)
	}
	return err
}

// reserve takes the room of the whole object, of which the unpacking that begins before its end is to leave it its own.
func (d *download) reserve() error {
	err := unix.Fallocate(int(d.file.Fd()), 0, 0, d.size)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINTR) {
		return nil
	}
	return explain(err, d.offset)
}

func (d *download) fetchUnits(ctx context.Context, alive func()) error {
	for {
		i, ok := d.have.next()
		if !ok {
			return nil
		}
		from, to := d.have.span(i)
		resp, err := d.src.request(ctx, fmt.Sprintf("bytes=%d-%d", from, to-1), d.etag)
		if err != nil {
			return err
		}
		alive()
		if err := d.acceptRange(resp, from, to-from); err != nil {
			resp.Body.Close()
			return err
		}
		if err := d.land(i, resp, alive); err != nil {
			return err
		}
	}
}

// land writes a unit to its place.
func (d *download) land(i int, resp *http.Response, alive func()) error {
	defer resp.Body.Close()
	buf := make([]byte, copyBuffer)
	for off, to := d.have.span(i); off < to; {
		n, err := resp.Body.Read(buf[:min(int64(len(buf)), to-off)])
		if n > 0 {
			alive()
			if _, werr := d.file.WriteAt(buf[:n], off); werr != nil {
				return backoff.Permanent(explain(werr, off))
			}
			off += int64(n)
		}
		if err == io.EOF && off < to {
			err = fmt.Errorf("the server sent %d of %d bytes: %w", off, d.size, io.ErrUnexpectedEOF)
		}
		if err != nil && off < to {
			return d.src.redact(err)
		}
	}
	d.have.land(i)
	return nil
}

// sum reads the units in order, as they land.
func (d *download) sum(ctx context.Context) error {
	buf := make([]byte, copyBuffer)
	for d.offset < d.size {
		i := int(d.offset / d.have.unit)
		if err := d.have.wait(ctx, i); err != nil {
			return err
		}
		for _, to := d.have.span(i); d.offset < to; {
			b := buf[:min(int64(len(buf)), to-d.offset)]
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

// forget ends the reading of what has landed: it is received again.
func (d *download) forget(why error) {
	if d.have != nil {
		d.have.fail(why)
		d.have = nil
	}
}
