// SPDX-License-Identifier: Apache-2.0

package signalfile

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// newSet makes a parent with an image root described by lines.
func newSet(t *testing.T, jailed bool, lines ...string) Set {
	t.Helper()
	parent := t.TempDir()
	tree.Make(t, parent, "dir image-root")
	tree.Make(t, filepath.Join(parent, "image-root"), lines...)
	return Set{Parent: parent, Root: filepath.Join(parent, "image-root"), Jailed: jailed}
}

// logLines is a log that a test can wait on.
type logLines struct {
	mu    sync.Mutex
	text  strings.Builder
	lines chan string
}

func newLog() (*slog.Logger, *logLines) {
	l := &logLines{lines: make(chan string, 1000)}
	return slog.New(slog.NewTextHandler(l, nil)), l
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines <- string(p)
	return l.text.Write(p)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await reads log lines until one holds want.
func (l *logLines) await(t *testing.T, want string) {
	t.Helper()
	for {
		select {
		case line := <-l.lines:
			if strings.Contains(line, want) {
				return
			}
		case <-t.Context().Done():
			t.Fatalf("log never said %q:\n%s", want, l)
		case <-time.After(time.Minute):
			t.Fatalf("log never said %q:\n%s", want, l)
		}
	}
}

// waiting runs Wait beside the test.
type waiting struct {
	name   chan Name
	cancel context.CancelFunc
}

func startWait(t *testing.T, s Set, log *slog.Logger, names ...Name) waiting {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	w := waiting{make(chan Name, 1), cancel}
	done := make(chan struct{})
	go func() {
		defer close(done)
		n, err := s.Wait(ctx, log, names...)
		if err != nil {
			n = Name("error: " + err.Error())
		}
		w.name <- n
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

func (w waiting) want(t *testing.T, n Name) {
	t.Helper()
	if got := <-w.name; got != n {
		t.Errorf("Wait returned %q, want %q", got, n)
	}
}

func noInotify() (*fsnotify.Watcher, error) {
	return nil, errors.New("too many open files: max_user_instances")
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPathsPerMode(t *testing.T) {
	for _, c := range []struct {
		jailed bool
		name   Name
		want   string
	}{
		{false, Complete, "/mnt/image/complete"},
		{false, Failed, "/mnt/image/failed"},
		{true, Complete, "/mnt/image/image-root/tmp/complete"},
		{true, Failed, "/mnt/image/image-root/tmp/failed"},
		{true, Exiting, "/mnt/image/exiting"},
		{true, Ready, "/mnt/image/ready"},
		{true, BuildFailed, "/mnt/image/build_failed"},
	} {
		s := Set{Parent: "/mnt/image", Root: "/mnt/image/image-root", Jailed: c.jailed}
		if got := s.Path(c.name); got != c.want {
			t.Errorf("jailed=%v %s: %s, want %s", c.jailed, c.name, got, c.want)
		}
	}
}

// TestWhatCountsAsAFlag has one hostile or odd image per case. The canary is
// outside the root: nothing inside may make it count.
func TestWhatCountsAsAFlag(t *testing.T) {
	canary := filepath.Join(t.TempDir(), "complete")
	write(t, canary)
	outside := filepath.Dir(canary)
	for name, c := range map[string]struct {
		lines []string
		want  bool
	}{
		"plain file":                 {[]string{"file tmp/complete 0000"}, true},
		"with content":               {[]string{"file tmp/complete 0644 whatever"}, true},
		"absent":                     {[]string{"dir tmp 1777"}, false},
		"no tmp at all":              {[]string{"dir etc"}, false},
		"absolute tmp link":          {[]string{"file var/tmp/complete", "symlink tmp /var/tmp"}, true},
		"tmp link to the container":  {[]string{"symlink tmp " + outside}, false},
		"tmp link with dots":         {[]string{"symlink tmp ../../../../.." + outside}, false},
		"flag link inside":           {[]string{"file home/flag", "symlink tmp/complete /home/flag"}, true},
		"flag link to the container": {[]string{"symlink tmp/complete " + canary}, false},
		"flag link with dots":        {[]string{"symlink tmp/complete ../../../../../../.." + canary}, false},
		"dangling link":              {[]string{"symlink tmp/complete nowhere"}, false},
		"link loop":                  {[]string{"symlink tmp/complete complete"}, false},
		"fifo":                       {[]string{"fifo tmp/complete"}, false},
		"socket":                     {[]string{"sock tmp/complete"}, false},
		"directory":                  {[]string{"dir tmp/complete"}, false},
		"tmp is a file":              {[]string{"file tmp 0644 x"}, false},
		"proc magic link":            {[]string{"symlink tmp /proc/self/root" + outside}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSet(t, true, c.lines...)
			got, err := s.Exists(Complete)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("Exists = %v, want %v", got, c.want)
			}
		})
	}
}

func TestTouchAndRemove(t *testing.T) {
	for name, s := range map[string]Set{
		"plain":             newSet(t, false),
		"jailed":            newSet(t, true, "dir tmp 1777"),
		"absolute tmp link": newSet(t, true, "dir var/tmp", "symlink tmp /var/tmp"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []Name{Complete, Exiting, Complete} {
				if err := s.Touch(n); err != nil {
					t.Fatal(err)
				}
				if ok, err := s.Exists(n); !ok || err != nil {
					t.Errorf("%s after Touch: %v, %v", n, ok, err)
				}
			}
			for range 2 {
				if err := s.Remove(Complete); err != nil {
					t.Fatal(err)
				}
				if ok, err := s.Exists(Complete); ok || err != nil {
					t.Errorf("after Remove: %v, %v", ok, err)
				}
			}
		})
	}
}

// TestTouchThroughLink: whoever has the plain shell can put a link where the
// gateway makes `exiting`; the target must not be created or changed.
func TestTouchThroughLink(t *testing.T) {
	s := newSet(t, false)
	target := filepath.Join(t.TempDir(), "target")
	tree.Make(t, s.Parent, "symlink exiting "+target)
	if err := s.Touch(Exiting); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("the link's target was made: %v", err)
	}
	if ok, _ := s.Exists(Exiting); !ok {
		t.Error("flag is not there")
	}
}

func TestRemoveStale(t *testing.T) {
	for _, jailed := range []bool{true, false} {
		s := newSet(t, jailed, "file tmp/complete", "symlink tmp/failed /etc/passwd", "file etc/passwd 0644 kept", "file tmp/other")
		tree.Make(t, s.Parent, "file complete", "file failed", "file exiting", "file pod_error", "file ready", "file build_failed")
		if err := s.RemoveStale(); err != nil {
			t.Fatal(err)
		}
		left, err := tree.Take(s.Parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, gone := range []string{"complete", "failed", "exiting", "pod_error", "image-root/tmp/complete", "image-root/tmp/failed"} {
			if _, ok := left[gone]; ok {
				t.Errorf("jailed=%v: %s is still there", jailed, gone)
			}
		}
		for _, kept := range []string{"ready", "build_failed", "image-root/tmp/other", "image-root/etc/passwd"} {
			if _, ok := left[kept]; !ok {
				t.Errorf("jailed=%v: %s is gone", jailed, kept)
			}
		}
	}
}

func TestRemoveStaleWithoutRoot(t *testing.T) {
	s := Set{Parent: t.TempDir(), Root: "/nonexistent/image-root", Jailed: true}
	if err := s.RemoveStale(); err != nil {
		t.Errorf("a job without a root yet: %v", err)
	}
}

// TestRemoveStaleDirectory: touch(1) on a directory succeeds and makes no
// flag, so such an image must be refused before a user works on it.
func TestRemoveStaleDirectory(t *testing.T) {
	if err := newSet(t, true, "dir tmp/complete").RemoveStale(); err == nil || !strings.Contains(err.Error(), "source image") {
		t.Errorf("want an error that names the next step, got %v", err)
	}
	if err := newSet(t, false, "dir tmp/complete").RemoveStale(); err != nil {
		t.Errorf("a plain job does not care: %v", err)
	}
}

// TestWaitSees runs each way a flag can come into being with and without
// inotify: polling must be enough.
func TestWaitSees(t *testing.T) {
	for name, act := range map[string]func(t *testing.T, tmp string){
		"create": func(t *testing.T, tmp string) { write(t, filepath.Join(tmp, "complete")) },
		"rename into place": func(t *testing.T, tmp string) {
			write(t, filepath.Join(tmp, ".ansible_tmp"))
			if err := os.Rename(filepath.Join(tmp, ".ansible_tmp"), filepath.Join(tmp, "complete")); err != nil {
				t.Fatal(err)
			}
		},
		"hard link": func(t *testing.T, tmp string) {
			write(t, filepath.Join(tmp, "x"))
			if err := os.Link(filepath.Join(tmp, "x"), filepath.Join(tmp, "complete")); err != nil {
				t.Fatal(err)
			}
		},
		"directory replaced": func(t *testing.T, tmp string) {
			if err := os.Rename(tmp, tmp+"2"); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(tmp, 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(tmp, "complete"))
		},
		"directory deleted and made again": func(t *testing.T, tmp string) {
			if err := os.RemoveAll(tmp); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(tmp, 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(tmp, "complete"))
		},
		"moved in with its directory": func(t *testing.T, tmp string) {
			tree.Make(t, filepath.Dir(tmp), "file new/complete")
			if err := os.RemoveAll(tmp); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(filepath.Dir(tmp), "new"), tmp); err != nil {
				t.Fatal(err)
			}
		},
	} {
		for mode, opt := range map[string]watchOptions{
			"inotify":      {},
			"polling only": {newWatcher: noInotify, poll: 5 * time.Millisecond},
		} {
			t.Run(name+"/"+mode, func(t *testing.T) {
				s := newSet(t, true, "dir tmp 1777")
				s.watch = opt
				log, _ := newLog()
				w := startWait(t, s, log, Complete, Failed)
				act(t, filepath.Join(s.Root, "tmp"))
				w.want(t, Complete)
			})
		}
	}
}

// TestEventHurries shows that inotify is used at all: with a poll that never
// comes, only an event can end the wait.
func TestEventHurries(t *testing.T) {
	s := newSet(t, true, "dir var/tmp", "symlink tmp /var/tmp")
	looked := make(chan struct{}, 1)
	s.watch.poll = time.Hour
	s.Extra = func(Name) bool {
		select {
		case looked <- struct{}{}:
		default:
		}
		return false
	}
	log, _ := newLog()
	w := startWait(t, s, log, Complete)
	<-looked // the watch is in place: rewatch comes before looking
	write(t, filepath.Join(s.Root, "var/tmp/complete"))
	w.want(t, Complete)
}

func TestFailedWins(t *testing.T) {
	s := newSet(t, true, "file tmp/complete", "file tmp/failed")
	log, _ := newLog()
	startWait(t, s, log, Complete, Failed).want(t, Failed)
}

func TestNoInotifyIsAWarning(t *testing.T) {
	s := newSet(t, false)
	s.watch = watchOptions{newWatcher: noInotify, poll: time.Millisecond}
	log, lines := newLog()
	w := startWait(t, s, log, Exiting)
	lines.await(t, "inotify is not available")
	if err := s.Touch(Exiting); err != nil {
		t.Fatal(err)
	}
	w.want(t, Exiting)
}

func TestHintForTheOtherMode(t *testing.T) {
	for _, jailed := range []bool{true, false} {
		s := newSet(t, jailed, "dir tmp")
		other := s
		other.Jailed = !jailed
		s.watch.poll = time.Millisecond
		if err := other.Touch(Complete); err != nil {
			t.Fatal(err)
		}
		log, lines := newLog()
		w := startWait(t, s, log, Complete, Failed)
		lines.await(t, "other mode")
		if err := s.Touch(Failed); err != nil {
			t.Fatal(err)
		}
		w.want(t, Failed)
		if n := strings.Count(lines.String(), "other mode"); n != 1 {
			t.Errorf("jailed=%v: hint given %d times", jailed, n)
		}
	}
}

func TestExtra(t *testing.T) {
	s := newSet(t, true, "dir tmp")
	s.Extra = func(n Name) bool { return n == Complete }
	log, _ := newLog()
	startWait(t, s, log, Complete, Failed).want(t, Complete)
}

func TestWaitEndsWithItsContext(t *testing.T) {
	s := newSet(t, true)
	reason := errors.New("pod is going away")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	log, _ := newLog()
	if _, err := s.Wait(ctx, log, Complete); !errors.Is(err, reason) {
		t.Errorf("Wait: %v, want the context's cause", err)
	}
}

// TestRootComesLater: the sidecar may wait on a volume where nothing is yet.
func TestRootComesLater(t *testing.T) {
	parent := t.TempDir()
	s := Set{Parent: parent, Root: filepath.Join(parent, "image-root"), Jailed: true}
	s.watch.poll = time.Millisecond
	log, lines := newLog()
	w := startWait(t, s, log, Complete)
	tree.Make(t, parent, "file image-root/tmp/complete")
	w.want(t, Complete)
	if strings.Contains(lines.String(), "level=WARN") {
		t.Errorf("a missing directory is no reason to warn:\n%s", lines)
	}
}
