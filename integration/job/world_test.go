// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

const bucket = "boot-images"

// world is a running `imslocal serve` and clients of it.
type world struct {
	bin, data  string
	url, s3URL string
	ims        *ims.Client
	store      *upload.S3
	s3         *s3.Client

	accessKey, secretKey   string
	clientID, clientSecret string

	abandoned sync.Map // ids of images whose objects no job could remove

	cmd  *exec.Cmd
	log  string // file
	done chan error
}

// startWorld runs an installation on a data directory, a new one or one of a
// world that was stopped. The caller stops it.
func startWorld(t *testing.T, bin, data string) *world {
	t.Helper()
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	w := &world{bin: bin, data: data, log: data + ".log", done: make(chan error, 1)}
	out, err := os.Create(w.log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w.cmd = exec.Command(filepath.Join(bin, "imslocal"), "serve", "--data", data, "--listen", "127.0.0.1:0", "--s3-listen", "127.0.0.1:0")
	w.cmd.Stdout, w.cmd.Stderr = out, out
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { w.done <- w.cmd.Wait() }()
	running := false
	defer func() {
		if !running {
			w.stop()
		}
	}()
	eventually(t, "the API's address in "+w.log, func() bool {
		select {
		case err := <-w.done:
			t.Fatalf("imslocal serve: %v\n%s", err, w.output(t))
		default:
		}
		w.url, w.s3URL = "", ""
		for _, line := range strings.Split(w.output(t), "\n") {
			if strings.Contains(line, `msg="IMS API runs"`) {
				w.url = attribute(line, "url")
			}
			if strings.Contains(line, `msg="S3 server runs"`) {
				w.s3URL = attribute(line, "endpoint")
			}
		}
		return w.url != "" && w.s3URL != ""
	})
	w.connect(t)
	running = true
	return w
}

// connect makes the clients.
func (w *world) connect(t *testing.T) {
	t.Helper()
	var keys struct {
		AccessKey string `json:"access_key"`
		SecretKey string `json:"secret_key"`
	}
	var cluster struct {
		ClientID     string `json:"client_id"`
		ClientSecret string `json:"client_secret"`
	}
	readJSON(t, filepath.Join(w.data, "s3-credentials"), &keys)
	readJSON(t, filepath.Join(w.data, "cluster-secrets"), &cluster)
	w.accessKey, w.secretKey = keys.AccessKey, keys.SecretKey
	w.clientID, w.clientSecret = cluster.ClientID, cluster.ClientSecret
	var err error
	w.ims, err = ims.New(ims.Config{BaseURL: w.url, Timeout: patience, OAuth: ims.OAuth{
		Endpoint: w.tokenURL(), ClientID: w.clientID, ClientSecret: w.clientSecret}})
	if err != nil {
		t.Fatal(err)
	}
	w.store, err = upload.NewS3(upload.S3Config{Endpoint: w.s3URL, AccessKey: w.accessKey, SecretKey: w.secretKey, Bucket: bucket, Budget: patience})
	if err != nil {
		t.Fatal(err)
	}
	w.s3 = s3.New(s3.Options{BaseEndpoint: &w.s3URL, Region: "us-east-1", UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(w.accessKey, w.secretKey, "")})
}

func (w *world) tokenURL() string {
	return w.url + "/keycloak/realms/shasta/protocol/openid-connect/token"
}

// stop interrupts the installation and reports when it does not end well.
func (w *world) stop() error {
	w.cmd.Process.Signal(syscall.SIGINT)
	select {
	case err := <-w.done:
		w.done <- err
		if err != nil {
			return fmt.Errorf("imslocal serve, interrupted: %w", err)
		}
		return nil
	case <-time.After(patience):
		w.cmd.Process.Kill()
		return errors.New("imslocal serve does not end when it is interrupted")
	}
}

// output is all that imslocal has printed.
func (w *world) output(t *testing.T) string {
	t.Helper()
	return readFile(t, w.log)
}

// attribute is the value of a key in a line of the log.
func attribute(line, key string) string {
	m := regexp.MustCompile(`(?:^| )` + regexp.QuoteMeta(key) + `=("(?:[^"\\]|\\.)*"|\S*)`).FindStringSubmatch(line)
	if m == nil {
		return ""
	}
	var text string
	if json.Unmarshal([]byte(m[1]), &text) == nil {
		return text
	}
	return m[1]
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func readJSON(t *testing.T, name string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(readFile(t, name)), v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// get reads an object whole.
func (w *world) get(t *testing.T, key string) ([]byte, upload.Info) {
	t.Helper()
	body, info, err := w.store.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	b, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return b, info
}

// imagesNamed are the records with that name.
func (w *world) imagesNamed(t *testing.T, name string) []ims.Image {
	t.Helper()
	all, err := w.ims.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(i ims.Image) bool { return i.Name != name })
}

// orphans are objects and unfinished uploads of images that have no record. A
// job that fails just now takes objects and then the record back, so what
// looks like an orphan is looked at twice.
func (w *world) orphans(t *testing.T) []string {
	t.Helper()
	look := func() []string {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		objects, err := w.store.List(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		uploads, err := w.s3.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: aws.String(bucket)})
		if err != nil {
			t.Fatal(err)
		}
		images, err := w.ims.Images(ctx)
		if err != nil {
			t.Fatal(err)
		}
		known := map[string]bool{}
		w.abandoned.Range(func(id, _ any) bool {
			known[id.(string)] = true
			return true
		})
		for _, i := range images {
			known[i.ID] = true
		}
		var found []string
		for _, o := range objects {
			if !known[path.Dir(o.Key)] {
				found = append(found, "object "+o.Key)
			}
		}
		for _, u := range uploads.Uploads {
			if !known[path.Dir(aws.ToString(u.Key))] {
				found = append(found, "unfinished upload of "+aws.ToString(u.Key))
			}
		}
		return found
	}
	first := look()
	if len(first) == 0 {
		return nil
	}
	second := look()
	return slices.DeleteFunc(first, func(s string) bool { return !slices.Contains(second, s) })
}

// checkNoImage fails when anything of an image of that name is left.
func (w *world) checkNoImage(t *testing.T, name string) {
	t.Helper()
	for _, i := range w.imagesNamed(t, name) {
		t.Errorf("an image record is left: %s", i.Raw)
	}
	for _, o := range w.orphans(t) {
		t.Errorf("left in S3: %s", o)
	}
}
