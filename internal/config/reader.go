// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anmitsu/go-shlex"
)

// reader turns variables into values and collects what is wrong with them.
type reader struct {
	getenv   func(string) string
	problems []string
	warnings []string
}

func (r *reader) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	return &Error{Problems: r.problems}
}

func (r *reader) problem(name, text string) { r.problems = append(r.problems, name+" "+text) }

func (r *reader) warn(format string, args ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, args...))
}

func (r *reader) text(name, fallback string) string {
	if v := strings.TrimSpace(r.getenv(name)); v != "" {
		return v
	}
	return fallback
}

// userText is text without trimming: the name of an image may be any string.
func (r *reader) userText(names ...string) string {
	for _, name := range names {
		if v := r.getenv(name); strings.TrimSpace(v) != "" {
			return v
		}
	}
	return ""
}

func (r *reader) oneOf(name, fallback string, allowed ...string) string {
	v := r.text(name, fallback)
	if v == fallback || slices.Contains(allowed, v) {
		return v
	}
	r.problem(name, fmt.Sprintf("is %q, which is not known: set it to %s", v, strings.Join(allowed, " or ")))
	return fallback
}

var (
	falseWords = []string{"", "false", "off", "no", "f", "0", "n"}
	trueWords  = []string{"true", "on", "yes", "t", "1", "y"}
)

// boolean reads what Python's str(bool) writes, and the usual other spellings.
func (r *reader) boolean(name string) bool {
	v := strings.ToLower(r.text(name, ""))
	switch {
	case slices.Contains(trueWords, v):
		return true
	case !slices.Contains(falseWords, v):
		r.problem(name, fmt.Sprintf("is %q: set it to True or False", v))
	}
	return false
}

// level reads a Python logging level. A wrong one is no reason to lose a job.
func (r *reader) level(name string) slog.Level {
	switch v := strings.ToUpper(r.text(name, "INFO")); v {
	case "DEBUG", "NOTSET":
		return slog.LevelDebug
	case "INFO":
		return slog.LevelInfo
	case "WARNING", "WARN":
		return slog.LevelWarn
	case "ERROR", "CRITICAL", "FATAL":
		return slog.LevelError
	default:
		r.warn("%s is %q, which is not known; using INFO", name, v)
		return slog.LevelInfo
	}
}

// logFormat is like level: a wrong one is no reason to lose a job.
func (r *reader) logFormat(name string) string {
	switch v := strings.ToLower(r.text(name, LogText)); v {
	case LogText, LogJSON:
		return v
	default:
		r.warn("%s is %q, which is not known: set it to %s or %s; using %s", name, v, LogText, LogJSON, LogText)
		return LogText
	}
}

func (r *reader) seconds(name string, fallback time.Duration) time.Duration {
	v := r.text(name, "")
	if v == "" {
		return fallback
	}
	// The bounds keep the conversion to nanoseconds far from zero and from overflow.
	const least, most = 1e-3, 365 * 24 * 60 * 60
	s, err := strconv.ParseFloat(v, 64)
	if err != nil || !(s >= least && s <= most) {
		r.problem(name, fmt.Sprintf("is %q: set it to a number of seconds above 0, or unset it for %d", v, int(fallback.Seconds())))
		return fallback
	}
	return time.Duration(s * float64(time.Second))
}

func (r *reader) port(name string, fallback int) int {
	v := r.text(name, "")
	if v == "" {
		return fallback
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n == 0 {
		r.problem(name, fmt.Sprintf("is %q: set it to a TCP port between 1 and 65535", v))
		return fallback
	}
	return int(n)
}

// fileName is the name of a file in the image's boot directory, perhaps below it. What imageroot.FindBoot would refuse
// after the user's work is refused at the start.
func (r *reader) fileName(name, fallback string) string {
	v := r.text(name, fallback)
	if v != "" && (!filepath.IsLocal(v) || filepath.Clean(v) != v) {
		r.problem(name, fmt.Sprintf("is %q: set it to the name of a file in the image's boot directory, without .. and leading slash", v))
	}
	return v
}

func (r *reader) md5(name string) string {
	v := strings.ToLower(r.text(name, ""))
	if v == "" {
		return ""
	}
	if sum, err := hex.DecodeString(v); err != nil || len(sum) != 16 {
		r.problem(name, fmt.Sprintf("is %q: an MD5 sum has 32 hex digits; set it so, or leave it empty to skip the check", v))
		return ""
	}
	return v
}

// url checks that v, the value of name, is an absolute http or https URL.
func (r *reader) url(name, v string) string {
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		r.problem(name, fmt.Sprintf("is %q, not a URL: write it as http://HOST[:PORT]/… or https://…", v))
		return ""
	}
	return v
}

func (r *reader) words(name string) []string {
	words, err := shlex.Split(r.getenv(name), true)
	if err != nil {
		r.problem(name, fmt.Sprintf("cannot be split into words: %v: check its quotes", err))
	}
	return words
}

func (r *reader) s3(needed bool) S3 {
	s := S3{
		AccessKey: r.text("S3_ACCESS_KEY", ""),
		SecretKey: NewSecret(r.text("S3_SECRET_KEY", "")),
		Bucket:    r.text("S3_BUCKET", ""),
	}
	endpoint := "S3_ENDPOINT"
	if r.text(endpoint, "") == "" && r.text("S3_HOST", "") != "" {
		endpoint = "S3_HOST"
	}
	if v := r.text(endpoint, ""); v != "" {
		s.Endpoint = strings.TrimRight(r.url(endpoint, v), "/")
	} else if needed {
		r.problem("S3_ENDPOINT", "is not set: set it to the URL of the artifact store")
	}
	r.s3Verify(&s)
	if !needed {
		return s
	}
	for _, name := range []string{"S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET"} {
		if r.text(name, "") == "" {
			r.problem(name, "is not set: take it from the secret ims-s3-credentials or the job template")
		}
	}
	if !s.Verify {
		if strings.HasPrefix(s.Endpoint, "https:") {
			r.warn("S3_SSL_VALIDATE is off: the certificate of %s is not verified; set it to true or to a CA file", s.Endpoint)
		} else if s.Endpoint != "" {
			r.warn("S3_ENDPOINT %s is plain HTTP: nobody verifies or encrypts what goes there", s.Endpoint)
		}
	}
	return s
}

// s3Verify reads both names of one setting: the job template sets
// S3_SSL_VALIDATE, the legacy code read S3_SSL_VERIFY. When they disagree the
// stricter one holds.
func (r *reader) s3Verify(s *S3) {
	for _, name := range []string{"S3_SSL_VALIDATE", "S3_SSL_VERIFY"} {
		v := r.text(name, "")
		switch word := strings.ToLower(v); {
		case slices.Contains(falseWords, word):
		case slices.Contains(trueWords, word):
			s.Verify = true
		default:
			s.Verify = true
			pem, err := os.ReadFile(v)
			if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
				err = errors.New("no PEM certificate in the file")
			}
			if err != nil {
				r.problem(name, fmt.Sprintf("is %q: neither true, false nor a CA file: %v", v, err))
			} else if s.CAFile == "" {
				s.CAFile = v
			}
		}
	}
}

// oauth reads the mounted secret; OAUTH_CLIENT_* override its files one by one.
func (r *reader) oauth() OAuth {
	dir, given := r.text("OAUTH_CONFIG_DIR", ""), true
	if dir == "" {
		dir, given = DefaultOAuthDir, false
	}
	var absent []string
	value := func(variable, file string) (v, path string) {
		if v := r.text(variable, ""); v != "" {
			return v, ""
		}
		path = filepath.Join(dir, file)
		data, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.problem("OAUTH_CONFIG_DIR", err.Error()+": make the file readable")
		}
		if v = strings.TrimSpace(string(data)); v == "" {
			absent = append(absent, fmt.Sprintf("%s (or %s)", path, variable))
		}
		return v, path
	}
	var o OAuth
	var secret string
	o.Endpoint, _ = value("OAUTH_CLIENT_ENDPOINT", "endpoint")
	o.ClientID, o.idFile = value("OAUTH_CLIENT_ID", "client-id")
	secret, o.secretFile = value("OAUTH_CLIENT_SECRET", "client-secret")
	o.ClientSecret = NewSecret(secret)
	switch {
	case len(absent) == 3 && !given:
		r.warn("no OAuth2 credentials in %s: talking to IMS without a token", dir)
		return OAuth{}
	case len(absent) > 0:
		r.problem("OAUTH_CONFIG_DIR", fmt.Sprintf("lacks %s: mount the secret admin-client-auth there", strings.Join(absent, ", ")))
		return OAuth{}
	}
	o.Endpoint = r.url("OAUTH_CLIENT_ENDPOINT", o.Endpoint)
	return o
}
