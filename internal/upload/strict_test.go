// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
)

func unfinished(t *testing.T, s *S3) int {
	t.Helper()
	out, err := s.client.ListMultipartUploads(context.Background(), &s3.ListMultipartUploadsInput{Bucket: &s.bucket})
	if err != nil {
		t.Fatal(err)
	}
	return len(out.Uploads)
}

// fake is a store with one upload in flight that checks what every request
// carries and misbehaves on demand. It keeps one object.
type fake struct {
	t *testing.T

	mu       sync.Mutex
	log      []string
	parts    map[string][]byte
	meta     http.Header
	object   []byte
	done     bool
	trouble  func(what string, n int, w http.ResponseWriter) (handled bool)
	counters map[string]int
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	f.mu.Lock()
	defer f.mu.Unlock()
	for name := range r.Header {
		if n := strings.ToLower(name); strings.Contains(n, "checksum") || n == "x-amz-trailer" || n == "x-amz-decoded-content-length" {
			f.t.Errorf("%s %s carries %s", r.Method, r.URL, name)
		}
	}
	if len(r.TransferEncoding) > 0 || len(r.Trailer) > 0 || strings.Contains(r.Header.Get("Content-Encoding"), "chunked") ||
		strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING") {
		f.t.Errorf("%s %s is a chunked or trailer upload", r.Method, r.URL)
	}
	q := r.URL.Query()
	what := r.Method
	switch {
	case q.Has("uploads") && r.Method == http.MethodPost:
		what = "begin"
	case q.Has("uploadId") && r.Method == http.MethodPost:
		what = "complete"
	case q.Has("uploadId") && r.Method == http.MethodPut:
		what = "part"
	case q.Has("uploadId") && r.Method == http.MethodDelete:
		what = "abort"
	case q.Has("uploadId") && r.Method == http.MethodGet:
		what = "parts"
	}
	f.log = append(f.log, what)
	f.counters[what]++
	if (what == "part" || what == "PUT") && len(body) > 0 {
		sum := md5.Sum(body)
		if r.Header.Get("Content-MD5") != base64.StdEncoding.EncodeToString(sum[:]) {
			f.t.Errorf("%s without a correct Content-MD5", what)
		}
		if !strings.Contains(r.Header.Get("Authorization"), "content-md5") {
			f.t.Errorf("%s: Content-MD5 is not signed", what)
		}
	}
	if f.trouble != nil && f.trouble(what, f.counters[what], w) {
		return
	}
	switch what {
	case "begin":
		f.meta = r.Header.Clone()
		fmt.Fprint(w, `<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>`)
	case "part":
		f.parts[q.Get("partNumber")] = body
		w.Header().Set("ETag", etagOf(body))
	case "parts":
		fmt.Fprint(w, `<ListPartsResult>`)
		for n, b := range f.parts {
			fmt.Fprintf(w, `<Part><PartNumber>%s</PartNumber><ETag>%s</ETag></Part>`, n, etagOf(b))
		}
		fmt.Fprint(w, `</ListPartsResult>`)
	case "complete":
		f.assemble()
		fmt.Fprint(w, `<CompleteMultipartUploadResult/>`) // RGW sends no ETag
	case "abort":
		w.WriteHeader(http.StatusNoContent)
	case "PUT":
		f.meta, f.object, f.done = r.Header.Clone(), body, true
	case "HEAD":
		if !f.done {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		for k, v := range f.meta {
			if strings.HasPrefix(k, "X-Amz-Meta-") {
				w.Header()[k] = v
			}
		}
		w.Header().Set("ETag", `"abc-2"`)
		w.Header().Set("Content-Length", fmt.Sprint(len(f.object)))
	default:
		f.t.Errorf("unexpected %s %s", r.Method, r.URL)
	}
}

func (f *fake) assemble() {
	f.object = nil
	for i := 1; i <= len(f.parts); i++ {
		f.object = append(f.object, f.parts[fmt.Sprint(i)]...)
	}
	f.done = true
}

func etagOf(b []byte) string {
	sum := md5.Sum(b)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

func sayError(w http.ResponseWriter, status int, code string) bool {
	w.WriteHeader(status)
	fmt.Fprintf(w, `<Error><Code>%s</Code></Error>`, code)
	return true
}

func newFake(t *testing.T) (*fake, *S3) {
	f := &fake{t: t, parts: map[string][]byte{}, counters: map[string]int{}}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	cfg := S3Config{Endpoint: srv.URL, AccessKey: "a", SecretKey: "s", Bucket: "b", PartSize: minPartSize,
		Budget: 5 * time.Second, RetryPause: time.Millisecond}
	s, err := NewS3(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f, s
}

// Old Ceph answers 400 to the SDK's default checksum trailers.
func TestNoTrailers(t *testing.T) {
	for _, size := range []int{0, 5, 2*minPartSize + 1} {
		f, s := newFake(t)
		body := noise(size)
		if _, err := s.Put(t.Context(), Object{Key: "k", Body: bytes.NewReader(body), Size: int64(size), Metadata: map[string]string{"x": "y"}}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f.object, body) {
			t.Errorf("size %d: the store got %d other bytes", size, len(f.object))
		}
	}
}

// A store's trouble at each step, and whether the upload survives it.
func TestTrouble(t *testing.T) {
	first := func(step string, do func(f *fake, w http.ResponseWriter) bool) func(*fake) {
		return func(f *fake) {
			f.trouble = func(what string, n int, w http.ResponseWriter) bool {
				return what == step && n == 1 && do(f, w)
			}
		}
	}
	for name, c := range map[string]struct {
		arrange func(*fake)
		want    string // in the error; "" for success
		calls   map[string]int
	}{
		"part refused once": {first("part", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 503, "SlowDown") }), "", map[string]int{"part": 4, "complete": 1, "abort": 0}},
		"part damaged once": {first("part", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 400, "BadDigest") }), "", map[string]int{"part": 4}},
		"part always damaged": {func(f *fake) {
			f.trouble = func(what string, n int, w http.ResponseWriter) bool {
				return what == "part" && sayError(w, 400, "BadDigest")
			}
		}, "BadDigest", map[string]int{"abort": 1, "complete": 0}},
		"part connection lost": {first("part", func(f *fake, w http.ResponseWriter) bool { panic(http.ErrAbortHandler) }), "", map[string]int{"part": 4}},
		"complete says 500 but worked": {first("complete", func(f *fake, w http.ResponseWriter) bool {
			f.assemble()
			return sayError(w, 500, "InternalError")
		}), "", map[string]int{"complete": 1, "abort": 0}},
		"complete says NoSuchUpload but worked": {first("complete", func(f *fake, w http.ResponseWriter) bool {
			f.assemble()
			return sayError(w, 404, "NoSuchUpload")
		}), "", map[string]int{"complete": 1, "abort": 0}},
		"complete says 500 and did nothing":    {first("complete", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 500, "InternalError") }), "", map[string]int{"complete": 2, "abort": 0}},
		"complete answer is an error in a 200": {first("complete", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 200, "InternalError") }), "", map[string]int{"complete": 2}},
		"complete lost": {first("complete", func(f *fake, w http.ResponseWriter) bool {
			f.assemble()
			panic(http.ErrAbortHandler)
		}), "", map[string]int{"complete": 1}},
		"complete misses a part": {first("complete", func(f *fake, w http.ResponseWriter) bool {
			f.parts["2"] = []byte("a late first try")
			return sayError(w, 400, "InvalidPart")
		}), "", map[string]int{"part": 4, "complete": 2, "parts": 1, "abort": 0}},
		"upload vanished": {first("complete", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 404, "NoSuchUpload") }), "NoSuchUpload", map[string]int{"complete": 1, "abort": 1}},
		"clock skew":      {first("begin", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 403, "RequestTimeTooSkewed") }), "clock", map[string]int{"begin": 1, "part": 0}},
		"access denied":   {first("part", func(f *fake, w http.ResponseWriter) bool { return sayError(w, 403, "AccessDenied") }), "S3_ACCESS_KEY", map[string]int{"abort": 1, "complete": 0}},
		"other size on HEAD": {first("HEAD", func(f *fake, w http.ResponseWriter) bool {
			w.Header().Set("Content-Length", "3")
			return true
		}), "verify the upload", map[string]int{"complete": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			f, s := newFake(t)
			c.arrange(f)
			body := noise(2*minPartSize + 1)
			_, err := s.Put(t.Context(), Object{Key: "k", Body: bytes.NewReader(body), Size: int64(len(body))})
			f.mu.Lock()
			defer f.mu.Unlock()
			if c.want == "" {
				if err != nil {
					t.Fatalf("%v (requests %v)", err, f.log)
				}
				if !bytes.Equal(f.object, body) {
					t.Errorf("the store holds %d other bytes", len(f.object))
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want one with %q", err, c.want)
			}
			for what, n := range c.calls {
				if f.counters[what] != n {
					t.Errorf("%d × %s, want %d (requests %v)", f.counters[what], what, n, f.log)
				}
			}
		})
	}
}

// A request that moves no byte is cut and repeated; it would hang otherwise.
func TestStall(t *testing.T) {
	f := &fake{t: t, parts: map[string][]byte{}, counters: map[string]int{}}
	var first sync.Once
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hang := false
		first.Do(func() { hang = true })
		if hang {
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		f.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	var log strings.Builder
	s, err := NewS3(S3Config{Endpoint: srv.URL, AccessKey: "a", SecretKey: "s", Bucket: "b", StallTimeout: 50 * time.Millisecond,
		Budget: 10 * time.Second, RetryPause: time.Millisecond, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), Object{Key: "k", Body: strings.NewReader("x"), Size: 1}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "no progress") {
		t.Errorf("log does not tell of the stall:\n%s", log.String())
	}
}

func TestTLS(t *testing.T) {
	f := &fake{t: t, parts: map[string][]byte{}, counters: map[string]int{}}
	srv := httptest.NewTLSServer(f)
	defer srv.Close()
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	var log strings.Builder
	cfg := S3Config{Endpoint: srv.URL, AccessKey: "a", SecretKey: "s", Bucket: "b", Verify: true, Budget: time.Minute,
		Log: slog.New(slog.NewTextHandler(&log, nil))}
	put := func() error {
		s, err := NewS3(cfg)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Put(t.Context(), Object{Key: "k", Body: strings.NewReader("x"), Size: 1})
		return err
	}
	if err := put(); err == nil || !strings.Contains(err.Error(), "S3_SSL_VALIDATE") {
		t.Errorf("unknown authority: %v", err)
	}
	if log.Len() != 0 {
		t.Errorf("unexpected log %s", log.String())
	}
	cfg.Verify = false
	if err := put(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "NOT verified") {
		t.Errorf("no warning about unverified TLS: %s", log.String())
	}
}

func TestPartSize(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for _, c := range []struct{ size, want int64 }{
		{1, 16 * mib}, {156 * gib, 16 * mib}, {157 * gib, 17 * mib}, {5 << 40, 525 * mib}, {maxParts * maxPartSize, maxPartSize},
	} {
		got, err := partSizeFor(c.size, 16*mib)
		if err != nil || got != c.want || (c.size+got-1)/got > maxParts {
			t.Errorf("%d bytes: parts of %d, %v; want %d", c.size, got, err, c.want)
		}
	}
	if _, err := partSizeFor(maxParts*maxPartSize+1, 16*mib); err == nil {
		t.Error("accepted more than an object can hold")
	}
}

func TestMetadata(t *testing.T) {
	for _, plain := range []string{"lab_image", "a b", "a/b", ""} {
		if got := encodeWord(plain); got != plain {
			t.Errorf("%q became %q", plain, got)
		}
	}
	long := strings.Repeat("ü", 5000)
	for _, name := range []string{"a/b ü", " lead", "two  spaces", "line\nbreak", "=?UTF-8?Q?no?=", "bad\xff", long} {
		enc := encodeWord(name)
		for _, r := range enc {
			if r < ' ' || r > '~' {
				t.Errorf("%q holds %q", enc, r)
			}
		}
		got, err := encodeMetadata(ImageMetadata(imageID, name, jobID), strings.Repeat("0", 32))
		if err != nil {
			t.Errorf("%.20q: %v (%d)", name, err, len(got))
		}
	}
	if _, err := encodeMetadata(map[string]string{"x": strings.Repeat("x", maxMetadata)}, ""); err == nil {
		t.Error("accepted more than 2 kB")
	}
}
