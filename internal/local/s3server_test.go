// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// TestStoreWithForeignClient uses the store as any client of S3 does, and looks
// at what is left after a restart.
func TestStoreWithForeignClient(t *testing.T) {
	data := t.TempDir()
	ctx := t.Context()
	client := func(s *s3Server) *s3.Client {
		return s3.New(s3.Options{BaseEndpoint: aws.String(s.endpoint), Region: "us-east-1", UsePathStyle: true,
			Credentials: credentials.NewStaticCredentialsProvider(s.keys.AccessKey, s.keys.SecretKey, "")})
	}
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<12)
	var keys s3Keys
	for round := range 2 {
		s, err := startS3(ctx, data, "127.0.0.1:0", testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		c := client(s)
		if round == 0 {
			keys = s.keys
			_, err := c.PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String(bucketImages), Key: aws.String("a/rootfs"), Body: bytes.NewReader(body), Metadata: map[string]string{"md5sum": "x"}})
			if err != nil {
				t.Fatal(err)
			}
		}
		if s.keys != keys {
			t.Error("the keys changed over the restart")
		}
		buckets, err := c.ListBuckets(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, b := range buckets.Buckets {
			names = append(names, aws.ToString(b.Name))
		}
		if !slices.Equal(names, []string{bucketImages, bucketIMS}) {
			t.Errorf("buckets are %v", names)
		}
		got, err := c.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucketImages), Key: aws.String("a/rootfs")})
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(got.Body)
		if err != nil || !bytes.Equal(b, body) || got.Metadata["md5sum"] != "x" {
			t.Errorf("the object came back with %d bytes, metadata %v, %v", len(b), got.Metadata, err)
		}
		bad := client(&s3Server{endpoint: s.endpoint, keys: s3Keys{keys.AccessKey, "wrong"}})
		if _, err := bad.ListBuckets(ctx, nil); err == nil {
			t.Error("a wrong secret was let in")
		}
		s.stop()
	}
	st, err := os.Stat(filepath.Join(data, "s3-credentials"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("credentials file: %v, %v", st.Mode(), err)
	}
}

// TestStoreWithoutXattrs: objects keep their metadata on a file system that has
// no user xattrs.
func TestStoreWithoutXattrs(t *testing.T) {
	testkit.NeedRoot(t)
	data := t.TempDir()
	if err := unix.Mount("ramfs", data, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(data, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Setxattr(data, "user.test", []byte("x"), 0); err == nil {
		t.Fatal("ramfs has user xattrs; this test needs a file system without")
	}
	s, err := startS3(t.Context(), data, "127.0.0.1:0", testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	objects := newS3Objects(s)
	if err := objects.put(t.Context(), bucketImages, "a/rootfs", []byte("squash")); err != nil {
		t.Fatal(err)
	}
	if info, err := objects.head(t.Context(), bucketImages, "a/rootfs"); err != nil || info.md5 == "" || info.etag == "" {
		t.Errorf("head: %+v, %v", info, err)
	}
}

// TestStoreSecretsAreNotVisible: neither the command line nor the environment
// of the store's process tells the keys.
func TestStoreSecretsAreNotVisible(t *testing.T) {
	s, err := startS3(t.Context(), t.TempDir(), "127.0.0.1:0", testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	for _, name := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), name))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(s.keys.SecretKey)) || bytes.Contains(b, []byte(s.keys.AccessKey)) || name == "environ" && len(b) > 0 {
			t.Errorf("%s of the store is %q", name, b)
		}
	}
}

func TestStoreFailsClearly(t *testing.T) {
	data := t.TempDir()
	s, err := startS3(t.Context(), data, "127.0.0.1:0", testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	taken := strings.TrimPrefix(s.endpoint, "http://")
	if _, err := startS3(t.Context(), t.TempDir(), taken, testLog(t)); err == nil || !strings.Contains(err.Error(), "--s3-listen") {
		t.Errorf("address in use: %v", err)
	}
	if err := os.WriteFile(filepath.Join(data, "s3-credentials"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := startS3(t.Context(), data, "127.0.0.1:0", testLog(t)); err == nil || !strings.Contains(err.Error(), "s3-credentials") {
		t.Errorf("damaged credentials: %v", err)
	}
}

func TestPresignedURL(t *testing.T) {
	_, _, store := testAPI(t, nil)
	if err := store.put(t.Context(), bucketImages, "x/rootfs", []byte("squash")); err != nil {
		t.Fatal(err)
	}
	url, err := store.presign(t.Context(), bucketImages, "x/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 10 * time.Second}
	r, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || string(b) != "squash" || r.StatusCode != http.StatusOK {
		t.Errorf("%s: %d %q %v", url, r.StatusCode, b, err)
	}
}
