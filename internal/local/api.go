// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// TokenPath is where the OAuth2 token endpoint answers: the path of the
// installation's own identity server.
const TokenPath = "/keycloak/realms/shasta/protocol/openid-connect/token"

// maxBody bounds a request body; records are a few hundred bytes.
const maxBody = 1 << 20

// objects is what the API needs of S3. The bucket and key come out of records,
// errors mean "cannot be had", whatever the reason.
type objects interface {
	head(ctx context.Context, bucket, key string) (objectInfo, error)
	// get reads an object of less than limit bytes; a larger one gives errTooLarge.
	get(ctx context.Context, bucket, key string, limit int64) ([]byte, error)
	put(ctx context.Context, bucket, key string, data []byte) error
	// copy keeps the metadata and returns the new ETag without quotes.
	copy(ctx context.Context, bucket, from, to string) (string, error)
	remove(ctx context.Context, bucket, key string) error
	presign(ctx context.Context, bucket, key string) (string, error)
}

type objectInfo struct {
	etag string // without quotes
	md5  string // the md5sum metadata, "" when there is none
}

// Runner turns job records into running pods. All methods may be called from
// several goroutines.
type Runner interface {
	// Reserve claims what the job needs before its record exists and tells
	// where its SSH container will answer.
	Reserve(job Job) (ConnectionInfo, error)
	// Start runs the pod. The record is stored by then.
	Start(job Job, in PodInput) error
	// Release takes the job's service and volume away, as happens when a job
	// reaches success or error. Nothing to take away is not an error.
	Release(jobID string) error
	// Remove takes everything of the job away, its processes included.
	Remove(jobID string) error
}

// PodInput is what the job template is filled with beside the record.
type PodInput struct {
	PublicKey   string // authorized_keys text
	DownloadURL string // presigned URL of the base image's rootfs
	DownloadMD5 string // may be empty
}

// apiConfig is what an api is made of.
type apiConfig struct {
	state    *state
	objects  objects
	runner   Runner
	log      *slog.Logger
	bucket   string // of images, "boot-images"
	clientID string
	secret   string
	// tokenLife bounds a token; the real installation's live minutes, too.
	tokenLife time.Duration
	// trusted is set when only this machine can reach the listener: requests
	// without a token are then let in.
	trusted bool
	// changed, if set, gets every job whose status was set; it must not block.
	changed func(Job)
}

// api is the http.Handler.
type api struct {
	apiConfig
	tokens tokens
	// imageOps makes changes of image records one at a time, S3 work included;
	// jobOps the same for jobs, so that a long S3 operation delays no status.
	imageOps, jobOps sync.Mutex
}

func newAPI(c apiConfig) *api { return &api{apiConfig: c} }

// call is one request on its way through.
type call struct {
	w    http.ResponseWriter
	r    *http.Request
	v3   bool
	id   string // of the record, "" on collections
	body any    // decoded JSON of POST and PATCH, filled by input
}

func (c *call) ctx() context.Context { return c.r.Context() }

// methods are the handlers of one path.
type methods map[string]func(*api, *call)

var (
	keyList       = methods{"GET": (*api).listKeys, "POST": (*api).createKey, "DELETE": (*api).deleteKeys}
	keyOne        = methods{"GET": (*api).getKey, "DELETE": (*api).deleteKey}
	imageList     = methods{"GET": (*api).listImages, "POST": (*api).createImage, "DELETE": (*api).deleteImages}
	imageOne      = methods{"GET": (*api).getImage, "PATCH": (*api).patchImage, "DELETE": (*api).deleteImage}
	jobList       = methods{"GET": (*api).listJobs, "POST": (*api).createJob, "DELETE": (*api).deleteJobs}
	jobOne        = methods{"GET": (*api).getJob, "PATCH": (*api).patchJob, "DELETE": (*api).deleteJob}
	oldKeyList    = methods{"GET": (*api).listDeletedKeys, "PATCH": (*api).undeleteKeys, "DELETE": (*api).purgeKeys}
	oldKeyOne     = methods{"GET": (*api).getDeletedKey, "PATCH": (*api).undeleteKeys, "DELETE": (*api).purgeKeys}
	oldImageList  = methods{"GET": (*api).listDeletedImages, "PATCH": (*api).undeleteImages, "DELETE": (*api).purgeImages}
	oldImageOne   = methods{"GET": (*api).getDeletedImage, "PATCH": (*api).undeleteImages, "DELETE": (*api).purgeImages}
	nodeList      = methods{"GET": func(a *api, c *call) { a.reply(c, []string{}) }}
	healthz       = methods{"GET": func(a *api, c *call) { a.answer(c.w, http.StatusOK, struct{}{}) }}
	version       = methods{"GET": func(a *api, c *call) { a.answer(c.w, http.StatusOK, map[string]string{"version": "Unknown"}) }}
	tokenEndpoint = methods{"POST": (*api).issueToken}
)

// route finds the methods of a path, without its version prefix.
func route(path []string, v3 bool) (m methods, id string) {
	if v3 && len(path) > 1 && path[0] == "deleted" {
		switch path[1] {
		case "public-keys":
			m = oldKeyList
			if len(path) == 3 {
				m = oldKeyOne
			}
		case "images":
			m = oldImageList
			if len(path) == 3 {
				m = oldImageOne
			}
		}
		path = path[1:]
	} else {
		lists := map[string]methods{"public-keys": keyList, "images": imageList, "jobs": jobList}
		ones := map[string]methods{"public-keys": keyOne, "images": imageOne, "jobs": jobOne}
		if v3 && len(path) == 1 && path[0] == "remote-build-nodes" {
			return nodeList, ""
		}
		m = lists[path[0]]
		if len(path) == 2 {
			m = ones[path[0]]
		}
	}
	switch {
	case len(path) == 1:
		return m, ""
	case len(path) == 2 && path[1] != "":
		return m, path[1]
	}
	return nil, ""
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	started := time.Now()
	rec := &recorder{ResponseWriter: w, status: http.StatusOK}
	defer func() {
		a.log.Debug("api request", "method", r.Method, "path", r.URL.Path, "status", rec.status, "took", time.Since(started))
	}()
	c := &call{w: rec, r: r}
	m, open := a.find(c)
	if !open && !a.authorized(c) {
		return
	}
	if m == nil {
		a.notFoundURL(c)
		return
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	if h := m[method]; h != nil {
		h(a, c)
		return
	}
	allow := []string{"OPTIONS"}
	for name := range m {
		allow = append(allow, name)
	}
	if m["GET"] != nil {
		allow = append(allow, "HEAD")
	}
	slices.Sort(allow)
	rec.Header().Set("Allow", strings.Join(allow, ", "))
	if method == http.MethodOptions {
		rec.Header().Set("Content-Type", "text/html; charset=utf-8")
		return
	}
	a.notAllowed(c)
}

// find returns the methods of the request's path, nil when there is none; open
// paths need no token.
func (a *api) find(c *call) (m methods, open bool) {
	switch c.r.URL.Path {
	case "/healthz/ready", "/healthz/live":
		return healthz, true
	case "/version":
		return version, true
	case TokenPath:
		return tokenEndpoint, true
	}
	path := strings.Split(strings.TrimPrefix(c.r.URL.Path, "/"), "/")
	switch {
	case path[0] == "v2" && len(path) > 1:
		path = path[1:]
	case path[0] == "v3" && len(path) > 1:
		path, c.v3 = path[1:], true
	}
	m, c.id = route(path, c.v3)
	return m, false
}

// authorized checks the bearer token. Without one, only a caller on this
// machine is let in, and only when it names this machine by a local name: a
// web page whose name was rebound to 127.0.0.1 does not.
func (a *api) authorized(c *call) bool {
	auth := c.r.Header.Get("Authorization")
	if auth == "" {
		host := c.r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		ip := net.ParseIP(strings.Trim(host, "[]"))
		if a.trusted && (host == "localhost" || ip != nil && ip.IsLoopback()) {
			return true
		}
		a.unauthorized(c, "A bearer token is required. Ask the token endpoint for one and re-run the request.")
		return false
	}
	scheme, token, _ := strings.Cut(auth, " ")
	if !strings.EqualFold(scheme, "Bearer") || !a.tokens.valid(token) {
		a.unauthorized(c, "The token is unknown or has expired. Ask the token endpoint for a new one and re-run the request.")
		return false
	}
	return true
}

// input reads the JSON body of a POST or PATCH; false when it has answered.
func (a *api) input(c *call) bool {
	kind, _, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if kind != "application/json" && !(strings.HasPrefix(kind, "application/") && strings.HasSuffix(kind, "+json")) {
		a.answer(c.w, http.StatusUnsupportedMediaType, message{"Did not attempt to load JSON data because the request Content-Type was not 'application/json'."})
		return false
	}
	b, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	if err != nil {
		a.answer(c.w, http.StatusRequestEntityTooLarge, message{"The data value transmitted exceeds the capacity limit."})
		return false
	}
	if c.body, err = decodeValue(b); err != nil {
		a.answer(c.w, http.StatusBadRequest, message{"The browser (or proxy) sent a request that this server could not understand."})
		return false
	}
	if empty(c.body) {
		a.problem(c, http.StatusBadRequest, "No input provided. Determine the specific information that is missing or invalid and then re-run the request with valid information.", nil)
		return false
	}
	return true
}

// validated reads the body and checks it against fields.
func (a *api) validated(c *call, fields []field) (map[string]any, bool) {
	if !a.input(c) {
		return nil, false
	}
	values, errs := load(c.body, fields)
	if errs != nil {
		a.invalid(c, errs)
		return nil, false
	}
	return values, true
}

// recorder keeps the status for the log.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}
