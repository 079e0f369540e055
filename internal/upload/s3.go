// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/logging"
)

// S3Config says where the store is and how to talk to it.
type S3Config struct {
	Endpoint  string // http(s)://host[:port]
	AccessKey string
	SecretKey string
	Bucket    string
	Region    string // "" means us-east-1, which RGW and versitygw accept

	Verify bool   // check the server's certificate
	CAFile string // PEM added to the system's authorities

	Budget       time.Duration // longest time to repeat one failing request; 0 means 720 s
	StallTimeout time.Duration // longest silence within one request; 0 means 2 min
	RetryPause   time.Duration // first pause between attempts; 0 means 500 ms
	PartSize     int64         // smallest multipart part and largest single PUT, in bytes; 0 means 16 MiB
	Parallel     int           // parts in flight; 0 means 4
	Log          *slog.Logger  // nil: silent
}

const (
	defaultPartSize = 16 << 20
	minPartSize     = 5 << 20 // S3's own minimum for all parts but the last
	maxParts        = 10000
	maxPartSize     = 5 << 30

	// copyLimit is the largest object one CopyObject may copy.
	copyLimit = 5 << 30

	// completePatience is how long a store may be silent while it assembles
	// the parts of a large upload.
	completePatience = 10 * time.Minute

	// contentType is what the legacy uploader left on every object.
	contentType = "binary/octet-stream"
)

// S3 is one bucket of one store. It is safe for concurrent use.
type S3 struct {
	client   *s3.Client
	endpoint string
	bucket   string
	parallel int
	partSize int64
	budget   time.Duration
	pause    time.Duration
	log      *slog.Logger
	speed    speed
}

// Info describes a stored object.
type Info struct {
	Key         string
	Size        int64
	ETag        string // without quotes
	ContentType string
	Metadata    map[string]string // user metadata, lower-case keys without x-amz-meta-
	Modified    time.Time
}

// NewS3 checks the configuration; it does not connect.
func NewS3(cfg S3Config) (*S3, error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("S3 endpoint %q: must be http(s)://host[:port]; set S3_ENDPOINT", cfg.Endpoint)
	}
	if u.User != nil {
		return nil, errors.New("S3 endpoint: must not hold credentials; use S3_ACCESS_KEY and S3_SECRET_KEY")
	}
	if cfg.Bucket == "" {
		return nil, errors.New("S3 bucket: not set; set S3_BUCKET")
	}
	if cfg.AccessKey == "" || cfg.SecretKey == "" {
		return nil, errors.New("S3 credentials: not set; set S3_ACCESS_KEY and S3_SECRET_KEY")
	}
	s := &S3{
		endpoint: u.Scheme + "://" + u.Host, bucket: cfg.Bucket, parallel: cfg.Parallel,
		partSize: cfg.PartSize, budget: cfg.Budget, pause: cfg.RetryPause, log: cfg.Log,
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.parallel <= 0 {
		s.parallel = 4
	}
	if s.partSize <= 0 {
		s.partSize = defaultPartSize
	}
	if s.partSize < minPartSize || s.partSize > maxPartSize {
		return nil, fmt.Errorf("S3 part size %d: must be between 5 MiB and 5 GiB", s.partSize)
	}
	if s.budget <= 0 {
		s.budget = 720 * time.Second
	}
	if s.pause <= 0 {
		s.pause = 500 * time.Millisecond
	}
	stall := cfg.StallTimeout
	if stall <= 0 {
		stall = 2 * time.Minute
	}
	client, err := s.httpClient(cfg, u.Scheme == "https", stall)
	if err != nil {
		return nil, err
	}
	region := cfg.Region
	if region == "" {
		region = "us-east-1"
	}
	s.client = s3.New(s3.Options{
		BaseEndpoint:                aws.String(strings.TrimRight(cfg.Endpoint, "/")),
		Region:                      region,
		UsePathStyle:                true,
		Credentials:                 credentials.NewStaticCredentialsProvider(cfg.AccessKey, cfg.SecretKey, ""),
		HTTPClient:                  client,
		Retryer:                     aws.NopRetryer{}, // ours is bounded by time and knows more
		RequestChecksumCalculation:  aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:  aws.ResponseChecksumValidationWhenRequired,
		DisableS3ExpressSessionAuth: aws.Bool(true),
		Logger:                      logging.Nop{},
	})
	return s, nil
}

func (s *S3) httpClient(cfg S3Config, https bool, stall time.Duration) (*http.Client, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	t.MaxIdleConnsPerHost = s.parallel + 2
	t.ForceAttemptHTTP2 = false // parts share one window over HTTP/2; S3 stores speak 1.1
	t.DisableCompression = true
	if https {
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		switch {
		case !cfg.Verify:
			s.log.Warn("the S3 server's certificate is NOT verified; set S3_SSL_VALIDATE to true or to a CA file", "endpoint", s.endpoint)
			t.TLSClientConfig.InsecureSkipVerify = true
		case cfg.CAFile != "":
			pem, err := os.ReadFile(cfg.CAFile)
			if err != nil {
				return nil, fmt.Errorf("read the CA certificate for S3: %w; check S3_SSL_VALIDATE", err)
			}
			pool, err := x509.SystemCertPool()
			if err != nil {
				pool = x509.NewCertPool()
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("CA certificate %s: no PEM certificate inside; check S3_SSL_VALIDATE", cfg.CAFile)
			}
			t.TLSClientConfig.RootCAs = pool
		}
	}
	return &http.Client{
		Transport:     &watchdog{next: t, after: stall},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// Bucket is the bucket's name.
func (s *S3) Bucket() string { return s.bucket }

// URL names an object the way IMS links do.
func (s *S3) URL(key string) string { return "s3://" + s.bucket + "/" + key }

// Check proves, with one cheap request, that the store answers, the keys are
// good and the bucket is there. Lacking the right to list is no failure: the
// upload itself will show whether writing is allowed.
func (s *S3) Check(ctx context.Context) error {
	return s.retry(ctx, "check "+s.URL(""), func(ctx context.Context) error {
		_, err := s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &s.bucket, MaxKeys: aws.Int32(1), Prefix: aws.String("ims-buildenv-check/")})
		if code(err) == "AccessDenied" {
			s.log.Debug("the S3 keys may not list the bucket", "bucket", s.bucket)
			return nil
		}
		return err
	})
}

// MakeBucket creates the bucket; one that is ours already is fine.
func (s *S3) MakeBucket(ctx context.Context) error {
	return s.retry(ctx, "create bucket "+s.bucket, func(ctx context.Context) error {
		_, err := s.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &s.bucket})
		if c := code(err); c == "BucketAlreadyOwnedByYou" || c == "BucketAlreadyExists" {
			return nil
		}
		return err
	})
}

// Head describes an object. An error that is fs.ErrNotExist means the store
// has no such key (or, since HEAD answers carry no reason, no such bucket).
func (s *S3) Head(ctx context.Context, key string) (Info, error) {
	var info Info
	err := s.retry(ctx, "HEAD "+s.URL(key), func(ctx context.Context) error {
		out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: &key})
		if err != nil {
			return err
		}
		info = Info{
			Key: key, Size: aws.ToInt64(out.ContentLength), ETag: unquote(aws.ToString(out.ETag)),
			ContentType: aws.ToString(out.ContentType), Metadata: out.Metadata, Modified: aws.ToTime(out.LastModified),
		}
		return nil
	})
	return info, err
}

// Get opens an object for reading; the caller closes the body. Reads are under
// the stall watchdog and end with an error when it bites.
func (s *S3) Get(ctx context.Context, key string) (io.ReadCloser, Info, error) {
	var body io.ReadCloser
	var info Info
	err := s.retry(ctx, "GET "+s.URL(key), func(ctx context.Context) error {
		out, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: &key})
		if err != nil {
			return err
		}
		body = out.Body
		info = Info{
			Key: key, Size: aws.ToInt64(out.ContentLength), ETag: unquote(aws.ToString(out.ETag)),
			ContentType: aws.ToString(out.ContentType), Metadata: out.Metadata, Modified: aws.ToTime(out.LastModified),
		}
		return nil
	})
	return body, info, err
}

// List describes every object whose key starts with prefix. ContentType and
// Metadata are not part of a listing.
func (s *S3) List(ctx context.Context, prefix string) ([]Info, error) {
	var all []Info
	var next *string
	for {
		var page *s3.ListObjectsV2Output
		err := s.retry(ctx, "list "+s.URL(prefix), func(ctx context.Context) (err error) {
			page, err = s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: &prefix, ContinuationToken: next})
			return err
		})
		if err != nil {
			return nil, err
		}
		for _, o := range page.Contents {
			all = append(all, Info{Key: aws.ToString(o.Key), Size: aws.ToInt64(o.Size), ETag: unquote(aws.ToString(o.ETag)), Modified: aws.ToTime(o.LastModified)})
		}
		if !aws.ToBool(page.IsTruncated) || page.NextContinuationToken == nil {
			return all, nil
		}
		next = page.NextContinuationToken
	}
}

// Delete removes objects; a key that is not there counts as removed. It tries
// every key and returns all errors.
func (s *S3) Delete(ctx context.Context, keys ...string) error {
	var errs []error
	for _, key := range keys {
		errs = append(errs, s.retry(ctx, "delete "+s.URL(key), func(ctx context.Context) error {
			_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: &key})
			if code(err) == "NoSuchKey" {
				return nil
			}
			return err
		}))
	}
	return errors.Join(errs...)
}

// PresignGet makes a URL (SigV4) that lets its bearer read one object for d,
// at most seven days. It does not check that the object exists.
func (s *S3) PresignGet(ctx context.Context, key string, d time.Duration) (string, error) {
	req, err := s3.NewPresignClient(s.client).PresignGetObject(ctx,
		&s3.GetObjectInput{Bucket: &s.bucket, Key: &key}, s3.WithPresignExpires(d))
	if err != nil {
		return "", fmt.Errorf("presign %s: %w", s.URL(key), err)
	}
	return req.URL, nil
}

// Copy copies an object inside the bucket with its metadata, on the server.
func (s *S3) Copy(ctx context.Context, from, to string) error {
	info, err := s.Head(ctx, from)
	if err != nil {
		return err
	}
	source := s.bucket + "/" + escapeKey(from)
	if info.Size > copyLimit {
		return s.copyParts(ctx, source, to, info)
	}
	return s.retry(ctx, "copy "+s.URL(from)+" to "+to, func(ctx context.Context) error {
		_, err := s.client.CopyObject(withPatience(ctx, completePatience), &s3.CopyObjectInput{
			Bucket: &s.bucket, Key: &to, CopySource: &source, MetadataDirective: types.MetadataDirectiveCopy,
		})
		return err
	})
}

// escapeKey escapes a key for the x-amz-copy-source header, slashes kept.
func escapeKey(key string) string {
	parts := strings.Split(key, "/")
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return strings.Join(parts, "/")
}

func unquote(etag string) string { return strings.Trim(etag, `"`) }
