// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// growing is a body in the making.
type growing struct {
	mu   sync.Mutex
	body []byte
}

func (g *growing) ReadAt(p []byte, off int64) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.NewReader(g.body).ReadAt(p, off)
}

func (g *growing) write(b []byte, off int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := off + len(b) - len(g.body); n > 0 {
		g.body = append(g.body, make([]byte, n)...)
	}
	copy(g.body[off:], b)
}

// requests counts those that a store has answered by what they do and to which object, and what they send.
type requests struct {
	mu   sync.Mutex
	n    map[string]int
	sent map[string]int64
}

func (r *requests) note(what string, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := what + " " + req.URL.Path[strings.LastIndexByte(req.URL.Path, '/')+1:]
	r.n[key]++
	if what == "part" {
		r.sent[key] += req.ContentLength
	}
}

func (r *requests) of(key string) (n int, sent int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n[key], r.sent[key]
}

// The rootfs is sent while it is made, and the store puts it together; what of it is sent again is what copying
// does not come to. Whatever fails of that, the object is right, and nothing else is left.
func TestSendAhead(t *testing.T) {
	const mib = 1 << 20
	slow := func(http.RoundTripper, *http.Request) *http.Response { time.Sleep(200 * time.Millisecond); return nil }
	refuse := func(http.RoundTripper, *http.Request) *http.Response { return answer(501, "NotImplemented") }
	unheard := func(next http.RoundTripper, req *http.Request) *http.Response {
		if resp, err := next.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
		return answer(400, "InvalidRequest")
	}
	for name, tt := range map[string]struct {
		on, path string
		meet     func(next http.RoundTripper, req *http.Request) *http.Response
		change   bool // what was sent ahead is not what it becomes
		fast     bool // the network
		// Of `parts` and 7 MiB, all but 2 MiB are there before the rest.
		parts       int
		copies      int
		least, most int // MiB sent afterwards
		log         string
	}{
		"copied":               {on: "part", path: "rootfs", meet: slow, parts: 10, copies: 4, most: 17},
		"sent as well":         {on: "copy", path: "rootfs", meet: slow, parts: 10, copies: 4, least: 17, most: 17},
		"a part is refused":    {on: "part", path: "rootfs.ahead", meet: refuse, parts: 4, least: 27, most: 27, log: "sent when it is whole"},
		"changed since":        {on: "part", path: "rootfs", meet: slow, change: true, parts: 4, copies: 1, least: 17, most: 27, log: "sent instead of copied"},
		"not deleted":          {on: "DELETE", path: "rootfs.ahead", meet: refuse, parts: 4, most: 27, log: "delete it by hand"},
		"put together unheard": {on: "complete", path: "rootfs.ahead", meet: unheard, parts: 4, most: 27},
		"fast enough":          {parts: 4, fast: true, least: 27, most: 27},
	} {
		t.Run(name, func(t *testing.T) {
			var log logged
			s := newStore(t, func(c *S3Config) { c.PartSize = minPartSize; c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
			seen := &requests{n: map[string]int{}, sent: map[string]int64{}}
			w := tap(s)
			w.meet = func(what string, req *http.Request) *http.Response {
				defer seen.note(what, req)
				if what == tt.on && strings.HasSuffix(req.URL.Path, "/"+tt.path) {
					if resp := tt.meet(w.next, req); resp != nil {
						return resp
					}
				}
				resp, err := w.next.RoundTrip(req)
				if err != nil {
					t.Error(err)
				}
				return resp
			}
			body := noise((5*tt.parts+7)*mib + 5)
			g, p := &growing{}, NewPending()
			boot := bytes.NewReader(noise(100))
			if s.speed.note(aheadKnown, time.Now().Add(-time.Minute)); tt.fast {
				s.speed.note(1<<50, time.Now())
			}
			done := make(chan error, 1)
			var res Result
			go func() {
				var err error
				res, err = Publish(t.Context(), s, Request{Prefix: imageID, Log: s.log, Artifacts: []Artifact{
					{Kind: Rootfs, Body: g, Pending: p}, {Kind: Kernel, Body: boot, Size: boot.Size()}}})
				done <- err
			}()
			const from = 5 * mib
			for n := from + mib; n <= len(body)-2*mib; n += mib {
				g.write(body[from:n], from)
				p.Grown(from, int64(n))
			}
			if !tt.fast {
				eventually(t, "parts are sent", func() bool {
					n, _ := seen.of("part rootfs.ahead")
					return n >= tt.parts || n > 0 && tt.path == "rootfs.ahead" && tt.on == "part"
				})
			}
			if n, _ := seen.of("POST rootfs"); n > 0 {
				t.Error("the object itself is begun before it is whole")
			}
			if tt.change {
				copy(body[10*mib:], noise(100))
			}
			g.write(body, 0)
			p.Whole(int64(len(body)), nil)
			p.Close(nil)
			if err := <-done; err != nil {
				t.Fatalf("%v\n%s", err, log.String())
			}
			if !bytes.Equal(get(t, s, imageID+"/rootfs"), body) || res.Artifacts[0].MD5 != sumOf(body) {
				t.Error("the object has other content")
			}
			copies, _ := seen.of("copy rootfs")
			_, sent := seen.of("part rootfs")
			if copies < tt.copies || sent < int64(tt.least)*mib || sent > int64(tt.most)*mib+5 || !strings.Contains(log.String(), tt.log) {
				t.Errorf("%d copies, %d bytes sent\n%s", copies, sent, log.String())
			}
			left, err := s.List(t.Context(), imageID+"/")
			if want := 3 + map[bool]int{true: 1}[tt.on == "DELETE"]; err != nil || len(left) != want {
				t.Errorf("left: %v, %v", left, err)
			}
			if n := unfinished(t, s); n != 0 {
				t.Errorf("%d unfinished uploads", n)
			}
		})
	}
}

// Whatever ends the making, nothing is left of what was sent, and nothing is under way.
func TestSendAheadEnds(t *testing.T) {
	const mib = 1 << 20
	broken := errors.New("the disk is gone")
	for name, end := range map[string]func(p *Pending, cancel context.CancelCauseFunc){
		"not made":  func(p *Pending, _ context.CancelCauseFunc) { p.Close(broken) },
		"not good":  func(p *Pending, _ context.CancelCauseFunc) { p.Whole(30*mib, nil); p.Close(broken) },
		"cancelled": func(_ *Pending, cancel context.CancelCauseFunc) { cancel(broken) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, func(c *S3Config) { c.PartSize = minPartSize })
			ctx, cancel := context.WithCancelCause(t.Context())
			s.speed.note(aheadKnown, time.Now().Add(-time.Minute))
			p := NewPending()
			body := bytes.NewReader(noise(30 * mib))
			done := make(chan error, 1)
			go func() {
				_, err := Publish(ctx, s, Request{Prefix: imageID, Artifacts: []Artifact{{Kind: Rootfs, Body: io.NewSectionReader(body, 0, 30*mib), Pending: p}}})
				done <- err
			}()
			p.Grown(0, 29*mib)
			eventually(t, "an upload is begun", func() bool { return unfinished(t, s) == 1 })
			end(p, cancel)
			if err := <-done; !errors.Is(err, broken) {
				t.Errorf("%v, want %v", err, broken)
			}
			left, err := s.List(t.Context(), "")
			if err != nil || len(left) > 0 || unfinished(t, s) > 0 {
				t.Errorf("left: %v, %d uploads, %v", left, unfinished(t, s), err)
			}
		})
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
