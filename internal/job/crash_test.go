// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
)

func (p *pod) testConfig() testConfig {
	return testConfig{Dir: p.dir, IMS: p.imsURL, S3: p.s3.Endpoint, Bucket: p.s3.Bucket, SSHPort: p.cfg.SSHPort}
}

func (c testConfig) String() string {
	b, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// steps are the calls at which a sidecar is killed, and the image records it
// leaves then. A POST whose answer never came is the one step nobody can
// account for, since the record cannot be told from a stranger's.
var steps = map[string]int{
	"PATCH jobs status=waiting_on_user":     0,
	"PATCH jobs status=packaging_artifacts": 0,
	"POST images":                           0,
	"PATCH images link":                     1,
	"PATCH jobs resultant_image_id":         1,
	"PATCH jobs status=success":             1,
}

// A sidecar that is killed at any step and started again ends with one image.
func TestRestart(t *testing.T) {
	for step, records := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			defer p.sshd()()
			child := exec.Command("/proc/self/exe", ChildArg, p.testConfig().String())
			child.Stderr = &p.log
			var once sync.Once
			p.ims.intercept(func(call string) int {
				answer := 0
				if call == step {
					once.Do(func() {
						p.killChild()
						answer = -1
					})
				}
				return answer
			})
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			if err := child.Wait(); err == nil {
				t.Fatal("the child was not killed")
			}
			p.ims.mu.Lock()
			n := len(p.ims.images)
			p.ims.mu.Unlock()
			if n != records {
				t.Errorf("%d image records after the kill, want %d", n, records)
			}
			want := success
			if step == "PATCH jobs status=success" {
				want.silent = true // printed by the child
			}
			p.check(p.runAlone(t.Context()), want)
		})
	}
}

// What the process cannot report itself, its supervisor does.
func TestSupervise(t *testing.T) {
	kill := func(step string) func(*pod) {
		return func(p *pod) { p.ims.intercept(onCall(step, p.killChild)) }
	}
	for name, c := range map[string]struct {
		arrange func(*pod)
		panic   bool
		want    outcome
	}{
		"no trouble":         {func(*pod) {}, false, success},
		"killed in shell":    {kill("PATCH jobs status=waiting_on_user"), false, failure1("ended without a report")},
		"killed packaging":   {kill("PATCH jobs status=packaging_artifacts"), false, failure1("ended without a report")},
		"killed registering": {kill("PATCH images link"), false, failure1("ended without a report")},
		"goroutine panic":    {func(*pod) {}, true, failure1("ended without a report")},
		"told":               {func(p *pod) { p.user = func() { p.signalChild(unix.SIGTERM) } }, false, failure1("terminated")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			c.arrange(p)
			defer p.sshd()()
			c.want.crashed = c.panic
			p.check(p.supervise(t.Context(), c.panic), c.want)
		})
	}
}

// SIGTERM to the supervisor reaches the child, which cleans up.
func TestSuperviseTold(t *testing.T) {
	p := newPod(t)
	ctx, cancel := context.WithCancel(t.Context())
	p.user = cancel
	defer p.sshd()()
	p.check(p.supervise(ctx, false), failure1("terminated"))
}

func (p *pod) supervise(ctx context.Context, panics bool) int {
	tc := p.testConfig()
	tc.Panic = panics
	return Supervise(ctx, []string{tc.String()}, &p.stdout, &p.log, func() (config.Sidecar, Deps, error) {
		cfg, deps, err := tc.load()
		deps.Stdout = &p.stdout
		deps.Log = slog.New(slog.NewTextHandler(&p.log, nil))
		return cfg, deps, err
	})
}

func (p *pod) killChild() { p.signalChild(unix.SIGKILL) }

// signalChild signals the sidecar that works on this pod. A look at the children
// may miss one when others end meanwhile, as those of parallel tests do.
func (p *pod) signalChild(sig unix.Signal) {
	for range 100 {
		if pid := p.child(); pid > 0 {
			if err := unix.Kill(pid, sig); err != nil {
				p.t.Error(err)
			}
			return
		}
	}
	p.t.Error("the sidecar process was not found")
}

// child looks for the sidecar among the children of this process (proc(5),
// task/*/children); 0: not seen.
func (p *pod) child() int {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(lists) == 0 {
		p.t.Errorf("no lists of children: %v", err)
	}
	for _, list := range lists {
		pids, _ := os.ReadFile(list) // a thread may have ended meanwhile
		for _, text := range strings.Fields(string(pids)) {
			args, err := os.ReadFile("/proc/" + text + "/cmdline")
			if err != nil || !bytes.Contains(args, []byte("\x00"+ChildArg+"\x00")) || !bytes.Contains(args, []byte(p.dir)) {
				continue
			}
			pid, err := strconv.Atoi(text)
			if err != nil {
				p.t.Error(err)
			}
			return pid
		}
	}
	return 0
}
