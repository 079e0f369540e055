// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// Error is an answer of the service that is not a success.
type Error struct {
	Op     string          // method and path, without query: "PATCH /jobs/<id>"
	Status int             // HTTP status
	Title  string          // problem+json title, or the status text
	Detail string          // the service's explanation, cut to a readable length
	Errors json.RawMessage // field name to list of complaints, nil when absent
}

// Error names the call, the status, the service's words and a next step.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: IMS answered %d %s", e.Op, e.Status, e.Title)
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	if len(e.Errors) > 0 {
		b.WriteString(" " + string(e.Errors))
	}
	if hint := hintFor(e.Status); hint != "" {
		b.WriteString("; " + hint)
	}
	return b.String()
}

func hintFor(status int) string {
	switch {
	case status == http.StatusUnauthorized:
		return "check the OAuth client's id, secret and endpoint (OAUTH_CONFIG_DIR)"
	case status == http.StatusForbidden:
		return "the OAuth client may not do this; check its role"
	case status >= 300 && status < 400:
		return "redirects are not followed; point IMS_URL at the service itself"
	}
	return ""
}

// IsNotFound reports whether the service said that the record does not exist.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

const maxDetail = 2048

// newError reads what it can from an error body: problem+json, the plain
// {"message": …} of the web framework, or text.
func newError(op string, resp *http.Response, body []byte) *Error {
	e := &Error{Op: op, Status: resp.StatusCode, Title: http.StatusText(resp.StatusCode)}
	var problem struct {
		Title   string          `json:"title"`
		Detail  string          `json:"detail"`
		Message json.RawMessage `json:"message"`
		Errors  json.RawMessage `json:"errors"`
	}
	if json.Unmarshal(body, &problem) != nil {
		if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
			e.Detail = printable(string(body))
		}
		return e
	}
	if problem.Title != "" {
		e.Title = printable(problem.Title)
	}
	e.Detail = printable(problem.Detail)
	if e.Detail == "" && len(problem.Message) > 0 {
		e.Detail = printable(strings.Trim(string(problem.Message), `"`))
	}
	if len(problem.Errors) > 0 && len(problem.Errors) <= maxDetail && string(problem.Errors) != "null" {
		e.Errors = problem.Errors
	}
	return e
}

// printable keeps the service's words from moving a terminal's cursor or
// filling a log.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.TrimSpace(s)
	if len(s) > maxDetail {
		s = strings.ToValidUTF8(s[:maxDetail], "") + "…"
	}
	return s
}

// withoutQuery drops the URL's query from a net/http error: queries may carry
// signatures, and errors end up in logs.
func withoutQuery(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	return ue.Err
}
