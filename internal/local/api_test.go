// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// ledger is a runner that runs nothing: it says where a cluster's pod would
// answer, and fails on demand as a cluster out of order does.
type ledger struct{ broken atomic.Bool }

func (l *ledger) err() error {
	if l.broken.Load() {
		return errors.New("cluster out of order")
	}
	return nil
}

func (l *ledger) Reserve(j Job) (ConnectionInfo, error) {
	return ConnectionInfo{
		CustomerAccess: Endpoint{j.ID + ".ims.cmn.shasta.local", 22},
		ClusterLocal:   Endpoint{j.KubernetesService + ".ims.svc.cluster.local", 22},
	}, l.err()
}
func (l *ledger) Start(Job, PodInput) error { return l.err() }
func (l *ledger) Release(string) error      { return l.err() }
func (l *ledger) Remove(string) error       { return l.err() }

// testAPI is an API over a real store, and the store.
func testAPI(t *testing.T, change func(*apiConfig)) (*api, *ledger, *s3Objects) {
	t.Helper()
	data := t.TempDir()
	store, err := startS3(t.Context(), data, "127.0.0.1:0", testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.stop)
	s, err := openState(filepath.Join(data, "state"))
	if err != nil {
		t.Fatal(err)
	}
	runner, objects := &ledger{}, newS3Objects(store)
	cfg := apiConfig{state: s, objects: objects, runner: runner, log: testLog(t), bucket: bucketImages,
		clientID: "admin-client", secret: "secret", tokenLife: time.Minute, trusted: true}
	if change != nil {
		change(&cfg)
	}
	return newAPI(cfg), runner, objects
}

// step is a line of testdata/transcript.json: a request with the answer the
// real service gave, or something to set up first.
type step struct {
	Setup   string `json:"setup"` // object, image, link, key, job, runner
	ID      string `json:"id"`
	Name    string `json:"name"`
	Key     string `json:"key"`
	Content string `json:"content"` // content type of the answer, or of an object to set up
	Fail    bool   `json:"fail"`

	Title  string   `json:"title"`
	Method string   `json:"method"`
	Path   string   `json:"path"`
	Type   string   `json:"type"`
	Body   *string  `json:"body"`
	Status int      `json:"status"`
	Allow  []string `json:"allow"`
	Length int      `json:"length"`
	Rows   int      `json:"rows"`
	Empty  bool     `json:"empty"`
	Answer any      `json:"answer"`
}

var (
	anyID   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	anyTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}`)
)

// player replays a transcript. ids maps the ids of the transcript to ours.
type player struct {
	t   *testing.T
	api *api
	ids map[string]string
}

// ours puts our ids in the place of the transcript's.
func (p *player) ours(s string) string {
	return anyID.ReplaceAllStringFunc(s, func(id string) string {
		if our, ok := p.ids[id]; ok {
			return our
		}
		return id
	})
}

func (p *player) do(method, path, kind, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://127.0.0.1:9100"+p.ours(path), strings.NewReader(p.ours(body)))
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	w := httptest.NewRecorder()
	p.api.ServeHTTP(w, r)
	return w
}

// must makes a record that the transcript does not show being made.
func (p *player) must(method, path, body, id string) {
	p.t.Helper()
	w := p.do(method, path, "application/json", body)
	var got struct{ ID string }
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code/100 != 2 {
		p.t.Fatalf("set up %s %s: %d %s", method, path, w.Code, w.Body)
	}
	p.ids[id] = got.ID
}

func (p *player) setup(s step, runner *ledger, store *s3Objects) {
	p.t.Helper()
	switch s.Setup {
	case "runner":
		runner.broken.Store(s.Fail)
	case "object":
		content := []byte(p.ours(s.Content))
		switch s.Content {
		case "@large":
			content = bytes.Repeat([]byte(" "), maxManifest)
		case "@invalid":
			content = []byte("{\"version\": \"\xff\xfe\"}")
		}
		if err := store.put(p.t.Context(), bucketImages, p.ours(s.Key), content); err != nil {
			p.t.Fatal(err)
		}
	case "image":
		p.must("POST", "/images", `{"name":"`+s.Name+`"}`, s.ID)
	case "link":
		p.must("PATCH", "/images/"+s.ID, `{"link":{"path":"s3://boot-images/`+s.ID+`/manifest.json","etag":"d089e01eef70332d22bb7a49370548f5","type":"s3"}}`, s.ID)
	case "key":
		p.must("POST", "/public-keys", `{"name":"k","public_key":"ssh-ed25519 AAAA lab"}`, s.ID)
	case "job":
		p.must("POST", "/jobs", *s.Body, s.ID)
	}
}

// normal is v with our ids for the transcript's, and one time for all.
func (p *player) normal(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		p.t.Fatal(err)
	}
	var out any
	if err := json.Unmarshal([]byte(anyTime.ReplaceAllString(p.ours(string(b)), "TIME")), &out); err != nil {
		p.t.Fatal(err)
	}
	return out
}

func (p *player) play(s step) {
	t := p.t
	t.Helper()
	body := ""
	if s.Body != nil {
		body = *s.Body
	}
	w := p.do(s.Method, s.Path, s.Type, body)
	var got any
	if w.Body.Len() > 0 {
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Errorf("answer is no JSON: %v: %s", err, w.Body)
			return
		}
	}
	if created, ok := got.(map[string]any); ok && w.Code == http.StatusCreated && s.Status == http.StatusCreated {
		p.ids[s.Answer.(map[string]any)["id"].(string)] = created["id"].(string)
	}
	if w.Code != s.Status || w.Header().Get("Content-Type") != s.Content {
		t.Errorf("answer is %d %s, the service's is %d %s\n%s", w.Code, w.Header().Get("Content-Type"), s.Status, s.Content, w.Body)
		return
	}
	if s.Allow != nil {
		if allow := strings.Split(w.Header().Get("Allow"), ", "); !slices.Equal(allow, s.Allow) {
			t.Errorf("Allow is %v, the service's is %v", allow, s.Allow)
		}
	}
	if s.Empty && w.Body.Len() > 0 {
		t.Errorf("answer has a body: %q", w.Body)
	}
	if rows, _ := got.([]any); s.Rows > 0 && len(rows) != s.Rows {
		t.Errorf("answer has %d rows, the service's has %d", len(rows), s.Rows)
	}
	if s.Answer == nil {
		return
	}
	want, have := p.normal(s.Answer), p.normal(got)
	if s.Length == 0 { // errors of a cluster are its own words
		if m, ok := have.(map[string]any); ok {
			delete(m, "errors")
		}
	} else if w.Body.Len() != s.Length {
		t.Errorf("answer has %d bytes, the service's has %d\n%s", w.Body.Len(), s.Length, w.Body)
	}
	if !reflect.DeepEqual(want, have) {
		t.Errorf("answer is\n%v\nthe service's is\n%v", have, want)
	}
}

// TestTranscript replays what the real service was asked, and wants its answers
// back: status, content type, body to the byte but for ids and times.
func TestTranscript(t *testing.T) {
	a, runner, store := testAPI(t, nil)
	b, err := os.ReadFile("testdata/transcript.json")
	if err != nil {
		t.Fatal(err)
	}
	var steps []step
	if err := json.Unmarshal(b, &steps); err != nil {
		t.Fatal(err)
	}
	p := &player{t: t, api: a, ids: map[string]string{}}
	for _, s := range steps {
		if s.Setup != "" {
			p.setup(s, runner, store)
			continue
		}
		t.Run(s.Title, func(t *testing.T) {
			p.t = t
			p.play(s)
		})
		p.t = t
	}
}

// softly is an image with artifacts, for the tests of deletion.
func softly(t *testing.T, p *player, store *s3Objects) (id string) {
	t.Helper()
	p.must("POST", "/images", `{"name":"soft"}`, "image")
	id = p.ids["image"]
	artifacts := ""
	for _, kind := range []string{"rootfs.squashfs", "kernel"} {
		key := id + "/" + kind
		if err := store.put(t.Context(), bucketImages, key, []byte(kind)); err != nil {
			t.Fatal(err)
		}
		artifacts += `,{"type":"application/vnd.cray.image.` + kind + `","md5":"x","link":{"path":"s3://boot-images/` + key + `","etag":"","type":"s3"}}`
	}
	data := `{"version":"1.0","artifacts":[` + artifacts[1:] + `]}`
	if err := store.put(t.Context(), bucketImages, id+"/manifest.json", []byte(data)); err != nil {
		t.Fatal(err)
	}
	p.must("PATCH", "/images/"+id, `{"link":{"path":"s3://boot-images/`+id+`/manifest.json","etag":"","type":"s3"}}`, "image")
	return id
}

// keysIn lists the objects of the image bucket.
func keysIn(t *testing.T, store *s3Objects) []string {
	t.Helper()
	c, err := store.bucket(bucketImages)
	if err != nil {
		t.Fatal(err)
	}
	list, err := c.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, o := range list {
		keys = append(keys, o.Key)
	}
	return keys
}

func TestSoftDeleteMovesObjects(t *testing.T) {
	a, _, store := testAPI(t, nil)
	p := &player{t: t, api: a, ids: map[string]string{}}
	id := softly(t, p, store)
	before := keysIn(t, store)
	if w := p.do("DELETE", "/v3/images/"+id, "", ""); w.Code != http.StatusNoContent {
		t.Fatal(w.Code, w.Body)
	}
	want := []string{"deleted/" + id + "/deleted_manifest.json"}
	for _, k := range before {
		want = append(want, "deleted/"+k)
	}
	slices.Sort(want)
	if got := keysIn(t, store); !slices.Equal(got, want) {
		t.Errorf("after the soft delete the bucket holds %v, want %v", got, want)
	}
	info, err := store.head(t.Context(), bucketImages, "deleted/"+id+"/kernel")
	if err != nil || info.md5 == "" {
		t.Errorf("a moved object lost its md5sum: %+v, %v", info, err)
	}
	if w := p.do("PATCH", "/v3/deleted/images/"+id, "application/json", `{"operation":"undelete"}`); w.Code != http.StatusNoContent {
		t.Fatal(w.Code, w.Body)
	}
	if got := keysIn(t, store); !slices.Equal(got, before) {
		t.Errorf("after the undelete the bucket holds %v, want %v", got, before)
	}
	image, _ := a.state.images.get(id)
	if image.Link == nil || image.Link.Path != "s3://boot-images/"+id+"/manifest.json" || image.Deleted != "" {
		t.Errorf("undeleted record: %+v", image)
	}
	p.do("DELETE", "/v3/images/"+id, "", "")
	if w := p.do("DELETE", "/v3/deleted/images/"+id, "", ""); w.Code != http.StatusNoContent {
		t.Fatal(w.Code, w.Body)
	}
	if got := keysIn(t, store); len(got) != 0 {
		t.Errorf("after the hard delete the bucket holds %v", got)
	}
}

func TestV2DeleteTakesObjectsUnlessToldNot(t *testing.T) {
	a, _, store := testAPI(t, nil)
	p := &player{t: t, api: a, ids: map[string]string{}}
	kept := softly(t, p, store)
	if w := p.do("DELETE", "/v2/images/"+kept+"?cascade=false", "", ""); w.Code != http.StatusNoContent {
		t.Fatal(w.Code, w.Body)
	}
	before := keysIn(t, store)
	if len(before) != 3 {
		t.Errorf("cascade=false left %v", before)
	}
	gone := softly(t, p, store)
	if w := p.do("DELETE", "/images/"+gone, "", ""); w.Code != http.StatusNoContent {
		t.Fatal(w.Code, w.Body)
	}
	if got := keysIn(t, store); !slices.Equal(got, before) {
		t.Errorf("the delete left %v, want %v", got, before)
	}
}

// TestAuthorization: a token that is no good is never accepted, and none at all
// only from this machine under a local name.
func TestAuthorization(t *testing.T) {
	a, _, _ := testAPI(t, func(c *apiConfig) { c.tokenLife = time.Hour })
	request := func(host, auth string) int {
		r := httptest.NewRequest("GET", "http://"+host+"/jobs", nil)
		if auth != "" {
			r.Header.Set("Authorization", auth)
		}
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		if w.Code == http.StatusUnauthorized && (w.Header().Get("Content-Type") != "application/problem+json" || w.Header().Get("WWW-Authenticate") == "") {
			t.Errorf("401 without problem or challenge: %v %s", w.Header(), w.Body)
		}
		return w.Code
	}
	token := func(id, secret, form string) (int, string) {
		r := httptest.NewRequest("POST", "http://127.0.0.1"+TokenPath, strings.NewReader(form))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.SetBasicAuth(id, secret)
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		var got struct {
			Token string `json:"access_token"`
		}
		if err := json.NewDecoder(w.Body).Decode(&got); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		return w.Code, got.Token
	}
	code, good := token("admin-client", "secret", "grant_type=client_credentials")
	if code != http.StatusOK || good == "" {
		t.Fatalf("no token: %d", code)
	}
	if code, _ := token("admin-client", "wrong", "grant_type=client_credentials"); code != http.StatusUnauthorized {
		t.Errorf("wrong secret: %d", code)
	}
	if code, _ := token("admin-client", "secret", "grant_type=password"); code != http.StatusBadRequest {
		t.Errorf("wrong grant: %d", code)
	}
	for _, c := range []struct {
		host, auth string
		want       int
	}{
		{"127.0.0.1:8080", "", 200},
		{"localhost", "", 200},
		{"[::1]:80", "", 200},
		{"rebound.example", "", 401},
		{"192.0.2.1", "", 401},
		{"rebound.example", "Bearer " + good, 200},
		{"127.0.0.1", "Bearer " + good, 200},
		{"127.0.0.1", "bearer " + good, 200},
		{"127.0.0.1", "Bearer nonsense", 401},
		{"127.0.0.1", "Bearer", 401},
		{"127.0.0.1", "Basic " + good, 401},
	} {
		if got := request(c.host, c.auth); got != c.want {
			t.Errorf("host %s, authorization %q: %d, want %d", c.host, c.auth, got, c.want)
		}
	}
	a.trusted = false
	if got := request("127.0.0.1", ""); got != http.StatusUnauthorized {
		t.Errorf("no token on an open listener: %d", got)
	}
	a.tokens.until[good] = time.Now().Add(-time.Second)
	if got := request("127.0.0.1", "Bearer "+good); got != http.StatusUnauthorized {
		t.Errorf("expired token: %d", got)
	}
}

func TestStateSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		s, err := openState(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.keys.put(PublicKey{ID: "k", Name: "n"}); err != nil {
			t.Fatal(err)
		}
	}
	s, err := openState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if keys := s.keys.all(); len(keys) != 1 || keys[0].Name != "n" {
		t.Errorf("keys after the restart: %+v", keys)
	}
	if err := os.WriteFile(filepath.Join(dir, "jobs.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openState(dir); err == nil || !strings.Contains(err.Error(), "jobs.json") {
		t.Errorf("damaged records: %v", err)
	}
}

func TestDataDirectoryIsLocked(t *testing.T) {
	dir := t.TempDir()
	first, err := lockData(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockData(dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second lock: %v", err)
	}
	first.Close()
	again, err := lockData(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
