// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// signature stands for what must never be seen.
const signature = "BtXbV0xSECRET"

// content makes n bytes that differ from seed to seed.
func content(n int, seed string) []byte {
	var key [32]byte
	copy(key[:], seed)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

func sum(b []byte) string {
	s := md5.Sum(b)
	return hex.EncodeToString(s[:])
}

// act is how the server treats one request. It gets the object as an S3
// server would serve it, ranges and conditions included.
type act func(w http.ResponseWriter, r *http.Request, object []byte)

func serve(etag string) act {
	return func(w http.ResponseWriter, r *http.Request, object []byte) {
		w.Header().Set("ETag", etag)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(object))
	}
}

// cut serves the object but breaks the connection after n bytes of the body.
func cut(n int, serveIt act) act {
	return func(w http.ResponseWriter, r *http.Request, object []byte) {
		serveIt(&cutter{w, n}, r, object)
		panic(http.ErrAbortHandler)
	}
}

type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.left -= n
	if n == 0 {
		return 0, errors.New("cut")
	}
	_, err := c.ResponseWriter.Write(p[:n])
	if f, ok := c.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
	return n, err
}

// stall sends n bytes and then nothing until the client is gone.
func stall(n int) act {
	return func(w http.ResponseWriter, r *http.Request, object []byte) {
		w.Header().Set("ETag", `"one"`)
		w.Header().Set("Content-Length", fmt.Sprint(len(object)))
		_, _ = w.Write(object[:n])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
}

func answer(code int, body string) act {
	return func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

// s3 is a server that treats its requests one act after the other, the last
// act for ever.
type s3 struct {
	*httptest.Server
	mu     sync.Mutex
	object []byte
	acts   []act
	seen   []*http.Request
}

func newS3(t *testing.T, object []byte, acts ...act) *s3 {
	t.Helper()
	s := &s3{object: object, acts: acts}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		do, object := s.acts[0], s.object
		if len(s.acts) > 1 {
			s.acts = s.acts[1:]
		}
		s.seen = append(s.seen, r)
		s.mu.Unlock()
		do(w, r, object)
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func (s *s3) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen
}

// link is a presigned URL of either signature version.
func (s *s3) link() string {
	return s.URL + "/boot-images/980f7c6f/root%20fs?AWSAccessKeyId=imsaccess&Signature=" + signature + "%2Bm633I52jj3yg%3D&Expires=1795828119"
}

// quick retries soon, and calls nothing a stall, on however slow a machine.
var quick = tuning{stall: patient, pause: time.Millisecond}

// nervous is for servers that do stall.
var nervous = tuning{stall: 100 * time.Millisecond, pause: time.Millisecond}

// fetched is the outcome of one download.
type fetched struct {
	data []byte
	sum  string
	log  string
	err  error
}

func fetch(t *testing.T, ctx context.Context, link, ca string, budget time.Duration, room int64, tune tuning) fetched {
	t.Helper()
	var log bytes.Buffer
	src, err := newSource(link, ca)
	if err != nil {
		return fetched{err: err}
	}
	defer src.client.CloseIdleConnections()
	f, err := os.Create(filepath.Join(t.TempDir(), "object"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := newDownload(src, f, budget, slog.New(slog.NewTextHandler(&log, nil)), tune)
	d.room = func() int64 { return room }
	err = d.run(ctx)
	data, rerr := os.ReadFile(f.Name())
	if rerr != nil {
		t.Fatal(rerr)
	}
	got := fetched{data, d.md5(), log.String(), err}
	if text := fmt.Sprint(err, got.log); strings.Contains(text, signature) || strings.Contains(text, "Expires") {
		t.Errorf("the presigned URL was shown: %s", text)
	}
	return got
}

const (
	patient = time.Minute
	plenty  = int64(1) << 40
)

// TestDownloadSurvives has everything a download must get over. Each case
// ends with the whole object and its right sum.
func TestDownloadSurvives(t *testing.T) {
	object := content(3<<20+17, "object")
	other := content(2<<20+5, "other")
	whole := serve(`"one"`)
	for name, c := range map[string]struct {
		acts  []act
		check func(t *testing.T, s *s3)
	}{
		"nothing":        {[]act{whole}, nil},
		"no ETag at all": {[]act{serve("")}, nil},
		"chunked, length not known": {[]act{func(w http.ResponseWriter, _ *http.Request, object []byte) {
			w.(http.Flusher).Flush()
			_, _ = w.Write(object)
		}}, nil},
		"connections that break": {[]act{cut(1<<20, whole), cut(100, whole), cut(0, whole), whole}, func(t *testing.T, s *s3) {
			last := s.requests()[len(s.requests())-1]
			if last.Header.Get("If-Match") != `"one"` || !strings.HasPrefix(last.Header.Get("Range"), "bytes=10") {
				t.Errorf("not resumed: Range %q, If-Match %q", last.Header.Get("Range"), last.Header.Get("If-Match"))
			}
			for _, r := range s.requests() {
				if !strings.Contains(r.URL.RawQuery, signature+"%2Bm633I52jj3yg%3D") || r.URL.EscapedPath() != "/boot-images/980f7c6f/root%20fs" {
					t.Errorf("the URL was changed: %s", r.URL)
				}
			}
		}},
		"a break without an ETag":  {[]act{cut(1<<20, serve("")), whole}, neverResumed},
		"a break with a weak ETag": {[]act{cut(1<<20, serve(`W/"one"`)), whole}, neverResumed},
		"a server that ignores Range": {[]act{cut(1<<20, whole), func(w http.ResponseWriter, r *http.Request, object []byte) {
			r.Header.Del("Range")
			whole(w, r, object)
		}}, nil},
		"a wrong range": {[]act{cut(1<<20, whole), func(w http.ResponseWriter, r *http.Request, object []byte) {
			r.Header.Set("Range", "bytes=5-")
			whole(w, r, object)
		}, whole}, nil},
		"500, 502, 503, 429":              {[]act{answer(500, ""), answer(502, ""), answer(503, "<Code>SlowDown</Code>"), answer(429, ""), whole}, nil},
		"a server that stalls":            {[]act{stall(1 << 20), whole}, nil},
		"a server that says nothing":      {[]act{func(_ http.ResponseWriter, r *http.Request, _ []byte) { <-r.Context().Done() }, whole}, nil},
		"the object is replaced":          {[]act{cut(1<<20, serveOther(other, `"old"`)), whole}, nil},
		"replaced, 416":                   {[]act{cut(1<<20, whole), answer(416, ""), whole}, nil},
		"replaced, same ETag, other size": {[]act{cut(1<<20, serveOther(other, `"one"`)), whole, whole}, nil},
		"a range that breaks":             {[]act{whole, cut(1000, whole), whole}, nil},
		"a range that stalls":             {[]act{whole, stallRange, whole}, nil},
		"no second connection":            {[]act{whole, answer(503, ""), answer(503, ""), answer(503, ""), answer(503, ""), whole}, nil},
		"everything instead of range":     {[]act{whole, serveAll, whole}, nil},
		"replaced meanwhile":              {[]act{whole, serveOther(other, `"old"`), whole}, nil},
		"a range of another object":       {[]act{whole, serveOther(other, `"one"`), whole}, nil},
		"no ranges":                       {[]act{serveAll}, nil},
	} {
		for _, ranges := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, ranges %v", name, ranges), func(t *testing.T) {
				s := newS3(t, object, c.acts...)
				tune := tuningFor(name)
				if ranges {
					tune.rangesFrom, tune.rangeSize = 1<<20, 200_000
				}
				got := fetch(t, t.Context(), s.link(), "", patient, plenty, tune)
				if got.err != nil {
					t.Fatal(got.err)
				}
				if !bytes.Equal(got.data, object) || got.sum != sum(object) {
					t.Errorf("received %d bytes with sum %s, want %d with %s", len(got.data), got.sum, len(object), sum(object))
				}
				if c.check != nil && !ranges {
					c.check(t, s)
				}
				if name == "nothing" && ranges != (len(s.requests()) == 16) {
					t.Errorf("%d requests", len(s.requests()))
				}
			})
		}
	}
}

// stallRange sends a part of a range and then nothing.
func stallRange(w http.ResponseWriter, r *http.Request, object []byte) {
	cut := &cutter{w, 1000}
	serve(`"one"`)(cut, r, object)
	<-r.Context().Done()
}

// serveAll knows no ranges.
func serveAll(w http.ResponseWriter, _ *http.Request, object []byte) {
	w.Header().Set("ETag", `"one"`)
	_, _ = w.Write(object)
}

// neverResumed: bytes of an object that cannot be told from another one must
// not be joined.
func neverResumed(t *testing.T, s *s3) {
	for _, r := range s.requests() {
		if r.Header.Get("Range") != "" {
			t.Errorf("resumed without a validator: %q", r.Header.Get("Range"))
		}
	}
}

func tuningFor(name string) tuning {
	if strings.Contains(name, "stall") || strings.Contains(name, "says nothing") {
		return nervous
	}
	return quick
}

func serveOther(object []byte, etag string) act {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) { serve(etag)(w, r, object) }
}

// TestDownloadGivesUp has what no patience cures, with the words a user needs.
func TestDownloadGivesUp(t *testing.T) {
	object := content(1<<20, "object")
	whole := serve(`"one"`)
	flip := 0
	const secretBody = "<Error><Code>SignatureDoesNotMatch</Code><StringToSign>" + signature + "</StringToSign></Error>"
	for name, c := range map[string]struct {
		act      act
		budget   time.Duration
		room     int64
		want     []string
		requests int // exactly; 0: do not count
	}{
		"expired":       {answer(403, "<Error><Code>AccessDenied</Code></Error>"), patient, plenty, []string{"403", "AccessDenied", "expired or was refused", "new job"}, 1},
		"wrong key":     {answer(403, secretBody), patient, plenty, []string{"SignatureDoesNotMatch"}, 1},
		"gone":          {answer(404, "<Code>NoSuchKey</Code>"), patient, plenty, []string{"NoSuchKey", "not in S3"}, 1},
		"bad request":   {answer(400, ""), patient, plenty, []string{"400"}, 1},
		"always 500":    {answer(500, ""), 50 * time.Millisecond, plenty, []string{"given up", "500"}, 0},
		"always cut":    {cut(10, whole), 50 * time.Millisecond, plenty, []string{"given up", "unexpected EOF"}, 0},
		"always stalls": {stall(10), 500 * time.Millisecond, plenty, []string{"given up", "no byte came"}, 0},
		"no space":      {whole, patient, 1<<20 - 5, []string{"1048576 bytes", "5 are missing", "build_env_size"}, 1},
		"always replaced": {func(w http.ResponseWriter, r *http.Request, object []byte) {
			flip++
			do := serve(fmt.Sprintf(`"%d"`, flip))
			if r.Header.Get("If-Match") == "" {
				do = cut(1000, do)
			}
			do(w, r, object)
		}, patient, plenty, []string{"starting over"}, 0},
		"range not asked for": {func(w http.ResponseWriter, r *http.Request, object []byte) {
			r.Header.Set("Range", "bytes=5-")
			whole(w, r, object)
		}, patient, plenty, []string{"not asked for"}, 1},
		"redirects for ever": {func(w http.ResponseWriter, r *http.Request, _ []byte) {
			http.Redirect(w, r, r.URL.String(), http.StatusFound)
		}, patient, plenty, []string{"redirects"}, 10},
	} {
		t.Run(name, func(t *testing.T) {
			s := newS3(t, object, c.act)
			got := fetch(t, t.Context(), s.link(), "", c.budget, c.room, tuningFor(name))
			if got.err == nil {
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(got.err.Error(), want) {
					t.Errorf("%q is not in: %v", want, got.err)
				}
			}
			if n := len(s.requests()); c.requests != 0 && n != c.requests {
				t.Errorf("%d requests, want %d", n, c.requests)
			}
		})
	}
}

func TestDownloadEndsWithItsContext(t *testing.T) {
	reason := errors.New("pod is being stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	s := newS3(t, content(1<<20, "x"), func(_ http.ResponseWriter, r *http.Request, _ []byte) {
		cancel(reason)
		<-r.Context().Done()
	})
	if got := fetch(t, ctx, s.link(), "", patient, plenty, quick); !errors.Is(got.err, reason) {
		t.Errorf("%v, want the context's cause", got.err)
	}
}

func TestURLs(t *testing.T) {
	for _, bad := range []string{"", "/mnt/image.sqsh", "ftp://s3/x?Signature=" + signature, "http://%zz/?Signature=" + signature, "http:///x?Signature=" + signature, "http://a b/" + signature} {
		if _, err := newSource(bad, ""); err == nil || strings.Contains(err.Error(), signature) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	src, err := newSource("http://user:"+signature+"@s3:8080/b/a%2Fb?X-Amz-Signature="+signature+"#"+signature, "")
	if err != nil || src.String() != "http://s3:8080/b/a%2Fb" {
		t.Errorf("%s %v", src, err)
	}
}

// TestHTTPS: the site's CA is trusted when CA_CERT names it, and only then;
// HTTPS never becomes HTTP.
func TestHTTPS(t *testing.T) {
	object := content(1000, "object")
	plain := newS3(t, object, serve(`"one"`))
	var redirect string
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if redirect != "" {
			http.Redirect(w, r, redirect, http.StatusTemporaryRedirect)
			return
		}
		serve(`"one"`)(w, r, object)
	}))
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	link := secure.URL + "/x?Signature=" + signature
	if got := fetch(t, t.Context(), link, ca, patient, plenty, quick); got.err != nil || !bytes.Equal(got.data, object) {
		t.Errorf("with the CA: %v", got.err)
	}
	if got := fetch(t, t.Context(), link, "", patient, plenty, quick); got.err == nil || !strings.Contains(got.err.Error(), "CA_CERT") {
		t.Errorf("without the CA: %v", got.err)
	}
	if got := fetch(t, t.Context(), link, "/nonexistent/ca.crt", patient, plenty, quick); got.err == nil || !strings.Contains(got.err.Error(), "CA_CERT") {
		t.Errorf("with a missing CA file: %v", got.err)
	}
	redirect = plain.link()
	if got := fetch(t, t.Context(), link, ca, patient, plenty, quick); got.err == nil || !strings.Contains(got.err.Error(), "HTTPS to HTTP") {
		t.Errorf("redirect: %v", got.err)
	}
}
