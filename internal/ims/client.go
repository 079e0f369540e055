// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
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

	"github.com/cenkalti/backoff/v5"
)

const (
	// defaultTimeout is the legacy helper's IMS_PYTHON_HELPER_TIMEOUT.
	defaultTimeout = 720 * time.Second

	// attemptTimeout bounds one request. The service is single-threaded and
	// deletes images and Kubernetes objects inside a request, so minutes of
	// silence are normal.
	attemptTimeout = 5 * time.Minute

	maxBody      = 16 << 20
	maxErrorBody = 64 << 10

	// maxAmbiguousPosts bounds how often a POST of unknown fate is sent again.
	maxAmbiguousPosts = 2
)

// Config says where the service is and how to be let in.
type Config struct {
	BaseURL string        // http(s)://host[:port][/prefix], without trailing /images
	CAFile  string        // PEM added to the system's authorities; may be missing when nothing is https
	OAuth   OAuth         // empty Endpoint: calls carry no token
	Timeout time.Duration // budget of one call with all its attempts; 0 means 720 s
	HTTP    *http.Client  // nil: one made from CAFile
	Log     *slog.Logger  // nil: silent

	// RetryPause is the first pause between attempts, growing to 16 times its
	// length; 0 means one second.
	RetryPause time.Duration
}

// Client talks to one IMS. It is safe for concurrent use.
type Client struct {
	base    string
	http    *http.Client
	tokens  *tokens
	timeout time.Duration
	pause   time.Duration
	log     *slog.Logger
}

// New checks the configuration; it does not connect.
func New(cfg Config) (*Client, error) {
	base := strings.TrimRight(cfg.BaseURL, "/")
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("IMS base URL %q: must be http(s)://host[:port][/path]; set IMS_URL", cfg.BaseURL)
	}
	c := &Client{base: base, http: cfg.HTTP, timeout: cfg.Timeout, pause: cfg.RetryPause, log: cfg.Log}
	if c.timeout <= 0 {
		c.timeout = defaultTimeout
	}
	if c.pause <= 0 {
		c.pause = time.Second
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.http == nil {
		https := u.Scheme == "https" || strings.HasPrefix(cfg.OAuth.Endpoint, "https:")
		if c.http, err = newHTTP(cfg.CAFile, https); err != nil {
			return nil, err
		}
	}
	if cfg.OAuth.Endpoint == "" {
		c.log.Debug("no OAuth endpoint configured: calling IMS without a token")
	} else if c.tokens, err = newTokens(cfg.OAuth, c.http); err != nil {
		return nil, err
	}
	return c, nil
}

func newHTTP(caFile string, https bool) (*http.Client, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	if caFile != "" && https {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("read the CA certificate for IMS: %w; set CA_CERT to a readable PEM file", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("CA certificate %s: no PEM certificate inside; set CA_CERT to a PEM file", caFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// call is one API request with its retry rule.
type call struct {
	method string
	path   string // below the base, starting with /
	query  string
	body   any // nil: none
	out    any // nil: the answer's body is dropped
	raw    *json.RawMessage
}

func (c *Client) do(ctx context.Context, k call) error {
	op := k.method + " " + k.path
	var body []byte
	if k.body != nil {
		var err error
		if body, err = json.Marshal(k.body); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval = c.pause
	pauses.MaxInterval = 16 * c.pause
	relogins, lost := 0, 0
	var answer []byte
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		a, err := c.attempt(ctx, op, k, body)
		if isStatus(err, http.StatusUnauthorized) && c.tokens != nil && relogins == 0 {
			relogins++
			c.tokens.forget()
			a, err = c.attempt(ctx, op, k, body)
		}
		answer = a
		if err == nil {
			return struct{}{}, nil
		}
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		if ctx.Err() != nil || !retryable(err) {
			return struct{}{}, backoff.Permanent(err)
		}
		if k.method == http.MethodPost && ambiguous(err) {
			if lost++; lost > maxAmbiguousPosts {
				return struct{}{}, backoff.Permanent(err)
			}
			c.log.Warn("the fate of a request is unknown; sending it again may leave an empty duplicate record in IMS",
				"request", op, "error", err)
		}
		return struct{}{}, err
	}, backoff.WithBackOff(pauses), backoff.WithMaxElapsedTime(c.timeout), backoff.WithNotify(func(err error, d time.Duration) {
		c.log.Warn("IMS call did not succeed, trying again", "request", op, "error", err, "pause", d.Round(time.Millisecond))
	}))
	if err != nil {
		if k.method == http.MethodDelete && isStatus(err, http.StatusNotFound) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		return explain(op, err)
	}
	if k.raw != nil {
		*k.raw = answer
	}
	if k.out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, k.out); err != nil {
		return fmt.Errorf("%s: IMS sent an answer that is not the expected JSON: %w; check that IMS_URL is the IMS service", op, err)
	}
	return nil
}

// attempt sends the request once and returns the body of a 2xx answer.
func (c *Client) attempt(ctx context.Context, op string, k call, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, min(attemptTimeout, c.timeout))
	defer cancel()
	target := c.base + k.path
	if k.query != "" {
		target += "?" + k.query
	}
	req, err := http.NewRequestWithContext(ctx, k.method, target, bytes.NewReader(body))
	if err != nil {
		return nil, withoutQuery(err)
	}
	req.Header.Set("Accept", "application/json, application/problem+json")
	req.Header.Set("User-Agent", "ims-buildenv")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.tokens != nil {
		token, err := c.tokens.get(ctx)
		if err != nil {
			return nil, err
		}
		token.SetAuthHeader(req)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, withoutQuery(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // a cut-off explanation is better than none
		return nil, newError(op, resp, b)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return nil, withoutQuery(err)
	}
	if len(b) > maxBody {
		return nil, &permanentError{fmt.Errorf("answer larger than %d MiB", maxBody>>20)}
	}
	return b, nil
}

// permanentError marks failures of ours that no repetition cures.
type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

func isStatus(err error, status int) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == status
}

func retryable(err error) bool {
	var perm *permanentError
	if errors.As(err, &perm) {
		return false
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Status == http.StatusTooManyRequests || e.Status >= 500 && e.Status != http.StatusNotImplemented
	}
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var cert *tls.CertificateVerificationError
	return !errors.As(err, &unknown) && !errors.As(err, &name) && !errors.As(err, &cert)
}

// ambiguous reports whether the service may have acted on a request that
// failed this way. It has not when no connection was made, when the token could
// not be had, or when it said so (429, 503).
func ambiguous(err error) bool {
	var e *Error
	if errors.As(err, &e) {
		return e.Status != http.StatusTooManyRequests && e.Status != http.StatusServiceUnavailable
	}
	var te *tokenError
	var op *net.OpError
	return !errors.As(err, &te) && !(errors.As(err, &op) && op.Op == "dial")
}

// explain adds the call and a next step to errors that lack them.
func explain(op string, err error) error {
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	var te *tokenError
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &te):
		return fmt.Errorf("%s: %w", op, err)
	case errors.As(err, &cert):
		return fmt.Errorf("%s: %w; set CA_CERT to the certificate authority of the API gateway", op, err)
	}
	return fmt.Errorf("%s: reach IMS: %w; check IMS_URL or API_GATEWAY_HOSTNAME and that the service is up", op, err)
}
