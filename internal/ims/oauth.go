// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// OAuth holds client credentials (RFC 6749 §4.4), sent to Endpoint with HTTP
// Basic authentication.
type OAuth struct {
	Endpoint     string // token URL
	ClientID     string
	ClientSecret string

	// Reread, if not nil, returns the id and the secret anew. It is asked when the endpoint refuses those it was given.
	Reread func() (id, secret string)
}

// tokens hands out the current access token. Jobs wait for their user for
// days, so a token is asked for when it is needed, never ahead; the endpoint
// issues no refresh tokens.
type tokens struct {
	cfg    clientcredentials.Config
	reread func() (id, secret string)
	http   *http.Client

	mu  sync.Mutex
	tok *oauth2.Token
}

func newTokens(o OAuth, client *http.Client) (*tokens, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, errors.New("OAuth endpoint: not an http(s) URL; check the file endpoint in OAUTH_CONFIG_DIR or OAUTH_CLIENT_ENDPOINT")
	}
	if o.ClientID == "" || o.ClientSecret == "" {
		return nil, errors.New("OAuth client: id or secret is empty; check the files client-id and client-secret in OAUTH_CONFIG_DIR")
	}
	return &tokens{
		cfg: clientcredentials.Config{
			ClientID: o.ClientID, ClientSecret: o.ClientSecret, TokenURL: o.Endpoint,
			AuthStyle: oauth2.AuthStyleInHeader,
		},
		reread: o.Reread,
		http:   client,
	}, nil
}

func (t *tokens) get(ctx context.Context) (*oauth2.Token, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.tok.Valid() {
		return t.tok, nil
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, t.http)
	tok, err := t.cfg.Token(ctx)
	if err != nil && t.renewed() {
		tok, err = t.cfg.Token(ctx)
	}
	if err != nil {
		return nil, newTokenError(err)
	}
	t.tok = tok
	return tok, nil
}

// renewed takes over credentials that have changed since; the caller holds mu.
func (t *tokens) renewed() bool {
	if t.reread == nil {
		return false
	}
	id, secret := t.reread()
	if id == "" || secret == "" || id == t.cfg.ClientID && secret == t.cfg.ClientSecret {
		return false
	}
	t.cfg.ClientID, t.cfg.ClientSecret = id, secret
	return true
}

// forget drops a token the service refused.
func (t *tokens) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tok = nil
}

// tokenError says why no token could be had, without repeating what the
// endpoint sent: its body is not ours to log.
type tokenError struct {
	text string
	err  error
}

func (e *tokenError) Error() string { return e.text }
func (e *tokenError) Unwrap() error { return e.err }

func newTokenError(err error) error {
	var re *oauth2.RetrieveError
	if !errors.As(err, &re) {
		err = withoutQuery(err)
		return &tokenError{fmt.Sprintf("get an OAuth token: %v; check the endpoint in OAUTH_CONFIG_DIR", err), err}
	}
	text := fmt.Sprintf("get an OAuth token: endpoint answered %d", re.Response.StatusCode)
	if re.ErrorCode != "" {
		text += " " + printable(re.ErrorCode)
	}
	if status := re.Response.StatusCode; status < 500 && status != http.StatusTooManyRequests {
		text += "; check client-id, client-secret and endpoint in OAUTH_CONFIG_DIR"
		return &tokenError{text, &permanentError{errors.New("token refused")}}
	}
	return &tokenError{text, nil}
}
