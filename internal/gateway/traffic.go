// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"io"
	"sync/atomic"
	"time"
)

// traffic counts what a session moves, as seen from the server.
type traffic struct {
	in, out atomic.Int64 // bytes
	last    atomic.Int64 // when, in Unix nanoseconds
}

func (t *traffic) touch() { t.last.Store(time.Now().UnixNano()) }

// reader counts what is read from r as received.
func (t *traffic) reader(r io.Reader) io.Reader { return countedReader{r, t} }

// writer counts what is written to w as sent.
func (t *traffic) writer(w io.Writer) io.Writer { return countedWriter{w, t} }

type countedReader struct {
	io.Reader
	t *traffic
}

func (c countedReader) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.t.in.Add(int64(n))
	c.t.touch()
	return n, err
}

type countedWriter struct {
	io.Writer
	t *traffic
}

func (c countedWriter) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.t.out.Add(int64(n))
	c.t.touch()
	return n, err
}
