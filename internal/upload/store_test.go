// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"mime"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/s3test"
)

func TestMain(m *testing.M) {
	s3test.ChildMain()
	os.Exit(m.Run())
}

// newStore is the store under test: versitygw, or what S3TEST_EXTERNAL names,
// so that the same promises are checked on Ceph.
func newStore(t *testing.T, change func(*S3Config)) *S3 {
	t.Helper()
	endpoint, access, secret, bucket, external := s3test.External()
	if !external {
		srv := s3test.Start(t)
		endpoint, access, secret, bucket = srv.Endpoint, s3test.AccessKey, s3test.SecretKey, srv.Bucket
	}
	cfg := S3Config{
		Endpoint: endpoint, AccessKey: access, SecretKey: secret, Bucket: bucket,
		Verify: true, PartSize: minPartSize, Budget: 2 * time.Second, RetryPause: 10 * time.Millisecond,
	}
	if external {
		s, err := NewS3(cfg)
		if err == nil {
			err = s.MakeBucket(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(&cfg)
	}
	s, err := NewS3(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if all, err := s.List(context.Background(), ""); err == nil && external {
			for _, o := range all {
				s.Delete(context.Background(), o.Key)
			}
		}
	})
	return s
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestStoreRoundTrip(t *testing.T) {
	s := newStore(t, nil)
	ctx := t.Context()
	for _, size := range []int{0, 1, minPartSize - 1, minPartSize, minPartSize + 1, 3*minPartSize + 17} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			body := noise(size)
			key := fmt.Sprintf("dir/%d", size)
			acked := make(chan int64, 16)
			info, err := s.Put(ctx, Object{Key: key, Body: bytes.NewReader(body), Size: int64(size),
				Metadata: map[string]string{"x-shasta-ims-image-name": "a/b ü  "}, Progress: func(n int64) { acked <- n }})
			if err != nil {
				t.Fatal(err)
			}
			close(acked)
			var total int64
			for n := range acked {
				total += n
			}
			sum := md5.Sum(body)
			if want := hex.EncodeToString(sum[:]); info.Metadata["md5sum"] != want || info.Size != int64(size) || total != int64(size) {
				t.Errorf("HEAD %+v, acknowledged %d; want md5sum %s, size %d", info, total, want, size)
			}
			if strings.Contains(info.ETag, `"`) || info.ETag == "" {
				t.Errorf("ETag %q", info.ETag)
			}
			name, err := new(mime.WordDecoder).DecodeHeader(info.Metadata["x-shasta-ims-image-name"])
			if err != nil || name != "a/b ü  " {
				t.Errorf("image name came back as %q (%v)", name, err)
			}
			if info.ContentType != contentType {
				t.Errorf("content type %q", info.ContentType)
			}
			r, _, err := s.Get(ctx, key)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("GET gave %d bytes, %v", len(got), err)
			}
		})
	}
	all, err := s.List(ctx, "dir/")
	if err != nil || len(all) != 6 {
		t.Fatalf("list: %d objects, %v", len(all), err)
	}
	if err := s.Copy(ctx, "dir/1", "deleted/ü 1"); err != nil {
		t.Fatal(err)
	}
	info, err := s.Head(ctx, "deleted/ü 1")
	if err != nil || info.Size != 1 || info.Metadata["md5sum"] == "" {
		t.Errorf("copy: %+v, %v", info, err)
	}
	large, err := s.Head(ctx, fmt.Sprintf("dir/%d", 3*minPartSize+17))
	if err != nil {
		t.Fatal(err)
	}
	// As if it were too large for one CopyObject.
	if err := s.copyParts(ctx, s.bucket+"/"+escapeKey(large.Key), "deleted/large", large); err != nil {
		t.Fatal(err)
	}
	if info, err := s.Head(ctx, "deleted/large"); err != nil || info.Size != large.Size || info.Metadata["md5sum"] != large.Metadata["md5sum"] {
		t.Errorf("copy in parts: %+v, %v", info, err)
	}
	url, err := s.PresignGet(ctx, "dir/1", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !strings.Contains(url, "X-Amz-Algorithm=AWS4-HMAC-SHA256") {
		t.Errorf("presigned %s: %s", url, resp.Status)
	}
	if err := s.Delete(ctx, "dir/1", "never/was"); err != nil {
		t.Error(err)
	}
	if _, err := s.Head(ctx, "dir/1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("HEAD of a deleted object: %v", err)
	}
}

func TestMakeBucket(t *testing.T) {
	s := newStore(t, func(c *S3Config) { c.Bucket = "another" })
	for range 2 {
		if err := s.MakeBucket(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Each way a store can be configured wrongly must end soon, name the cause and
// say what to do.
func TestClearErrors(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*S3Config)
		want   []string
	}{
		"unreachable": {func(c *S3Config) { c.Endpoint = "http://127.0.0.1:1" }, []string{"connection refused", "S3_ENDPOINT"}},
		"no host":     {func(c *S3Config) { c.Endpoint = "http://store.invalid" }, []string{"store.invalid", "S3_ENDPOINT"}},
		"bad key":     {func(c *S3Config) { c.AccessKey = "nobody" }, []string{"S3_ACCESS_KEY"}},
		"bad secret":  {func(c *S3Config) { c.SecretKey = "wrong" }, []string{"SignatureDoesNotMatch", "S3_SECRET_KEY"}},
		"no bucket":   {func(c *S3Config) { c.Bucket = "missing-bucket" }, []string{"NoSuchBucket", `"missing-bucket" does not exist`, "S3_BUCKET"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, func(cfg *S3Config) {
				cfg.Budget, cfg.RetryPause = 50*time.Millisecond, time.Millisecond
				c.change(cfg)
			})
			for op, err := range map[string]error{"check": s.Check(t.Context()), "put": func() error {
				_, err := s.Put(t.Context(), Object{Key: "k", Body: strings.NewReader("x"), Size: 1})
				return err
			}()} {
				if err == nil {
					t.Fatalf("%s succeeded", op)
				}
				for _, w := range c.want {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("%s: %q does not say %q", op, err, w)
					}
				}
				if strings.Contains(err.Error(), s3test.SecretKey) {
					t.Errorf("%s: error holds the secret key: %v", op, err)
				}
			}
		})
	}
}

func TestNewS3Refuses(t *testing.T) {
	good := S3Config{Endpoint: "http://h", AccessKey: "a", SecretKey: "s", Bucket: "b"}
	for name, change := range map[string]func(*S3Config){
		"no scheme":   func(c *S3Config) { c.Endpoint = "store:8080" },
		"no bucket":   func(c *S3Config) { c.Bucket = "" },
		"no keys":     func(c *S3Config) { c.SecretKey = "" },
		"credentials": func(c *S3Config) { c.Endpoint = "http://a:hunter2@h" },
		"no CA":       func(c *S3Config) { c.Endpoint, c.Verify, c.CAFile = "https://h", true, "/nowhere" },
		"tiny parts":  func(c *S3Config) { c.PartSize = 1 << 20 },
	} {
		cfg := good
		change(&cfg)
		_, err := NewS3(cfg)
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: error shows the password: %v", name, err)
		}
	}
}

const (
	imageID = "7c5fc51c-fc1d-4d2e-8c42-7c903f1ec20d"
	jobID   = "221ce1dc-1886-460d-86d1-53ecd2260b73"
)

func request(rootfs []byte) Request {
	art := func(k Kind, b []byte) Artifact {
		return Artifact{Kind: k, Body: bytes.NewReader(b), Size: int64(len(b))}
	}
	return Request{Prefix: imageID, Metadata: ImageMetadata(imageID, "übung", jobID), Artifacts: []Artifact{
		art(Initrd, []byte("initrd")), art(Kernel, []byte("kernel")), art(Rootfs, rootfs), art(BootParameters, []byte("quiet")),
	}}
}

func TestPublish(t *testing.T) {
	s := newStore(t, nil)
	res, err := Publish(t.Context(), s, request(noise(2*minPartSize)))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range res.Artifacts {
		names = append(names, strings.TrimPrefix(e.Link.Path, "s3://boot-images/"+imageID+"/"))
	}
	if got := strings.Join(names, " "); got != "rootfs kernel initrd boot_parameters manifest.json" {
		t.Errorf("uploaded in the order %s", got)
	}
	r, info, err := s.Get(t.Context(), imageID+"/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	body, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Metadata) != 1 || info.Metadata["md5sum"] != res.Artifacts[4].MD5 || res.Manifest.ETag != info.ETag {
		t.Errorf("manifest metadata %v, link %+v", info.Metadata, res.Manifest)
	}
	want := fmt.Sprintf(`{
    "artifacts": [
        {
            "link": {
                "etag": "%s",
                "path": "s3://boot-images/%s/rootfs",
                "type": "s3"
            },
            "md5": "%s",
            "type": "application/vnd.cray.image.rootfs.squashfs"
        },`, res.Artifacts[0].Link.ETag, imageID, res.Artifacts[0].MD5)
	if !strings.HasPrefix(string(body), want) || !strings.HasSuffix(string(body), "\n    \"version\": \"1.0\"\n}") {
		t.Errorf("manifest:\n%s", body)
	}
	head, err := s.Head(t.Context(), imageID+"/kernel")
	if err != nil || head.Metadata["x-shasta-ims-image-id"] != imageID || head.Metadata["x-shasta-ims-job-id"] != jobID {
		t.Errorf("kernel metadata %v, %v", head.Metadata, err)
	}
	if err := Remove(t.Context(), s, imageID); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, s)
}

// wantEmpty checks that neither objects nor unfinished uploads are left.
func wantEmpty(t *testing.T, s *S3) {
	t.Helper()
	all, err := s.List(context.Background(), "")
	if err != nil || len(all) != 0 {
		t.Errorf("objects left: %v, %v", all, err)
	}
	if n := unfinished(t, s); n != 0 {
		t.Errorf("%d unfinished uploads left", n)
	}
}

func TestPublishRefuses(t *testing.T) {
	s := newStore(t, nil)
	for name, change := range map[string]func(*Request){
		"no rootfs":   func(r *Request) { r.Artifacts = r.Artifacts[:2] },
		"two rootfs":  func(r *Request) { r.Artifacts = append(r.Artifacts, r.Artifacts[2]) },
		"up":          func(r *Request) { r.Prefix = ".." },
		"nowhere":     func(r *Request) { r.Prefix = "" },
		"everywhere":  func(r *Request) { r.Prefix = "." },
		"a slash":     func(r *Request) { r.Prefix = imageID + "/" },
		"an escape":   func(r *Request) { r.Prefix = "a\x1bb" },
		"unknown one": func(r *Request) { r.Artifacts[0].Kind = "../x" },
	} {
		r := request([]byte("x"))
		change(&r)
		if _, err := Publish(t.Context(), s, r); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	wantEmpty(t, s)
}

// brokenAt fails reads at an offset, like a disk that dies during the upload.
type brokenAt struct {
	io.ReaderAt
	after int64
	reads int
}

func (b *brokenAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= b.after {
		if b.reads++; b.reads > 12 { // the digest pass goes through
			return 0, errors.New("input/output error")
		}
	}
	return b.ReaderAt.ReadAt(p, off)
}

// A failure in the middle leaves neither objects nor parts, whether the source
// broke or the process was told to end.
func TestPublishUndo(t *testing.T) {
	s := newStore(t, nil)
	body := noise(4 * minPartSize)
	t.Run("source breaks", func(t *testing.T) {
		r := request(nil)
		r.Artifacts[2] = Artifact{Kind: Rootfs, Body: &brokenAt{ReaderAt: bytes.NewReader(body), after: 3 * minPartSize}, Size: int64(len(body))}
		if _, err := Publish(t.Context(), s, r); err == nil || !strings.Contains(err.Error(), "input/output error") {
			t.Errorf("publish: %v", err)
		}
		wantEmpty(t, s)
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		told := errors.New("told to end")
		r := request(body)
		r.Progress = func(k Kind, done, _ int64) {
			if k == Rootfs && done > 0 {
				cancel(told)
			}
		}
		if _, err := Publish(ctx, s, r); !errors.Is(err, told) {
			t.Errorf("publish: %v", err)
		}
		wantEmpty(t, s)
	})
	t.Run("last artifact", func(t *testing.T) {
		r := request(body)
		r.Artifacts[3] = Artifact{Kind: BootParameters, Body: strings.NewReader("short"), Size: 100}
		if _, err := Publish(t.Context(), s, r); err == nil || !strings.Contains(err.Error(), "became shorter") {
			t.Errorf("publish: %v", err)
		}
		wantEmpty(t, s)
	})
}

func TestAbortUploads(t *testing.T) {
	s := newStore(t, nil)
	for _, key := range []string{imageID + "/rootfs", imageID + "/rootfs", imageID + "/initrd", "other/rootfs"} {
		if _, err := s.begin(t.Context(), key, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AbortUploads(t.Context(), imageID+"/"); err != nil {
		t.Fatal(err)
	}
	if n := unfinished(t, s); n != 1 {
		t.Errorf("%d uploads left, want the other image's one", n)
	}
}
