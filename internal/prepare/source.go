// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/cenkalti/backoff/v5"
)

// source is an object behind a presigned URL.
type source struct {
	url    *url.URL
	client *http.Client
}

// newSource checks the URL. Its query (SigV2 or SigV4) is sent as it is.
func newSource(rawURL, caFile string) (*source, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		// The parser's error quotes the URL, which holds a signature.
		return nil, errors.New("the image's URL is not of the form http://HOST/… or https://HOST/…: pass the presigned URL of the image's rootfs, in quotes")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableCompression = true // the object's own bytes are wanted, and counted
	if u.Scheme == "https" {
		pool, err := trustedCAs(caFile)
		if err != nil {
			return nil, err
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &source{url: u, client: &http.Client{Transport: transport, CheckRedirect: checkRedirect}}, nil
}

// trustedCAs adds the site's CA, if any, to the system's.
func trustedCAs(caFile string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if caFile == "" {
		return pool, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("CA_CERT: %w: mount the ConfigMap with the site's CA there, or unset it to trust the system's", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("CA_CERT: no PEM certificate in %s", caFile)
	}
	return pool, nil
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return backoff.Permanent(errors.New("redirect from HTTPS to HTTP refused"))
	}
	if len(via) >= 10 {
		return backoff.Permanent(errors.New("more than 10 redirects"))
	}
	return nil
}

// String returns the URL without what must not be seen.
func (s *source) String() string {
	return (&url.URL{Scheme: s.url.Scheme, Host: s.url.Host, Path: s.url.Path, RawPath: s.url.RawPath}).String()
}

// redact takes the URL out of an error of net/http.
func (s *source) redact(err error) error {
	var u *url.Error
	for errors.As(err, &u) {
		err = u.Err
	}
	return err
}

// get asks for the object from offset on.
func (s *source) get(ctx context.Context, offset int64, etag string) (*http.Response, error) {
	if offset == 0 {
		return s.request(ctx, "", "")
	}
	return s.request(ctx, fmt.Sprintf("bytes=%d-", offset), etag)
}

// request asks for a range of the object, or for all of it. With a range it
// must still be the object that the first bytes came from.
func (s *source) request(ctx context.Context, span, etag string) (*http.Response, error) {
	req := (&http.Request{Method: http.MethodGet, URL: s.url, Header: http.Header{}}).WithContext(ctx)
	if span != "" {
		req.Header.Set("Range", span)
		req.Header.Set("If-Match", etag)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, s.lasting(s.redact(err))
	}
	return resp, nil
}

// lasting marks errors that no retry can cure.
func (s *source) lasting(err error) error {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	if errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &invalid) {
		return backoff.Permanent(fmt.Errorf("%w: put the CA of the artifact store into the file that CA_CERT names", err))
	}
	return err
}

// accept looks at the answer's head: is the body what must be appended now?
func (d *download) accept(resp *http.Response) error {
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		return d.acceptWhole(resp)
	case code == http.StatusPartialContent:
		return d.acceptPart(resp)
	default:
		return refusal(resp)
	}
}

// refusal is the error in an answer without data.
func refusal(resp *http.Response) error {
	switch code := resp.StatusCode; {
	case code == http.StatusPreconditionFailed || code == http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%s: %w", resp.Status, errRestart)
	case code == http.StatusForbidden || code == http.StatusUnauthorized:
		return backoff.Permanent(fmt.Errorf("%s%s: the presigned URL expired or was refused: start a new job to get a fresh one, and compare the clocks of IMS and S3", resp.Status, s3Code(resp)))
	case code == http.StatusNotFound || code == http.StatusGone:
		return backoff.Permanent(fmt.Errorf("%s%s: the image's rootfs is not in S3 any more: customize an image whose artifacts exist", resp.Status, s3Code(resp)))
	case code == http.StatusRequestTimeout || code == http.StatusTooManyRequests || code >= 500:
		return fmt.Errorf("the server answered %s%s", resp.Status, s3Code(resp))
	default:
		return backoff.Permanent(fmt.Errorf("the server answered %s%s: check the image's link in IMS", resp.Status, s3Code(resp)))
	}
}

// acceptWhole starts over when a server ignored the range.
func (d *download) acceptWhole(resp *http.Response) error {
	if d.offset > 0 || d.have != nil {
		if err := d.reset(); err != nil {
			return backoff.Permanent(err)
		}
	}
	d.size = resp.ContentLength
	d.etag = strongETag(resp)
	return d.checkRoom()
}

// contentRange is RFC 9110, section 14.4, with a known length.
var contentRange = regexp.MustCompile(`^bytes (\d+)-(\d+)/(\d+)$`)

func (d *download) acceptPart(resp *http.Response) error {
	m := contentRange.FindStringSubmatch(resp.Header.Get("Content-Range"))
	if d.offset == 0 || m == nil {
		return backoff.Permanent(fmt.Errorf("the server answered %s with the range %q, which was not asked for", resp.Status, resp.Header.Get("Content-Range")))
	}
	from, err1 := strconv.ParseInt(m[1], 10, 64)
	size, err2 := strconv.ParseInt(m[3], 10, 64)
	if etag := strongETag(resp); err1 != nil || err2 != nil || from != d.offset || d.size >= 0 && size != d.size || etag != "" && etag != d.etag {
		return fmt.Errorf("%s with other data than asked for: %w", resp.Status, errRestart)
	}
	d.size = size
	return nil
}

// acceptRange looks at the answer to a request for one of several ranges.
func (d *download) acceptRange(resp *http.Response, from, n int64) error {
	if resp.StatusCode != http.StatusPartialContent {
		if resp.StatusCode == http.StatusOK {
			return errors.New("the server sent everything instead of a range")
		}
		return refusal(resp)
	}
	got, want := resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", from, from+n-1, d.size)
	if etag := strongETag(resp); got != want || etag != "" && etag != d.etag {
		return fmt.Errorf("%s with other data than asked for: %w", resp.Status, errRestart)
	}
	return nil
}

// strongETag returns the answer's ETag if If-Match can use it, for which weak
// ones are no good (RFC 9110, section 13.1.1).
func strongETag(resp *http.Response) string {
	if etag := resp.Header.Get("ETag"); !strings.HasPrefix(etag, "W/") {
		return etag
	}
	return ""
}

var s3ErrorCode = regexp.MustCompile(`<Code>([A-Za-z0-9.]{1,64})</Code>`)

// s3Code returns the error code of an S3 error document. Nothing else of it
// is fit for a log: some errors repeat the request with its signature.
func s3Code(resp *http.Response) string {
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	if m := s3ErrorCode.FindSubmatch(body); err == nil && m != nil {
		return " (" + string(m[1]) + ")"
	}
	return ""
}
