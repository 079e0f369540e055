// SPDX-License-Identifier: Apache-2.0

package local

import (
	"crypto/rand"
	"crypto/subtle"
	"maps"
	"net/http"
	"sync"
	"time"
)

// tokens are the bearer tokens alive. They are not kept over a restart: clients
// ask again on 401.
type tokens struct {
	mu    sync.Mutex
	until map[string]time.Time
}

func (t *tokens) issue(life time.Duration) string {
	token := rand.Text()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.until == nil {
		t.until = map[string]time.Time{}
	}
	maps.DeleteFunc(t.until, func(_ string, until time.Time) bool { return time.Now().After(until) })
	t.until[token] = time.Now().Add(life)
	return token
}

func (t *tokens) valid(token string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	until, known := t.until[token]
	return known && time.Now().Before(until)
}

// oauthError is an error answer of RFC 6749, section 5.2.
type oauthError struct {
	Error       string `json:"error"`
	Description string `json:"error_description"`
}

// issueToken is the client credentials grant of RFC 6749, section 4.4, with
// HTTP Basic authentication. No refresh token is issued.
func (a *api) issueToken(c *call) {
	c.w.Header().Set("Cache-Control", "no-store")
	c.r.Body = http.MaxBytesReader(c.w, c.r.Body, maxBody)
	if err := c.r.ParseForm(); err != nil {
		a.answer(c.w, http.StatusBadRequest, oauthError{"invalid_request", "the form cannot be read"})
		return
	}
	id, secret, ok := c.r.BasicAuth()
	idOK := subtle.ConstantTimeCompare([]byte(id), []byte(a.clientID))
	secretOK := subtle.ConstantTimeCompare([]byte(secret), []byte(a.secret))
	if !ok || idOK&secretOK != 1 {
		c.w.Header().Set("WWW-Authenticate", `Basic realm="imslocal"`)
		a.answer(c.w, http.StatusUnauthorized, oauthError{"invalid_client", "unknown client or wrong secret"})
		return
	}
	if grant := c.r.PostForm.Get("grant_type"); grant != "client_credentials" {
		a.answer(c.w, http.StatusBadRequest, oauthError{"unsupported_grant_type", "only client_credentials is known"})
		return
	}
	a.answer(c.w, http.StatusOK, struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
		TokenType   string `json:"token_type"`
	}{a.tokens.issue(a.tokenLife), int(a.tokenLife.Seconds()), "Bearer"})
}
