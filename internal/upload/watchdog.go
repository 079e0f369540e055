// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"io"
	"net/http"
	"time"
)

// stalledError is a request cut because nothing moved. It names itself
// retryable in the way the SDK asks.
type stalledError struct{}

func (stalledError) Error() string        { return "the transfer made no progress and was cut" }
func (stalledError) RetryableError() bool { return true }

var errStalled error = stalledError{}

type patienceKey struct{}

// withPatience lets a request whose answer takes the store real work be silent
// for longer than the ordinary limit.
func withPatience(ctx context.Context, d time.Duration) context.Context {
	return context.WithValue(ctx, patienceKey{}, d)
}

// watchdog cancels a request that moves no byte, in either direction, for a
// while. A total timeout would have to guess the size and the bandwidth.
type watchdog struct {
	next  http.RoundTripper
	after time.Duration
}

// RoundTrip sends the request under the watchdog; the body of the answer stays
// under it until it is closed.
func (w *watchdog) RoundTrip(req *http.Request) (*http.Response, error) {
	after := w.after
	if d, ok := req.Context().Value(patienceKey{}).(time.Duration); ok && d > after {
		after = d
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(after, func() { cancel(errStalled) })
	alive := func() { timer.Reset(after) }
	req = req.WithContext(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &watched{ReadCloser: req.Body, alive: alive, ctx: ctx}
	}
	resp, err := w.next.RoundTrip(req)
	if err != nil {
		timer.Stop()
		if context.Cause(ctx) == errStalled {
			err = errStalled
		}
		cancel(nil)
		return nil, err
	}
	alive()
	resp.Body = &watched{ReadCloser: resp.Body, alive: alive, ctx: ctx, closed: func() {
		timer.Stop()
		cancel(nil)
	}}
	return resp, nil
}

// watched is a body that tells the watchdog about every read.
type watched struct {
	io.ReadCloser
	alive  func()
	closed func() // nil for request bodies
	ctx    context.Context
}

func (b *watched) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.alive()
	}
	if err != nil && err != io.EOF && context.Cause(b.ctx) == errStalled {
		err = errStalled
	}
	return n, err
}

func (b *watched) Close() error {
	err := b.ReadCloser.Close()
	if b.closed != nil {
		b.closed()
	}
	return err
}
