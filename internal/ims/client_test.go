// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// service plays IMS and the token endpoint. Answers are taken from a queue;
// when that is empty, the request succeeds.
type service struct {
	t *testing.T

	mu       sync.Mutex
	answers  []func(w http.ResponseWriter, r *http.Request)
	requests []string
	bodies   []string
	tokens   int
	valid    string // token the service accepts; "" accepts calls without one
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path == "/token" {
		id, secret, ok := r.BasicAuth()
		if !ok || id != "client" || secret != "hush-hush" || string(body) != "grant_type=client_credentials" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			io.WriteString(w, `{"error":"unauthorized_client","error_description":"hush-hush is wrong"}`)
			return
		}
		s.tokens++
		s.valid = fmt.Sprintf("token-%d", s.tokens)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":%q,"token_type":"Bearer","expires_in":300}`, s.valid)
		return
	}
	s.requests = append(s.requests, r.Method+" "+r.URL.RequestURI())
	s.bodies = append(s.bodies, string(body))
	if !strings.Contains(r.Header.Get("Accept"), "application/problem+json") {
		s.t.Errorf("%s without Accept: application/problem+json", r.Method)
	}
	if s.valid != "" && r.Header.Get("Authorization") != "Bearer "+s.valid {
		problem(http.StatusUnauthorized, "no token", "")(w, r)
		return
	}
	if len(s.answers) > 0 {
		next := s.answers[0]
		s.answers = s.answers[1:]
		next(w, r)
		return
	}
	if r.Method == http.MethodDelete {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	io.WriteString(w, `{"id":"4124fa2f-c3b6-44bc-bae1-b3bcb9f27fd8","name":"n","status":"success","link":null,"resultant_image_id":null,"extra":1}`)
}

func problem(status int, detail, errors string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		if errors == "" {
			errors = "null"
		}
		fmt.Fprintf(w, `{"status":%d,"title":"T","detail":%q,"errors":%s}`, status, detail, errors)
	}
}

func hangUp(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func newService(t *testing.T, change func(*Config)) (*service, *Client, *strings.Builder) {
	t.Helper()
	s := &service{t: t}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	var log strings.Builder
	cfg := Config{BaseURL: srv.URL + "/", Timeout: 5 * time.Second, RetryPause: time.Millisecond,
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	if change != nil {
		change(&cfg)
	}
	if cfg.OAuth.Endpoint == "here" {
		cfg.OAuth.Endpoint = srv.URL + "/token?signature=hush-hush"
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s, c, &log
}

func oauth(c *Config) {
	c.OAuth = OAuth{Endpoint: "here", ClientID: "client", ClientSecret: "hush-hush"}
}

const jobID = "221ce1dc-1886-460d-86d1-53ecd2260b73"

func TestRequests(t *testing.T) {
	s, c, _ := newService(t, nil)
	ctx := t.Context()
	job, err := c.SetStatus(ctx, jobID, WaitingOnUser)
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid(job.Raw) || !strings.Contains(string(job.Raw), `"extra":1`) || job.ResultantImageID != "" {
		t.Errorf("job %+v, raw %s", job, job.Raw)
	}
	yes := true
	for _, call := range []func() error{
		func() error { _, err := c.Job(ctx, jobID); return err },
		func() error { _, err := c.SetResultantImage(ctx, jobID, "i"); return err },
		func() error { _, err := c.CreateImage(ctx, "a/b ü", "aarch64"); return err },
		func() error {
			_, err := c.LinkImage(ctx, "i", Link{Path: "s3://b/k", ETag: "e", Type: "s3"})
			return err
		},
		func() error { _, err := c.Image(ctx, "i"); return err },
		func() error { return c.DeleteImage(ctx, "i") },
		func() error { _, err := c.CreatePublicKey(ctx, "n", "ssh-ed25519 A"); return err },
		func() error { return c.DeletePublicKey(ctx, "../k?x") },
		func() error {
			_, err := c.CreateJob(ctx, JobRequest{JobType: "customize", ArtifactID: "a", PublicKeyID: "k", ArchiveName: "n",
				RequireDKMS: &yes, SSHContainers: []SSHContainer{{Name: "customize", Jail: true}}})
			return err
		},
		func() error { return c.DeleteJob(ctx, jobID) },
	} {
		if err := call(); err != nil {
			t.Error(err)
		}
	}
	want := []string{
		"PATCH /jobs/" + jobID + ` {"status":"waiting_on_user"}`,
		"GET /jobs/" + jobID + " ",
		"PATCH /jobs/" + jobID + ` {"resultant_image_id":"i"}`,
		`POST /images {"arch":"aarch64","name":"a/b ü"}`,
		`PATCH /images/i {"link":{"etag":"e","path":"s3://b/k","type":"s3"}}`,
		"GET /images/i ",
		"DELETE /images/i?cascade=false ",
		`POST /public-keys {"name":"n","public_key":"ssh-ed25519 A"}`,
		"DELETE /public-keys/..%2Fk%3Fx ",
		`POST /jobs {"job_type":"customize","artifact_id":"a","public_key_id":"k","image_root_archive_name":"n","require_dkms":true,"ssh_containers":[{"name":"customize","jail":true}]}`,
		"DELETE /jobs/" + jobID + " ",
	}
	for i, w := range want {
		if got := s.requests[i] + " " + s.bodies[i]; got != w {
			t.Errorf("request %d:\n got %s\nwant %s", i, got, w)
		}
	}
}

type answer = func(http.ResponseWriter, *http.Request)

// What is tried again, how often, and what the caller learns.
func TestRetries(t *testing.T) {
	status := func(c *Client) error { _, err := c.SetStatus(t.Context(), jobID, Success); return err }
	create := func(c *Client) error { _, err := c.CreateImage(t.Context(), "n", "x86_64"); return err }
	remove := func(c *Client) error { return c.DeleteImage(t.Context(), "i") }
	for name, c := range map[string]struct {
		call    func(*Client) error
		answers []answer
		tries   int
		err     string // "" for success
		log     string
	}{
		"500 of a terminal status":             {status, []answer{problem(500, "pvc", ""), problem(500, "pvc", "")}, 3, "", "trying again"},
		"gateway":                              {status, []answer{problem(502, "", ""), problem(503, "", ""), problem(504, "", "")}, 4, "", ""},
		"lost answer":                          {status, []answer{hangUp}, 2, "", ""},
		"throttled":                            {create, []answer{problem(429, "", "")}, 2, "", ""},
		"refused for good":                     {status, []answer{problem(422, "Job state must be one of", `{"status":["bad"]}`)}, 1, `IMS answered 422 T: Job state must be one of {"status":["bad"]}`, ""},
		"gone":                                 {status, []answer{problem(404, "no such job", "")}, 1, "no such job", ""},
		"deleted already":                      {remove, []answer{problem(503, "", ""), problem(404, "", "")}, 2, "", ""},
		"redirect":                             {status, []answer{func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }}, 1, "redirects are not followed", ""},
		"POST not acted on":                    {create, []answer{problem(503, "", ""), problem(503, "", ""), problem(503, "", ""), problem(503, "", "")}, 5, "", ""},
		"POST of unknown fate":                 {create, []answer{hangUp, problem(504, "", "")}, 3, "", "duplicate"},
		"POST of unknown fate again and again": {create, []answer{hangUp, hangUp, hangUp, hangUp}, 3, "reach IMS", "duplicate"},
		"not a UUID":                           {create, []answer{func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"id":"../other"}`) }}, 1, "not a UUID", ""},
		"not JSON":                             {status, []answer{func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `<html>`) }}, 1, "expected JSON", ""},
		"flood": {status, []answer{func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"id":"`)
			for range maxBody >> 20 {
				w.Write(make([]byte, 1<<20))
			}
			io.WriteString(w, `"}`)
		}}, 1, "larger than", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, client, log := newService(t, nil)
			s.answers = c.answers
			err := c.call(client)
			s.mu.Lock()
			defer s.mu.Unlock()
			if len(s.requests) != c.tries {
				t.Errorf("%d requests, want %d", len(s.requests), c.tries)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if !strings.Contains(log.String(), c.log) {
				t.Errorf("log without %q:\n%s", c.log, log)
			}
		})
	}
}

func TestTypedError(t *testing.T) {
	s, c, _ := newService(t, nil)
	s.answers = []answer{problem(404, "no \x1b[2Jsuch", "")}
	_, err := c.Job(t.Context(), jobID)
	var e *Error
	if !errors.As(err, &e) || e.Status != 404 || e.Op != "GET /jobs/"+jobID || !IsNotFound(err) || strings.Contains(e.Detail, "\x1b") {
		t.Errorf("%#v", err)
	}
}

// The budget ends the attempts, and the error says whom we could not reach.
func TestBudget(t *testing.T) {
	c, err := New(Config{BaseURL: "http://127.0.0.1:1", Timeout: 30 * time.Millisecond, RetryPause: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.SetStatus(t.Context(), jobID, Success)
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "IMS_URL") {
		t.Errorf("%v", err)
	}
}

func TestCancelled(t *testing.T) {
	s, c, _ := newService(t, func(c *Config) { c.RetryPause = time.Hour; c.Timeout = 24 * time.Hour })
	ctx, cancel := context.WithCancelCause(t.Context())
	told := errors.New("told to end")
	s.answers = []answer{func(w http.ResponseWriter, r *http.Request) {
		problem(503, "", "")(w, r)
		cancel(told)
	}}
	if _, err := c.SetStatus(ctx, jobID, Success); !errors.Is(err, told) && !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A token that expired during the user's days at work is replaced once, and
// asked for only when needed.
func TestTokens(t *testing.T) {
	s, c, log := newService(t, oauth)
	for range 2 {
		if _, err := c.Job(t.Context(), jobID); err != nil {
			t.Fatal(err)
		}
	}
	if s.tokens != 1 || len(s.requests) != 2 {
		t.Errorf("%d tokens for %d requests", s.tokens, len(s.requests))
	}
	s.valid = "revoked"
	if _, err := c.SetStatus(t.Context(), jobID, Success); err != nil {
		t.Fatal(err)
	}
	if want := []string{"GET", "GET", "PATCH", "PATCH"}; len(s.requests) != len(want) || s.tokens != 2 {
		t.Errorf("requests %v, %d tokens", s.requests, s.tokens)
	}
	s.answers = slices.Repeat([]answer{problem(401, "still not", "")}, 4)
	_, err := c.Job(t.Context(), jobID)
	if err == nil || !strings.Contains(err.Error(), "OAUTH_CONFIG_DIR") || len(s.requests) != 6 {
		t.Errorf("%v after %d requests, want one new token and the end", err, len(s.requests))
	}
	wantNoSecrets(t, log.String()+err.Error())
}

func TestTokenRefused(t *testing.T) {
	s, c, log := newService(t, func(c *Config) { oauth(c); c.OAuth.ClientSecret = "wrong" })
	_, err := c.Job(t.Context(), jobID)
	if err == nil || !strings.Contains(err.Error(), "unauthorized_client") || !strings.Contains(err.Error(), "client-secret") {
		t.Fatalf("%v", err)
	}
	if len(s.requests) != 0 {
		t.Errorf("called without a token: %v", s.requests)
	}
	wantNoSecrets(t, log.String()+err.Error())
}

// A secret that was replaced during the user's days at work is read again.
func TestTokenRenewed(t *testing.T) {
	secret, asked := "wrong", 0
	s, c, _ := newService(t, func(c *Config) {
		oauth(c)
		c.OAuth.ClientSecret = secret
		c.OAuth.Reread = func() (string, string) { asked++; return "client", secret }
	})
	if _, err := c.Job(t.Context(), jobID); err == nil {
		t.Fatal("a wrong secret let us in")
	}
	secret = "hush-hush"
	if _, err := c.Job(t.Context(), jobID); err != nil || len(s.requests) != 1 {
		t.Errorf("%v, %q", err, s.requests)
	}
	if _, err := c.Job(t.Context(), jobID); err != nil || asked != 2 {
		t.Errorf("%v, read %d times", err, asked)
	}
}

func TestTokenEndpointDown(t *testing.T) {
	_, c, log := newService(t, func(c *Config) {
		oauth(c)
		c.OAuth.Endpoint = "http://127.0.0.1:1/token?signature=hush-hush"
		c.Timeout = 30 * time.Millisecond
	})
	_, err := c.CreateImage(t.Context(), "n", "x86_64")
	if err == nil || !strings.Contains(err.Error(), "OAuth token") {
		t.Fatalf("%v", err)
	}
	if strings.Contains(log.String(), "duplicate") {
		t.Errorf("a POST that was never sent counts as ambiguous:\n%s", log)
	}
	wantNoSecrets(t, log.String()+err.Error())
}

func wantNoSecrets(t *testing.T, text string) {
	t.Helper()
	for _, secret := range []string{"hush-hush", "token-1", "token-2", "signature"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q in: %s", secret, text)
		}
	}
}

func TestCA(t *testing.T) {
	s := &service{t: t}
	srv := httptest.NewTLSServer(s)
	defer srv.Close()
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ file, err string }{
		"trusted": {ca, ""}, "unknown": {"", "CA_CERT"}, "missing": {dir + "/none", "CA_CERT"}, "not PEM": {"/proc/self/cmdline", "CA_CERT"},
	} {
		c2, err := New(Config{BaseURL: srv.URL, CAFile: c.file, Timeout: time.Minute})
		if err == nil {
			_, err = c2.Job(t.Context(), jobID)
		}
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(Config{BaseURL: "http://h", CAFile: dir + "/none"}); err != nil {
		t.Errorf("the template names a CA file also where nothing is https: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no scheme": {BaseURL: "api-gw/apis/ims"},
		"ftp":       {BaseURL: "ftp://h"},
		"bad token": {BaseURL: "http://h", OAuth: OAuth{Endpoint: "keycloak", ClientID: "a", ClientSecret: "b"}},
		"no secret": {BaseURL: "http://h", OAuth: OAuth{Endpoint: "http://h/t", ClientID: "a"}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParseStatus(t *testing.T) {
	for _, s := range Statuses {
		if got, err := ParseStatus(string(s)); err != nil || got != s {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "SUCCESS", "done"} {
		if _, err := ParseStatus(s); err == nil {
			t.Errorf("%q accepted", s)
		}
	}
}
