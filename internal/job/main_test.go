// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/signal"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/s3test"
)

func TestMain(m *testing.M) {
	s3test.ChildMain()
	if len(os.Args) == 3 && os.Args[1] == ChildArg {
		os.Exit(jobChild(os.Args[2]))
	}
	testkit.HideProfile()
	os.Exit(m.Run())
}

// jobChild is a sidecar process of its own, for tests that kill it.
func jobChild(text string) int {
	var tc testConfig
	if err := json.Unmarshal([]byte(text), &tc); err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	cfg, deps, err := tc.load()
	if err != nil {
		panic(err)
	}
	if tc.Panic {
		deps.Store = hookStore{S3: deps.Store.(hookStore).S3, put: func(_ string, n int64) {
			if n > 0 {
				go panic("in some goroutine")
				select {}
			}
		}}
	}
	return Run(ctx, cfg, deps)
}

func (c testConfig) load() (cfg config.Sidecar, deps Deps, err error) {
	cfg = c.sidecar()
	client, err := clientFor(cfg)
	if err != nil {
		return cfg, deps, err
	}
	store, err := storeFor(cfg)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return cfg, Deps{Stdout: os.Stdout, Stderr: os.Stderr, Log: log, IMS: client, Store: hookStore{S3: store}}, err
}
