// SPDX-License-Identifier: Apache-2.0

package local

import "net/http"

// message is how the service's framework, as opposed to the service, answers.
type message struct {
	Message string `json:"message"`
}

// problem is an answer of type application/problem+json (RFC 7807).
type problem struct {
	Status int    `json:"status"`
	Title  string `json:"title"`
	Detail string `json:"detail,omitempty"`
	Errors any    `json:"errors,omitempty"`
}

// answer sends v with its members in order and a newline behind it.
func (a *api) answer(w http.ResponseWriter, status int, v any) {
	b, err := encode(v, false)
	a.send(w, status, "application/json", append(b, '\n'), err)
}

// reply sends v with sorted members, as GET and PATCH do.
func (a *api) reply(c *call, v any) {
	s, err := sorted(v)
	if err != nil {
		a.internal(c, err)
		return
	}
	b, err := encode(s, true)
	a.send(c.w, http.StatusOK, "application/json", append(b, '\n'), err)
}

func (a *api) sendProblem(c *call, p problem) {
	b, err := encode(p, false)
	a.send(c.w, p.Status, "application/problem+json", b, err)
}

func (a *api) problem(c *call, status int, detail string, errs any) {
	a.sendProblem(c, problem{Status: status, Title: http.StatusText(status), Detail: detail, Errors: errs})
}

func (a *api) send(w http.ResponseWriter, status int, kind string, body []byte, err error) {
	if err != nil {
		a.log.Error("encode answer", "error", err)
		status, kind, body = http.StatusInternalServerError, "application/json", []byte("{\"message\": \"Internal Server Error\"}\n")
	}
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil {
		a.log.Debug("send answer", "error", err)
	}
}

// noContent answers 204, which the service gives a content type and no body.
func (a *api) noContent(c *call) {
	c.w.Header().Set("Content-Type", "application/json")
	c.w.WriteHeader(http.StatusNoContent)
}

// internal is the answer to what the service does not expect.
func (a *api) internal(c *call, err error) {
	a.log.Error("api request", "method", c.r.Method, "path", c.r.URL.Path, "error", err)
	a.answer(c.w, http.StatusInternalServerError, message{"Internal Server Error"})
}

func (a *api) notFoundURL(c *call) {
	a.problem(c, http.StatusNotFound, "The requested URL was not found on the server. If you entered the URL manually please check your spelling and try again.", nil)
}

func (a *api) notFound(c *call) {
	a.problem(c, http.StatusNotFound, "Requested resource does not exist. Re-run request with valid ID.", nil)
}

func (a *api) invalid(c *call, errs map[string]any) {
	a.problem(c, http.StatusUnprocessableEntity, "Input data was understood, but failed validation. Re-run request with valid input values for the fields indicated in the response.", errs)
}

func (a *api) notAllowed(c *call) {
	const text = "The method is not allowed for the requested URL."
	a.answer(c.w, http.StatusMethodNotAllowed, struct {
		Message string `json:"message"`
		Status  int    `json:"status"`
		Title   string `json:"title"`
		Detail  string `json:"detail"`
	}{text, http.StatusMethodNotAllowed, http.StatusText(http.StatusMethodNotAllowed), text})
}

func (a *api) unauthorized(c *call, detail string) {
	c.w.Header().Set("WWW-Authenticate", `Bearer realm="imslocal"`)
	a.problem(c, http.StatusUnauthorized, detail, nil)
}
