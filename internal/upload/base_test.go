// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/s3test"
)

// wire sees a store's requests on their way, and counts those for new objects.
type wire struct {
	next http.RoundTripper
	// meet may answer in the store's place.
	meet func(what string, req *http.Request) *http.Response

	mu    sync.Mutex
	sent  int64 // bytes of bodies
	calls map[string]int
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	what := req.Method
	switch q := req.URL.Query(); {
	case req.Header.Get("X-Amz-Copy-Source") != "":
		what = "copy"
	case q.Has("partNumber"):
		what = "part"
	case q.Has("uploadId") && req.Method == http.MethodPost:
		what = "complete"
	}
	if strings.Contains(req.URL.Path, "/new") {
		w.mu.Lock()
		w.calls[what]++
		if what == "part" || what == "PUT" {
			w.sent += req.ContentLength
		}
		w.mu.Unlock()
	}
	if w.meet != nil {
		if resp := w.meet(what, req); resp != nil {
			resp.Request = req
			return resp, nil
		}
	}
	return w.next.RoundTrip(req)
}

// tap puts a wire between a store's client and the network.
func tap(s *S3) *wire {
	dog := s.client.Options().HTTPClient.(*http.Client).Transport.(*watchdog)
	w := &wire{next: dog.next, calls: map[string]int{}}
	dog.next = w
	return w
}

// logged is a log that several goroutines write.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func answer(status int, code string) *http.Response {
	return &http.Response{StatusCode: status, Header: http.Header{}, ProtoMajor: 1, ProtoMinor: 1,
		Body: io.NopCloser(strings.NewReader("<Error><Code>" + code + "</Code></Error>"))}
}

func sumOf(b []byte) string {
	sum := md5.Sum(b)
	return hex.EncodeToString(sum[:])
}

func get(t *testing.T, s *S3, key string) []byte {
	t.Helper()
	r, _, err := s.Get(context.Background(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func replace(t *testing.T, s *S3, content []byte) {
	t.Helper()
	if _, err := s.Put(context.Background(), Object{Key: "old", Body: bytes.NewReader(content), Size: int64(len(content))}); err != nil {
		t.Error(err)
	}
}

// edited is an image that shares all from its 97th byte to the end of old with
// it, and has another beginning and a tail.
func edited(old []byte, tail int) []byte {
	b := append(bytes.Clone(old), noise(tail)...)
	copy(b, bytes.Repeat([]byte("new"), 32))
	return b
}

// What the store has is copied there, in a few ranges; the rest is sent.
func TestBase(t *testing.T) {
	s := newStore(t, nil)
	old := noise(70 << 20)
	if _, err := s.Put(t.Context(), Object{Key: "old/ü/rootfs", Body: bytes.NewReader(old), Size: int64(len(old))}); err != nil {
		t.Fatal(err)
	}
	w := tap(s)
	body := edited(old, 3<<20)
	var acked int64
	var mu sync.Mutex
	info, err := s.Put(t.Context(), Object{Key: "new/rootfs", Body: bytes.NewReader(body), Size: int64(len(body)),
		Progress: func(n int64) { mu.Lock(); acked += n; mu.Unlock() },
		Bases:    []*Base{{Key: "old/ü/rootfs", Size: int64(len(old)), MD5: sumOf(old), Same: []Range{{96, 96, int64(len(old)) - 96}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if w.calls["copy"] != 2 || w.sent != 8<<20 || acked != int64(len(body)) {
		t.Errorf("%v requests, %d bytes sent, %d acknowledged", w.calls, w.sent, acked)
	}
	if !bytes.Equal(get(t, s, "new/rootfs"), body) || info.Metadata["md5sum"] != sumOf(body) {
		t.Errorf("stored %+v", info)
	}
	// The same content altogether: nothing is sent.
	w.sent, w.calls = 0, map[string]int{}
	small := old[:6<<20]
	for _, key := range []string{"old/initrd", "new/initrd"} { // the first has no base yet
		_, err := s.Put(t.Context(), Object{Key: key, Body: bytes.NewReader(small), Size: int64(len(small)),
			Bases: []*Base{{Key: "old/initrd", Size: int64(len(small)), Same: []Range{{0, 0, int64(len(small))}}}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	if w.sent != 0 || w.calls["copy"] != 1 || !bytes.Equal(get(t, s, "new/initrd"), small) {
		t.Errorf("%d bytes sent, %v", w.sent, w.calls)
	}
}

// Whatever becomes of the base, and whatever the store says to copying, the
// object is what it should be.
func TestBaseTrouble(t *testing.T) {
	old := noise(17 << 20)
	body := edited(old, 1<<20)
	other := bytes.Clone(old)
	rand.NewChaCha8([32]byte{2}).Read(other)
	for name, c := range map[string]struct {
		before func(t *testing.T, s *S3) // the upload
		on     string                    // request on which meet acts, the first time
		meet   func(t *testing.T, s *S3) *http.Response
		copies int
		sent   int
		logs   string
	}{
		"none":          {copies: 1, sent: 6 << 20},
		"gone":          {before: func(t *testing.T, s *S3) { s.Delete(t.Context(), "old") }, sent: len(body), logs: "all of the object is sent"},
		"other":         {before: func(t *testing.T, s *S3) { replace(t, s, other) }, sent: len(body), logs: "another object"},
		"refused":       {on: "copy", meet: func(*testing.T, *S3) *http.Response { return answer(403, "AccessDenied") }, copies: 1, sent: len(body), logs: "AccessDenied"},
		"unknown":       {on: "copy", meet: func(*testing.T, *S3) *http.Response { return answer(501, "NotImplemented") }, copies: 1, sent: len(body), logs: "NotImplemented"},
		"broken":        {on: "copy", meet: func(*testing.T, *S3) *http.Response { return answer(200, "InternalError") }, copies: 1, sent: len(body), logs: "instead of copied"},
		"replaced late": {on: "copy", meet: func(t *testing.T, s *S3) *http.Response { replace(t, s, other); return nil }, copies: 1, sent: len(body), logs: "was replaced"},
		"cut late":      {on: "copy", meet: func(t *testing.T, s *S3) *http.Response { replace(t, s, old[:8<<20]); return nil }, copies: 1, sent: len(body), logs: "instead of copied"},
		"removed late":  {on: "copy", meet: func(t *testing.T, s *S3) *http.Response { s.Delete(t.Context(), "old"); return nil }, copies: 1, sent: len(body), logs: "NoSuchKey"},
		// The copy that was given up arrives after the part that was sent for it.
		"arrives late": {on: "complete", meet: func(*testing.T, *S3) *http.Response { return answer(400, "InvalidPart") }, copies: 1, sent: 6 << 20, logs: "other parts"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log logged
			s := newStore(t, func(c *S3Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
			replace(t, s, old)
			if c.before != nil {
				c.before(t, s)
			}
			w := tap(s)
			var once sync.Once
			w.meet = func(what string, req *http.Request) (resp *http.Response) {
				if what == c.on {
					once.Do(func() { resp = c.meet(t, s) })
				}
				return resp
			}
			info, err := s.Put(t.Context(), Object{Key: "new", Body: bytes.NewReader(body), Size: int64(len(body)),
				Bases: []*Base{{Key: "old", Size: int64(len(old)), MD5: sumOf(old), Same: []Range{{96, 96, int64(len(old)) - 96}}}}})
			if err != nil {
				t.Fatal(err)
			}
			if w.calls["copy"] != c.copies || w.sent != int64(c.sent) {
				t.Errorf("%v requests, %d bytes sent, want %d", w.calls, w.sent, c.sent)
			}
			if !bytes.Equal(get(t, s, "new"), body) || info.Metadata["md5sum"] != sumOf(body) {
				t.Errorf("stored %+v", info)
			}
			if c.logs != "" && !strings.Contains(log.String(), c.logs) {
				t.Errorf("log:\n%s", log.String())
			}
			if n := unfinished(t, s); n != 0 {
				t.Errorf("%d unfinished uploads left", n)
			}
		})
	}
}

// A store that is gone in the middle of a copy ends the upload; so does the
// process's end, and then no upload is left behind.
func TestBaseEnds(t *testing.T) {
	old := noise(17 << 20)
	body := edited(old, 1<<20)
	object := Object{Key: "new", Body: bytes.NewReader(body), Size: int64(len(body)),
		Bases: []*Base{{Key: "old", Size: int64(len(old)), MD5: sumOf(old), Same: []Range{{96, 96, int64(len(old)) - 96}}}}}
	t.Run("told", func(t *testing.T) {
		s := newStore(t, nil)
		replace(t, s, old)
		ctx, cancel := context.WithCancelCause(t.Context())
		told := errors.New("told to end")
		tap(s).meet = func(what string, _ *http.Request) *http.Response {
			if what == "copy" {
				cancel(told)
			}
			return nil
		}
		if _, err := s.Put(ctx, object); !errors.Is(err, told) {
			t.Errorf("put: %v", err)
		}
		if n := unfinished(t, s); n != 0 {
			t.Errorf("%d unfinished uploads left", n)
		}
	})
	t.Run("store gone", func(t *testing.T) {
		if _, _, _, _, external := s3test.External(); external {
			t.Skip("the store is not ours")
		}
		srv := s3test.Start(t)
		s, err := NewS3(S3Config{Endpoint: srv.Endpoint, AccessKey: s3test.AccessKey, SecretKey: s3test.SecretKey, Bucket: srv.Bucket,
			PartSize: minPartSize, Budget: 100 * time.Millisecond, RetryPause: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		replace(t, s, old)
		tap(s).meet = func(what string, _ *http.Request) *http.Response {
			if what == "copy" {
				srv.Kill()
			}
			return nil
		}
		if _, err := s.Put(t.Context(), object); err == nil || !strings.Contains(err.Error(), "S3_ENDPOINT") {
			t.Errorf("put: %v", err)
		}
	})
}

// Pieces cover the body once and in order, within S3's limits, and so do the
// parts that are sent when nothing can be copied.
func TestCut(t *testing.T) {
	const mib = 1 << 20
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		size := 1 + r.Int64N(int64(1)<<(20+r.IntN(22)))
		part, err := partSizeFor(size+size/5, int64(5+r.IntN(12))*mib)
		if err != nil {
			t.Fatal(err)
		}
		bases := []*Base{{}, {ahead: true}}
		atLeast := int64(0)
		if r.IntN(4) > 0 {
			for to, i := int64(r.IntN(2))*96, 0; to < size && i < 2000; i++ {
				base := bases[r.IntN(2)]
				n := min(1+r.Int64N(1+size/int64(1+r.IntN(3000))), size-to)
				base.Same = append(base.Same, Range{From: r.Int64N(1 << 40), To: to, N: n})
				if n-minPartSize >= worthCopying(size) {
					atLeast += n - minPartSize
				}
				to += n + r.Int64N(2)*r.Int64N(1+size/100)
			}
		}
		pieces := cut(size, part, bases)
		var copied int64
		var sent []piece
		for _, p := range pieces {
			if p.base != nil {
				copied += p.n
				if !slices.ContainsFunc(p.base.Same, func(r Range) bool {
					return p.off >= r.To && p.off+p.n <= r.To+r.N && p.off-r.To == p.from-r.From
				}) {
					t.Fatalf("%+v is not of a range the base has", p)
				}
			}
			sent = append(sent, split(p, part)...)
		}
		for _, list := range [][]piece{pieces, sent} {
			var off int64
			number := int32(0)
			for i, p := range list {
				if p.off != off || p.number <= number || p.number > maxParts || p.n <= 0 || p.n > maxPartSize || p.n < minPartSize && i < len(list)-1 {
					t.Fatalf("size %d, parts of %d: %+v after %d bytes in %d parts", size, part, p, off, number)
				}
				off, number = off+p.n, p.number
			}
			if off != size {
				t.Fatalf("size %d: %d bytes in pieces", size, off)
			}
		}
		if copied < atLeast {
			t.Fatalf("size %d: %d bytes copied, want at least %d", size, copied, atLeast)
		}
	}
}

// What moved within the object is copied from where it lay.
func TestBaseMoved(t *testing.T) {
	s := newStore(t, nil)
	old := noise(40 << 20)
	replace(t, s, old)
	w := tap(s)
	const mib = 1 << 20
	body := slices.Concat(noise(6*mib), old[3*mib+1:12*mib], old[20*mib:20*mib+99], noise(100), old[21*mib:40*mib], noise(7))
	same := []Range{{3*mib + 1, 6 * mib, 9*mib - 1}, {20 * mib, 15*mib - 1, 99}, {21 * mib, 15*mib + 198, 19 * mib}}
	_, err := s.Put(t.Context(), Object{Key: "new", Body: bytes.NewReader(body), Size: int64(len(body)), Bases: []*Base{{Key: "old", Size: int64(len(old)), MD5: sumOf(old), Same: same}}})
	if err != nil {
		t.Fatal(err)
	}
	if w.calls["copy"] != 2 || w.sent != 11*mib+7 {
		t.Errorf("%v requests, %d bytes sent", w.calls, w.sent)
	}
	if !bytes.Equal(get(t, s, "new"), body) {
		t.Error("the object has other content")
	}
}

// The small artifacts do not wait for the image, and the image's object does not
// come into being before it is found good.
func TestPublishPending(t *testing.T) {
	s := newStore(t, nil)
	body := noise(12 << 20)
	start := func(ctx context.Context) (*Pending, chan error) {
		p, done := NewPending(), make(chan error, 1)
		r := request(nil)
		r.Artifacts[2] = Artifact{Kind: Rootfs, Body: bytes.NewReader(body), Pending: p}
		go func() {
			_, err := Publish(ctx, s, r)
			done <- err
		}()
		return p, done
	}
	appears := func(key string) {
		for {
			if _, err := s.Head(t.Context(), key); err == nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	bad := errors.New("the image is not good")
	p, done := start(t.Context())
	appears(imageID + "/boot_parameters")
	p.Whole(int64(len(body)), nil)
	p.Close(nil)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(get(t, s, imageID+"/rootfs"), body) {
		t.Error("the image arrived otherwise")
	}
	if err := Remove(t.Context(), s, imageID); err != nil {
		t.Fatal(err)
	}
	for name, fail := range map[string]func(*Pending, context.CancelCauseFunc){
		"not made": func(p *Pending, _ context.CancelCauseFunc) { p.Close(bad) },
		"not good": func(p *Pending, _ context.CancelCauseFunc) {
			p.Whole(int64(len(body)), nil)
			for unfinished(t, s) == 0 {
				time.Sleep(time.Millisecond)
			}
			p.Close(bad)
		},
		"told": func(_ *Pending, cancel context.CancelCauseFunc) { cancel(bad) },
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		p, done := start(ctx)
		fail(p, cancel)
		if err := <-done; !errors.Is(err, bad) {
			t.Errorf("%s: %v", name, err)
		}
		wantEmpty(t, s)
	}
}
