// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// tokenLife is how long a token of the token endpoint is good.
const tokenLife = 5 * time.Minute

// Config says what to bring up.
type Config struct {
	Listen   string // address of the API, "127.0.0.1:0" for a free port
	S3Listen string // address of the S3 server
	Data     string // data directory, made when it is missing
	Runner   string // "process", or "none" when somebody else starts the pods
	SSHPort  int    // port of a job's sshd, 0 for a free one per job
	Log      *slog.Logger
	Out      io.Writer // the containers' output, a line each with its origin

	changed func(Job) // see apiConfig
}

// world is a running installation: API, store and runner.
type world struct {
	url     string // of the API
	store   *s3Server
	runner  *processRunner // nil with the runner "none"
	lock    *os.File
	server  *http.Server
	served  chan error
	secrets secrets
	log     *slog.Logger
}

// Serve runs an installation until ctx ends, which is success.
func Serve(ctx context.Context, c Config) error {
	w, err := start(ctx, c)
	if err != nil {
		return err
	}
	c.Log.Info("IMS API runs", "url", w.url, "data", c.Data)
	return errors.Join(w.wait(ctx), w.stop())
}

// wait returns nil when ctx ends, or why the installation cannot go on.
func (w *world) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.store.done:
		return fmt.Errorf("S3 server ended by itself: %s", w.store.exit())
	case err := <-w.served:
		return fmt.Errorf("API: %w", err)
	}
}

// start brings everything up, or leaves nothing running.
func start(ctx context.Context, c Config) (_ *world, err error) {
	switch c.Runner {
	case "process", "none":
	case "kubernetes":
		return nil, errors.New("the runner kubernetes is not available in this version; use --runner process or none")
	default:
		return nil, fmt.Errorf("unknown runner %q; use --runner process or none", c.Runner)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	bin := filepath.Dir(self)
	if c.Runner == "process" {
		if err := checkMachine(bin); err != nil {
			return nil, err
		}
	}
	if c.Data, err = filepath.Abs(c.Data); err != nil {
		return nil, err
	}
	w := &world{log: c.Log, served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.stop())
		}
	}()
	if w.lock, err = lockData(c.Data); err != nil {
		return nil, err
	}
	records, err := openState(filepath.Join(c.Data, "state"))
	if err != nil {
		return nil, err
	}
	if w.secrets, err = loadSecrets(c.Data); err != nil {
		return nil, err
	}
	if w.store, err = startS3(ctx, c.Data, c.S3Listen, c.Log); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("API: %w; give another --listen", err)
	}
	addr := listener.Addr().(*net.TCPAddr)
	w.url = "http://" + reachable(addr)
	a := newAPI(apiConfig{
		state: records, objects: newS3Objects(w.store), log: c.Log, bucket: bucketImages,
		clientID: w.secrets.ClientID, secret: w.secrets.ClientSecret,
		tokenLife: tokenLife, trusted: addr.IP.IsLoopback(), changed: c.changed,
	})
	if c.Runner == "none" {
		a.runner = noRunner{}
	} else if w.runner, err = w.newRunner(c, bin, a.endJob); err == nil {
		a.runner = w.runner
		err = w.recover(a)
	}
	if err != nil {
		listener.Close()
		return nil, err
	}
	w.server = &http.Server{Handler: a, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute, ErrorLog: slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug)}
	go func() { w.served <- w.server.Serve(listener) }()
	return w, nil
}

func (w *world) newRunner(c Config, bin string, ended func(jobID, reason string)) (*processRunner, error) {
	var mu sync.Mutex
	return newProcessRunner(runnerConfig{
		dir: filepath.Join(c.Data, "jobs"), port: c.SSHPort, log: c.Log, ended: ended,
		line: func(jobID, container, line string) {
			mu.Lock()
			defer mu.Unlock()
			fmt.Fprintf(c.Out, "[%.8s %s] %s\n", jobID, container, line)
		},
		world: podWorld{
			imsURL: w.url, tokenURL: w.url + TokenPath,
			clientID: w.secrets.ClientID, secret: w.secrets.ClientSecret,
			s3Endpoint: w.store.endpoint, s3: w.store.keys,
			ca: []byte(w.secrets.CA), remoteKey: []byte(w.secrets.RemoteKey),
			bin: bin, hide: []string{c.Data},
		},
	})
}

// recover marks the jobs as failed that ran when imslocal ended, and removes
// what they left.
func (w *world) recover(a *api) error {
	for _, job := range a.state.jobs.all() {
		if !job.Terminal() {
			a.endJob(job.ID, "imslocal ended while the job ran")
		}
	}
	return w.runner.sweep(a.state.jobs.all())
}

// stop ends everything: the jobs first, while they can still reach the API and
// the store. It may be called on a half-started world.
func (w *world) stop() error {
	if w.runner != nil {
		w.runner.close()
	}
	var err error
	if w.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err = w.server.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
			err = w.server.Close() // who still waits waits for what is gone
		}
	}
	if w.store != nil {
		w.store.stop()
	}
	if w.lock != nil {
		err = errors.Join(err, w.lock.Close())
	}
	return err
}
