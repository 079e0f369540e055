// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/cenkalti/backoff/v5"
)

// Error is a request to the store that failed for good.
type Error struct {
	Op     string // what was being done, to which object
	Code   string // the store's code, such as NoSuchBucket; "" without an answer
	Status int    // HTTP status; 0 without an answer
	Hint   string // what the user can do
	Err    error
}

// Error names the operation, the reason and the next step.
func (e *Error) Error() string {
	var reason string
	switch {
	case e.Code != "":
		reason = fmt.Sprintf("the store answered %s (HTTP %d)", e.Code, e.Status)
	case e.Status != 0:
		reason = fmt.Sprintf("the store answered HTTP %d", e.Status)
	default:
		reason = e.Err.Error()
	}
	if e.Hint != "" {
		reason += "; " + e.Hint
	}
	return e.Op + ": " + reason
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes a missing object an fs.ErrNotExist.
func (e *Error) Is(target error) bool {
	return target == fs.ErrNotExist && e.Status == http.StatusNotFound && e.Code != "NoSuchBucket"
}

// code is the store's error code, "" for none. HEAD answers have no body, so
// the SDK invents NotFound for them.
func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return ""
}

func status(err error) int {
	var resp *smithyhttp.ResponseError
	if errors.As(err, &resp) && resp.Response != nil {
		return resp.HTTPStatusCode()
	}
	return 0
}

// explain turns an SDK error into ours.
func (s *S3) explain(op string, err error) error {
	e := &Error{Op: op, Code: code(err), Status: status(err), Err: err}
	var dns *net.DNSError
	var dial *net.OpError
	var cert *tls.CertificateVerificationError
	switch {
	case e.Code == "NoSuchBucket":
		e.Hint = fmt.Sprintf("bucket %q does not exist at %s: create it or correct S3_BUCKET", s.bucket, s.endpoint)
	case e.Code == "InvalidAccessKeyId" || e.Code == "SignatureDoesNotMatch" || e.Code == "XAdminUserNotFound": // the last is versitygw
		e.Hint = "check S3_ACCESS_KEY and S3_SECRET_KEY"
	case e.Code == "RequestTimeTooSkewed":
		e.Hint = fmt.Sprintf("this node's clock says %s and the store disagrees: check time synchronization (chrony, NTP) on both", time.Now().UTC().Format(time.RFC3339))
	case e.Code == "AccessDenied" || e.Status == http.StatusForbidden:
		e.Hint = "check S3_ACCESS_KEY and S3_SECRET_KEY, and that they may write to bucket " + s.bucket
	case e.Code == "QuotaExceeded" || e.Status == http.StatusInsufficientStorage:
		e.Hint = "free space in the store or raise its quota"
	case e.Status >= 300 && e.Status < 400:
		e.Hint = "redirects are not followed; point S3_ENDPOINT at the store itself"
	case e.Status >= 500:
		e.Hint = "check the health of the store at " + s.endpoint
	case e.Status != 0:
	case errors.As(err, &cert):
		e.Err, e.Hint = cert, "set S3_SSL_VALIDATE to the CA file of the store"
	case errors.As(err, &dns):
		e.Err, e.Hint = dns, "check the host name in S3_ENDPOINT"
	case errors.As(err, &dial) && dial.Op == "dial":
		e.Err, e.Hint = dial, "check S3_ENDPOINT and that the store is up"
	case errors.Is(err, errStalled):
		e.Err, e.Hint = errStalled, "check the network to "+s.endpoint
	}
	return e
}

// retryable reports whether the same request can succeed when sent again.
func retryable(err error) bool {
	switch code(err) {
	case "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable":
		return true
	case "RequestTimeTooSkewed":
		return false
	}
	if st := status(err); st >= 500 && st != http.StatusNotImplemented && st != http.StatusInsufficientStorage {
		return true
	}
	var cert *tls.CertificateVerificationError
	if errors.As(err, &cert) {
		return false
	}
	var opErr *net.OpError
	if errors.Is(err, errStalled) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.As(err, &opErr) {
		return true
	}
	return retry.IsErrorRetryables(retry.DefaultRetryables).IsErrorRetryable(err) == aws.TrueTernary
}

// maxDamaged bounds how often a body that arrived damaged is sent again: a
// file that changed while it was sent never matches.
const maxDamaged = 3

// retry runs one request until it succeeds, cannot succeed, or has been failing
// for longer than the budget.
func (s *S3) retry(ctx context.Context, op string, request func(context.Context) error) error {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval = s.pause
	pauses.MaxInterval = 30 * s.pause
	var deadline time.Time
	damaged := 0
	for {
		err := request(ctx)
		if err == nil {
			return nil
		}
		if cause := context.Cause(ctx); cause != nil {
			return fmt.Errorf("%s: %w", op, cause)
		}
		if c := code(err); c == "BadDigest" || c == "XAmzContentSHA256Mismatch" {
			damaged++
		}
		now := time.Now()
		if deadline.IsZero() {
			deadline = now.Add(s.budget)
		}
		pause := pauses.NextBackOff()
		if !retryable(err) || damaged >= maxDamaged || now.Add(pause).After(deadline) {
			return s.explain(op, err)
		}
		s.log.Warn("S3 request did not succeed, trying again", "request", op, "error", s.explain(op, err), "pause", pause.Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", op, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}
