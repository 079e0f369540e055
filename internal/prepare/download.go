// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/ims-buildenv/ims-buildenv/internal/progress"
	"golang.org/x/sys/unix"
)

// Limits of a download. Together with the time budget they bound it, whatever
// the server does, without bounding how long a large image may take.
const (
	// stallAfter without a byte means that the connection is dead, though TCP
	// may not know for hours.
	stallAfter = 60 * time.Second
	// worthwhile is what one attempt must bring to count as progress.
	worthwhile = 1 << 20
	// maxRestarts from the first byte: an object that is replaced this often is
	// not an image.
	maxRestarts = 5
	copyBuffer  = 1 << 20
)

// tuning lets tests be quick.
type tuning struct {
	stall time.Duration
	pause time.Duration // before the first retry

	rangesFrom int64 // objects of this size are fetched in ranges; 0: the default
	rangeSize  int64
}

// download writes one object to a file, over as many requests as it takes.
type download struct {
	src    *source
	file   *os.File
	budget time.Duration // without progress
	log    *slog.Logger
	room   func() int64 // free bytes for it
	tune   tuning

	etag   string // of the object being received; empty: cannot be resumed
	size   int64  // -1: not known
	offset int64  // bytes received, hashed and written
	hash   hash.Hash
	bar    *progress.P
	single bool // ranges were tried and brought nothing

	have     *arrival       // while it is received in ranges
	arriving func(*arrival) // is told of the first of these
}

func newDownload(src *source, file *os.File, budget time.Duration, log *slog.Logger, tune tuning) *download {
	if tune.stall == 0 {
		tune.stall = stallAfter
	}
	if tune.pause == 0 {
		tune.pause = backoff.DefaultInitialInterval
	}
	if tune.rangesFrom == 0 {
		tune.rangesFrom, tune.rangeSize = rangesFrom, rangeSize
	}
	return &download{src: src, file: file, budget: budget, log: log, tune: tune, size: -1, hash: md5.New(), bar: progress.NewLog(log, "fetch image", 0)}
}

// md5 returns the sum of what was received, in lower-case hex.
func (d *download) md5() string { return hex.EncodeToString(d.hash.Sum(nil)) }

// errRestart says that what was received so far belongs to another object.
var errRestart = errors.New("the object changed or cannot be resumed")

// run receives the whole object. It tries again after errors that can pass,
// from where it was, until the budget goes by without progress.
func (d *download) run(ctx context.Context) error {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval = d.tune.pause
	pause.Reset()
	progressed, restarts := time.Now(), 0
	for {
		before := d.offset
		err := d.attempt(ctx)
		if err == nil {
			d.bar.Finish()
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var permanent *backoff.PermanentError
		if errors.As(err, &permanent) {
			return permanent.Err
		}
		if errors.Is(err, errRestart) {
			if restarts++; restarts > maxRestarts {
				return fmt.Errorf("given up after starting over %d times: %w: somebody keeps replacing the object in S3", maxRestarts, err)
			}
			if err := d.reset(); err != nil {
				return err
			}
		} else if d.offset-before >= worthwhile {
			progressed = time.Now()
			pause.Reset()
		}
		wait := pause.NextBackOff()
		if time.Since(progressed)+wait > d.budget {
			return fmt.Errorf("given up after %v without progress, with %d bytes received: %w", d.budget, d.offset, err)
		}
		d.log.Warn("the download was interrupted; trying again", "image", d.src.String(), "err", err, "received", d.offset, "of", d.size, "in", wait.Round(time.Millisecond).String())
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// reset forgets what was received.
func (d *download) reset() error {
	d.forget(errRestart)
	d.etag, d.size, d.offset = "", -1, 0
	d.hash.Reset()
	if err := d.file.Truncate(0); err != nil {
		return err
	}
	_, err := d.file.Seek(0, io.SeekStart)
	return err
}

// attempt makes one request and receives what it brings.
func (d *download) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(d.tune.stall, func() {
		cancel(fmt.Errorf("no byte came for %v", d.tune.stall))
	})
	defer watchdog.Stop()
	err := d.receive(ctx, func() { watchdog.Reset(d.tune.stall) })
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx) // says more than "context canceled"
	}
	return err
}

func (d *download) receive(ctx context.Context, alive func()) error {
	if d.offset > 0 && d.etag == "" {
		return errRestart
	}
	if d.have != nil && d.offset == d.size {
		return nil // the last attempt failed with something that was no longer missing
	}
	resp, err := d.src.get(ctx, d.offset, d.etag)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	alive()
	if err := d.accept(resp); err != nil {
		return err
	}
	if d.fitForRanges(resp) {
		return d.receiveRanges(ctx, resp, alive)
	}
	d.forget(errAppended)
	buf := make([]byte, copyBuffer)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			alive()
			if werr := d.take(buf[:n]); werr != nil {
				return backoff.Permanent(werr)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return d.src.redact(err)
		}
	}
	if d.size >= 0 && d.offset != d.size {
		return fmt.Errorf("the server sent %d of %d bytes: %w", d.offset, d.size, io.ErrUnexpectedEOF)
	}
	d.size = d.offset
	return nil
}

// take appends b to the file and the sum.
func (d *download) take(b []byte) error {
	if d.size >= 0 && int64(len(b)) > d.size-d.offset {
		return fmt.Errorf("the server sends more than the %d bytes it announced", d.size)
	}
	n, err := d.file.Write(b)
	d.hash.Write(b[:n])
	d.offset += int64(n)
	if err == nil {
		d.bar.Update(d.offset, d.size)
	}
	return explain(err, d.offset)
}

// explain says what to do about a volume that is full.
func explain(err error, received int64) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("%w after %d bytes: raise build_env_size of the job", err, received)
	}
	return err
}

// checkRoom refuses an object that the volume cannot hold.
func (d *download) checkRoom() error {
	if d.size < 0 {
		return nil
	}
	if free := d.room(); d.size-d.offset > free {
		return backoff.Permanent(fmt.Errorf("the image has %d bytes, the volume has %d free, %d are missing: raise build_env_size of the job", d.size, free, d.size-d.offset-free))
	}
	return nil
}
