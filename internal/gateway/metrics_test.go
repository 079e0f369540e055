// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// get fetches a URL of the metrics listener.
func get(t *testing.T, url string) (code int, body string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestMetrics(t *testing.T) {
	j := start(t, options{config: "MetricsListen 127.0.0.1:0"})
	url := regexp.MustCompile(`url=(http://\S+/metrics)`).FindStringSubmatch(j.log.String())[1]

	c := j.dial()
	execute(t, c, "head -c 100000 /dev/zero")
	execute(t, c, "exit 3")
	held := newSession(t, c)
	if err := held.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if err := held.Shell(); err != nil {
		t.Fatal(err)
	}
	if _, err := j.dialAs("root", newKey(t)); err == nil {
		t.Fatal("a stranger logged in")
	}
	stranger, err := net.Dial("tcp", j.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()

	want := []string{
		`sshd_build_info{goversion="go`, `sshd_connections_total 3`, `sshd_connections{state="authenticated"} 1`,
		`sshd_connections{state="unauthenticated"} 1`, `sshd_logins_total 1`, `sshd_auth_failures_total 1`,
		`sshd_sessions{kind="shell"} 1`, `sshd_sessions{kind="exec"} 0`, `sshd_sessions_total{kind="exec"} 2`,
		`sshd_forwarded_connections 0`, `sshd_exec_duration_seconds_count 2`, `sshd_volume_free_bytes `, `sshd_last_activity_seconds `,
	}
	var body string
	defer func() {
		if t.Failed() {
			t.Log(body)
		}
	}()
	eventually(t, "the metrics are these", func() bool {
		_, body = get(t, url)
		for _, w := range want {
			if !strings.Contains(body, "\n"+w) {
				return false
			}
		}
		return true
	})
	if problems, err := promlint.New(bytes.NewBufferString(body)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	if m := regexp.MustCompile(`(?m)^sshd_sent_bytes_total 10\d{4}$`); !m.MatchString(body) {
		t.Errorf("what was sent is not counted:\n%s", body)
	}
	for _, path := range []string{"", "/", "/debug/pprof/", "/metrics/x"} {
		if code, _ := get(t, strings.TrimSuffix(url, "/metrics")+path); code != http.StatusNotFound {
			t.Errorf("%q: %d", path, code)
		}
	}
	if r, err := http.Post(url, "text/plain", strings.NewReader("x")); err != nil || r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v, %v", r, err)
	} else {
		r.Body.Close()
	}
	j.cancel()
	<-j.ended
	if _, err := http.Get(url); err == nil {
		t.Error("metrics are served after the end")
	}
}
