// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/s3test"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

const testJob = "221ce1dc-1886-460d-86d1-53ecd2260b73"

// fakeIMS keeps the records a job touches and checks a link as IMS does.
type fakeIMS struct {
	store func() *upload.S3 // to look at manifests

	mu       sync.Mutex
	images   map[string]map[string]any
	job      map[string]any
	statuses []string
	calls    []string
	// before, if set, sees each request and may answer it: a status above 0.
	before func(call string) int
}

// intercept sets before.
func (f *fakeIMS) intercept(before func(call string) int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = before
}

func (f *fakeIMS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var in map[string]any
	json.Unmarshal(body, &in)
	call := r.Method + " " + strings.Split(r.URL.Path, "/")[1]
	for _, k := range []string{"status", "resultant_image_id", "link"} {
		if v, ok := in[k]; ok {
			call += " " + k
			if s, ok := v.(string); ok && k == "status" {
				call += "=" + s
			}
		}
	}
	f.mu.Lock()
	f.calls = append(f.calls, call)
	before := f.before
	f.mu.Unlock()
	if before != nil {
		switch status := before(call); {
		case status < 0:
			panic(http.ErrAbortHandler)
		case status > 0:
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"title":"Trouble","detail":"on demand","status":%d}`, status)
			return
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	id := filepath.Base(r.URL.Path)
	switch {
	case r.Method == http.MethodPost && r.URL.Path == "/images":
		id = uuid.NewString()
		f.images[id] = map[string]any{"id": id, "name": in["name"], "arch": in["arch"], "link": nil, "metadata": map[string]any{}, "created": "2026-11-23T01:14:31.959522"}
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(f.images[id])
	case strings.HasPrefix(r.URL.Path, "/images/") && f.images[id] == nil, strings.HasPrefix(r.URL.Path, "/jobs/") && id != testJob:
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodDelete:
		delete(f.images, id)
		w.WriteHeader(http.StatusNoContent)
	case strings.HasPrefix(r.URL.Path, "/images/"):
		if err := f.checkLink(id, in["link"]); err != nil {
			w.WriteHeader(http.StatusUnprocessableEntity)
			fmt.Fprintf(w, `{"detail":%q}`, err)
			return
		}
		f.images[id]["link"] = in["link"]
		json.NewEncoder(w).Encode(f.images[id])
	default:
		if s, ok := in["status"].(string); ok {
			f.statuses = append(f.statuses, s)
		}
		for k, v := range in {
			f.job[k] = v
		}
		json.NewEncoder(w).Encode(f.job)
	}
}

// checkLink is the service's own check of a manifest.
func (f *fakeIMS) checkLink(id string, link any) error {
	l, _ := link.(map[string]any)
	s := f.store()
	prefix := "s3://" + s.Bucket() + "/"
	r, info, err := s.Get(context.Background(), strings.TrimPrefix(fmt.Sprint(l["path"]), prefix))
	if err != nil {
		return err
	}
	defer r.Close()
	var m struct {
		Version   string         `json:"version"`
		Artifacts []upload.Entry `json:"artifacts"`
	}
	if err := json.NewDecoder(r).Decode(&m); err != nil || m.Version != "1.0" || info.ETag != l["etag"] || l["type"] != "s3" {
		return fmt.Errorf("manifest of %s: %v, link %v", id, err, l)
	}
	rootfs := 0
	for _, a := range m.Artifacts {
		info, err := s.Head(context.Background(), strings.TrimPrefix(a.Link.Path, prefix))
		if err != nil || info.ETag != a.Link.ETag || info.Metadata["md5sum"] != a.MD5 {
			return fmt.Errorf("artifact %v: %v", a, err)
		}
		if a.Type == "application/vnd.cray.image.rootfs.squashfs" {
			rootfs++
		}
	}
	if rootfs != 1 {
		return errors.New("not exactly one rootfs")
	}
	return nil
}

// hookStore lets a test act in the middle of an upload.
type hookStore struct {
	*upload.S3
	put   func(key string, acked int64)
	ahead func(*upload.Base) // what was sent before the image was whole; nil: nothing
}

func (h hookStore) SendAhead(ctx context.Context, key string, body io.ReaderAt, p *upload.Pending) *upload.Base {
	b := h.S3.SendAhead(ctx, key, body, p)
	if h.ahead != nil {
		h.ahead(b)
	}
	return b
}

func (h hookStore) Put(ctx context.Context, o upload.Object) (upload.Info, error) {
	if h.put == nil {
		return h.S3.Put(ctx, o)
	}
	h.put(o.Key, 0)
	report := o.Progress
	o.Progress = func(n int64) {
		h.put(o.Key, n)
		if report != nil {
			report(n)
		}
	}
	return h.S3.Put(ctx, o)
}

// pod is a job's surroundings: volume, shared directories, IMS, S3, sshd.
type pod struct {
	t      *testing.T
	dir    string
	cfg    config.Sidecar
	ims    *fakeIMS
	imsURL string
	s3     *s3test.Server
	store  hookStore
	stdout bytes.Buffer
	log    lockedBuffer
	tune   tuning
	deaf   bool // sshd hangs up on everybody

	listener net.Listener

	user func() // what the user does once waiting_on_user is set; nil: touches complete
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newPod(t *testing.T, lines ...string) *pod {
	t.Helper()
	p := &pod{t: t, dir: t.TempDir(), s3: s3test.Start(t), tune: tuning{probeTimeout: 2 * time.Minute}}
	if len(lines) == 0 {
		lines = []string{"file boot/vmlinuz 0644 kernel", "symlink boot/initrd /boot/initrd-6.1", "file boot/initrd-6.1 0644 initrd"}
	}
	lines = append([]string{"dir tmp 1777", "dir etc", "file etc/hostname 0644 image", "data opt/payload 0644 13000000 random:7"}, lines...)
	for _, d := range []string{"volume/image-root", "ims", "ca/..data_tmp"} {
		if err := os.MkdirAll(filepath.Join(p.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree.Make(t, filepath.Join(p.dir, "volume/image-root"), lines...)
	tree.Make(t, p.dir, "file ca/certificate_authority.crt 0644 PEM", "file resolv.conf 0644 nameserver 127.0.0.1", "file secrets/client-secret 0600 hush-hush")
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p.write("keys", "not a key\n"+string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	p.ims = &fakeIMS{images: map[string]map[string]any{}, job: map[string]any{"id": testJob, "status": "creating", "resultant_image_id": nil}}
	srv := httptest.NewServer(p.ims)
	t.Cleanup(srv.Close)
	p.imsURL = srv.URL
	p.cfg = p.testConfig().sidecar()
	p.store.S3 = p.newStore()
	p.ims.store = func() *upload.S3 { return p.newStore() }
	return p
}

// testConfig is what a child process of a test needs to know.
type testConfig struct {
	Dir, IMS, S3, Bucket string
	SSHPort              int
	Panic                bool // in the middle of the upload, in a goroutine of its own
}

func (c testConfig) sidecar() config.Sidecar {
	parent := filepath.Join(c.Dir, "volume")
	return config.Sidecar{
		Common:      config.Common{JobID: testJob, Action: config.ActionCustomize, Parent: parent, Jailed: true, Arch: config.ArchX86, IMSDir: filepath.Join(c.Dir, "ims")},
		SSHPort:     c.SSHPort,
		ArchiveName: "a/b ü", RootDir: filepath.Join(parent, "image-root"), BootDir: "boot", KernelName: "vmlinuz", InitrdName: "initrd", ParametersName: "kernel-parameters",
		S3:     config.S3{Endpoint: c.S3, AccessKey: s3test.AccessKey, SecretKey: config.NewSecret(s3test.SecretKey), Bucket: c.Bucket, Verify: true},
		IMSURL: c.IMS, Timeout: patience, CADir: filepath.Join(c.Dir, "ca"), AuthorizedKeys: filepath.Join(c.Dir, "keys"), ResolvConf: filepath.Join(c.Dir, "resolv.conf"),
	}
}

// patience is for services that are there, however slow the machine.
const patience = time.Minute

// impatient is for a job that one of them is to fail: it does not wait for long.
func (p *pod) impatient() {
	p.cfg.Timeout = time.Second
	p.store.S3 = p.newStore()
}

func storeFor(cfg config.Sidecar) (*upload.S3, error) {
	return upload.NewS3(upload.S3Config{Endpoint: cfg.S3.Endpoint, AccessKey: cfg.S3.AccessKey, SecretKey: cfg.S3.SecretKey.Reveal(),
		Bucket: cfg.S3.Bucket, Verify: true, PartSize: 5 << 20, Budget: cfg.Timeout, RetryPause: 5 * time.Millisecond})
}

func clientFor(cfg config.Sidecar) (*ims.Client, error) {
	return ims.New(ims.Config{BaseURL: cfg.IMSURL, Timeout: cfg.Timeout, RetryPause: 5 * time.Millisecond})
}

func (p *pod) newStore() *upload.S3 {
	s, err := storeFor(p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *pod) write(name, content string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) flags() signalfile.Set {
	return signalfile.Set{Parent: p.cfg.Parent, Root: p.cfg.ImageRoot(), Jailed: p.cfg.Jailed}
}

// run runs the job in this process with an sshd beside it.
func (p *pod) run(ctx context.Context) int {
	p.t.Helper()
	defer p.sshd()()
	return p.runAlone(ctx)
}

func (p *pod) runAlone(ctx context.Context) int {
	p.t.Helper()
	client, err := clientFor(p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	return Run(ctx, p.cfg, Deps{Stdout: &p.stdout, Stderr: io.Discard, IMS: client, Store: p.store, tune: p.tune,
		Log: slog.New(slog.NewTextHandler(&p.log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
}

// sshd plays the other container: it serves logins once ready is there, with
// the configuration it finds, and hands over when the user's flag appears. It
// also plays the user. The function it returns ends it.
func (p *pod) sshd() (stop func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	p.listener = l
	p.cfg.SSHPort = l.Addr().(*net.TCPAddr).Port
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	log := slog.New(slog.DiscardHandler)
	wg.Go(func() {
		defer l.Close()
		f := p.flags()
		if _, err := f.Wait(ctx, log, signalfile.Ready); err != nil {
			return
		}
		wg.Go(func() { p.serve(l) })
		if !p.awaitStatus(ctx, "waiting_on_user") {
			return
		}
		p.checkShared()
		if p.user != nil {
			p.user()
		} else if err := f.Touch(signalfile.Complete); err != nil {
			p.t.Error(err)
		}
		if _, err := f.Wait(ctx, log, signalfile.Complete, signalfile.Failed); err != nil {
			return
		}
		l.Close()
		if err := errors.Join(f.Remove(signalfile.Complete), f.Touch(signalfile.Exiting)); err != nil {
			p.t.Error(err)
		}
	})
	return func() {
		cancel()
		l.Close()
		wg.Wait()
	}
}

// awaitStatus looks at the fake IMS until it was told a status.
func (p *pod) awaitStatus(ctx context.Context, status string) bool {
	for {
		p.ims.mu.Lock()
		found := slices.Contains(p.ims.statuses, status)
		p.ims.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// checkShared looks at what sshd is given, when the user may come.
func (p *pod) checkShared() {
	keys, err := os.ReadFile(filepath.Join(p.cfg.IMSDir, "authorized_keys"))
	if err != nil || bytes.Contains(keys, []byte(probeComment)) || bytes.Contains(keys, []byte("not a key")) || !bytes.HasPrefix(keys, []byte("ssh-ed25519 ")) {
		p.t.Errorf("authorized_keys for the user: %q, %v", keys, err)
	}
	conf, err := os.ReadFile(filepath.Join(p.cfg.IMSDir, "sshd_config"))
	want := fmt.Sprintf("Port %d\nLogLevel INFO\nPermitRootLogin yes\nPubkeyAuthentication yes\nAuthorizedKeysFile %s/authorized_keys\nPasswordAuthentication no\nChallengeResponseAuthentication no\nSubsystem sftp internal-sftp\n", p.cfg.SSHPort, p.cfg.IMSDir)
	if err != nil || string(conf) != want {
		p.t.Errorf("sshd_config: %q, %v", conf, err)
	}
}

// serve is an SSH server that knows one command.
func (p *pod) serve(l net.Listener) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	signer, _ := ssh.NewSignerFromKey(key)
	conf := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		keys, err := os.ReadFile(filepath.Join(p.cfg.IMSDir, "authorized_keys"))
		for rest := keys; err == nil; {
			var known ssh.PublicKey
			if known, _, _, rest, err = ssh.ParseAuthorizedKey(rest); err == nil && bytes.Equal(known.Marshal(), key.Marshal()) {
				return nil, nil
			}
		}
		return nil, errors.New("unknown key")
	}}
	conf.AddHostKey(signer)
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if p.deaf {
			c.Close()
			continue
		}
		go func() {
			defer c.Close()
			_, channels, requests, err := ssh.NewServerConn(c, conf)
			if err != nil {
				return
			}
			go ssh.DiscardRequests(requests)
			for nc := range channels {
				ch, reqs, err := nc.Accept()
				if err != nil {
					return
				}
				for req := range reqs {
					req.Reply(req.Type == "exec", nil)
					if req.Type == "exec" {
						ch.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
						ch.Close()
					}
				}
			}
		}()
	}
}

// outcome is what a finished job must have left, and nothing else.
type outcome struct {
	exit   int
	status string // last one set
	images int    // image records
	errors string // in the failure document; "" for a success or none
	silent bool   // no document on stdout

	// crashed allows for parts that versitygw was still storing when the upload
	// of a dead process was aborted. No request can show or remove them.
	crashed bool
}

func (p *pod) check(exit int, want outcome) {
	p.t.Helper()
	p.ims.mu.Lock()
	defer p.ims.mu.Unlock()
	last := ""
	if n := len(p.ims.statuses); n > 0 {
		last = p.ims.statuses[n-1]
	}
	if exit != want.exit || last != want.status || len(p.ims.images) != want.images {
		p.t.Errorf("exit %d, status %q of %v, %d image records; want %+v", exit, last, p.ims.statuses, len(p.ims.images), want)
	}
	if n := len(p.ims.calls); n > 0 && p.ims.calls[n-1] != "PATCH jobs status="+want.status {
		p.t.Errorf("the last call is %q", p.ims.calls[n-1])
	}
	p.checkStdout(want)
	p.checkStore(want)
	p.checkVolume()
	if log := p.log.String(); strings.Contains(log, s3test.SecretKey) || strings.Contains(log, "hush-hush") {
		p.t.Errorf("a secret is in the log:\n%s", log)
	}
	if p.t.Failed() {
		p.t.Logf("log:\n%s", p.log.String())
	}
}

func (p *pod) checkStdout(want outcome) {
	p.t.Helper()
	d := json.NewDecoder(&p.stdout)
	var doc map[string]any
	err := d.Decode(&doc)
	if want.silent {
		if err != io.EOF {
			p.t.Errorf("stdout holds %v (%v), want nothing", doc, err)
		}
		return
	}
	if err != nil || d.More() {
		p.t.Errorf("stdout is not one JSON document: %v", err)
		return
	}
	msg, _ := doc["error"].(string)
	if want.images > 0 {
		if doc["result"] != "success" || doc["ims_image_record"] == nil || doc["ims_job_record"] == nil {
			p.t.Errorf("result %v", doc)
		}
	} else if doc["result"] != "failure" || len(doc) != 2 || !strings.Contains(msg, want.errors) || msg == "" {
		p.t.Errorf("result %v, want an error with %q", doc, want.errors)
	}
}

// checkStore finds objects of the registered images only. The server's data
// directory is looked at directly, for the test may have killed it.
func (p *pod) checkStore(want outcome) {
	p.t.Helper()
	var files []string
	err := filepath.WalkDir(p.s3.Dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == ".vgwlocks" { // the server's own
			return filepath.SkipDir
		}
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(p.s3.Dir, path)
			files = append(files, rel)
		}
		return err
	})
	if err != nil {
		p.t.Error(err)
	}
	files = slices.DeleteFunc(files, func(f string) bool {
		id := strings.Split(f, "/")
		return len(id) > 2 && (p.ims.images[id[1]] != nil || want.crashed && id[1] == ".sgwtmp")
	})
	if len(files) != 0 {
		p.t.Errorf("left in the store: %v", files)
	}
}

// checkVolume finds nothing on the volume that the job should have taken away.
func (p *pod) checkVolume() {
	p.t.Helper()
	entries, err := os.ReadDir(p.cfg.Parent)
	if err != nil {
		p.t.Error(err)
	}
	for _, e := range entries {
		if slices.Contains(layout.Names(), e.Name()) {
			continue // the init container's
		}
		if !slices.Contains([]string{"image-root", "build", "ready", "failed", "build_failed", "pod_error", "elsewhere"}, e.Name()) {
			p.t.Errorf("left on the volume: %s", e.Name())
		}
	}
	if keys, err := os.ReadFile(filepath.Join(p.cfg.IMSDir, "authorized_keys")); err == nil && bytes.Contains(keys, []byte(probeComment)) {
		p.t.Error("the probe's key is still authorized")
	}
}
