// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"context"
	"io"
	"sync"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// presignLife is how long a job's download URL is good, as in the real service.
const presignLife = 5 * 24 * time.Hour

// s3Objects is the API's view of the store: links may name any bucket.
type s3Objects struct {
	server *s3Server
	mu     sync.Mutex
	known  map[string]*upload.S3
}

func newS3Objects(s *s3Server) *s3Objects {
	return &s3Objects{server: s, known: map[string]*upload.S3{}}
}

func (o *s3Objects) bucket(name string) (*upload.S3, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c, ok := o.known[name]; ok {
		return c, nil
	}
	c, err := o.server.client(name)
	if err == nil && (name == bucketImages || name == bucketIMS) {
		o.known[name] = c // others come out of requests and are not collected
	}
	return c, err
}

func (o *s3Objects) head(ctx context.Context, bucket, key string) (objectInfo, error) {
	c, err := o.bucket(bucket)
	if err != nil {
		return objectInfo{}, err
	}
	info, err := c.Head(ctx, key)
	return objectInfo{etag: info.ETag, md5: info.Metadata["md5sum"]}, err
}

func (o *s3Objects) get(ctx context.Context, bucket, key string, limit int64) ([]byte, error) {
	c, err := o.bucket(bucket)
	if err != nil {
		return nil, err
	}
	body, info, err := c.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if info.Size >= limit {
		return nil, errTooLarge
	}
	return io.ReadAll(io.LimitReader(body, limit))
}

func (o *s3Objects) put(ctx context.Context, bucket, key string, data []byte) error {
	c, err := o.bucket(bucket)
	if err != nil {
		return err
	}
	_, err = c.Put(ctx, upload.Object{Key: key, Body: bytes.NewReader(data), Size: int64(len(data))})
	return err
}

func (o *s3Objects) copy(ctx context.Context, bucket, from, to string) (string, error) {
	c, err := o.bucket(bucket)
	if err != nil {
		return "", err
	}
	if err := c.Copy(ctx, from, to); err != nil {
		return "", err
	}
	info, err := c.Head(ctx, to)
	return info.ETag, err
}

func (o *s3Objects) remove(ctx context.Context, bucket, key string) error {
	c, err := o.bucket(bucket)
	if err != nil {
		return err
	}
	return c.Delete(ctx, key)
}

func (o *s3Objects) presign(ctx context.Context, bucket, key string) (string, error) {
	c, err := o.bucket(bucket)
	if err != nil {
		return "", err
	}
	return c.PresignGet(ctx, key, presignLife)
}
