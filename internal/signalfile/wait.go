// SPDX-License-Identifier: Apache-2.0

package signalfile

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
)

const (
	// pollEvery is the contract: a flag is seen after this time at the latest,
	// whatever the file system tells or hides.
	pollEvery = time.Second
	// lookPause keeps a busy directory from making us look all the time.
	lookPause = 20 * time.Millisecond
)

// watchOptions are for tests, which must be able to run without inotify and
// without waiting.
type watchOptions struct {
	newWatcher func() (*fsnotify.Watcher, error)
	poll       time.Duration
}

// Wait returns the first of names that exists; failed wins over all others,
// which count in the order given. It returns the context's cause when ctx
// ends first. Errors while looking are logged once and do not end the wait:
// a network volume may come back.
func (s Set) Wait(ctx context.Context, log *slog.Logger, names ...Name) (Name, error) {
	names = slices.Clone(names)
	slices.SortStableFunc(names, func(a, b Name) int {
		switch {
		case a == Failed && b != Failed:
			return -1
		case b == Failed && a != Failed:
			return 1
		}
		return 0
	})
	w := newWaiter(s, log, names)
	defer w.close()
	poll := s.watch.poll
	if poll == 0 {
		poll = pollEvery
	}
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		w.rewatch() // before looking: an event lost between the two would cost a poll
		if n, ok := w.look(); ok {
			return n, nil
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-ticker.C:
		case <-w.hints:
			select {
			case <-ctx.Done():
				return "", context.Cause(ctx)
			case <-time.After(lookPause):
			}
		}
	}
}

// waiter is the state of one Wait.
type waiter struct {
	set     Set
	log     *slog.Logger
	names   []Name
	dirs    []place           // directories of the flags, each once; name is the path below dir
	watched []*os.File        // what is watched at dirs[i]; nil: nothing
	watcher *fsnotify.Watcher // nil: polling alone
	hints   chan struct{}     // holds one: something happened to a flag's name
	done    chan struct{}     // closed when the goroutine that feeds hints is gone
	said    map[string]bool   // remarks already made
}

func newWaiter(s Set, log *slog.Logger, names []Name) *waiter {
	w := &waiter{set: s, log: log, names: names, said: map[string]bool{}, hints: make(chan struct{}, 1), done: make(chan struct{})}
	for _, n := range names {
		p := s.place(n)
		p.name = filepath.Dir(p.name)
		if !slices.Contains(w.dirs, p) {
			w.dirs = append(w.dirs, p)
		}
	}
	w.watched = make([]*os.File, len(w.dirs))
	newWatcher := s.watch.newWatcher
	if newWatcher == nil {
		newWatcher = fsnotify.NewWatcher
	}
	watcher, err := newWatcher()
	if err != nil {
		log.Warn("inotify is not available; looking for signal files every second instead", "err", err)
		close(w.done)
		return w
	}
	w.watcher = watcher
	go w.feed()
	return w
}

// feed drains the watcher, so that it never blocks, and passes on that one of
// the awaited names was touched.
func (w *waiter) feed() {
	defer close(w.done)
	for {
		select {
		case ev, ok := <-w.watcher.Events:
			if !ok {
				return
			}
			if !slices.Contains(w.names, Name(filepath.Base(ev.Name))) {
				continue
			}
			select {
			case w.hints <- struct{}{}:
			default:
			}
		case err, ok := <-w.watcher.Errors:
			if !ok {
				return
			}
			w.log.Debug("inotify", "err", err)
		}
	}
}

func (w *waiter) close() {
	if w.watcher != nil {
		w.watcher.Close()
	}
	<-w.done
	for _, dir := range w.watched {
		if dir != nil {
			dir.Close()
		}
	}
}

// rewatch puts the watches on the directories that are at the paths now: the
// user may have moved /tmp away and made a new one.
func (w *waiter) rewatch() {
	if w.watcher == nil {
		return
	}
	for i, p := range w.dirs {
		var dir *os.File
		err := p.with(func(r *imageroot.Root) (err error) {
			dir, err = r.OpenDir(p.name)
			return err
		})
		if err == nil && sameFile(dir, w.watched[i]) {
			dir.Close()
			continue
		}
		if err == nil {
			if err = w.watcher.Add(watchName(dir)); err != nil {
				dir.Close()
				dir = nil
			}
		}
		if err != nil && !imageroot.IsAbsent(err) {
			w.once("watch "+p.String(), "cannot watch the signal files' directory; looking every second instead", "dir", p.String(), "err", err)
		}
		if old := w.watched[i]; old != nil {
			_ = w.watcher.Remove(watchName(old)) // the kernel drops the watch of a deleted directory itself
			old.Close()
		}
		w.watched[i] = dir
	}
}

// watchName leads inotify to the inode behind the descriptor, so that nobody
// can swap the directory in between. The descriptor stays open as long as the
// watch: its number tells the watches apart.
func watchName(dir *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", dir.Fd()) }

func sameFile(a, b *os.File) bool {
	if a == nil || b == nil {
		return false
	}
	sa, err1 := a.Stat()
	sb, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(sa, sb)
}

// look returns the first flag that is there.
func (w *waiter) look() (Name, bool) {
	for _, n := range w.names {
		found, err := w.set.Exists(n)
		if found {
			return n, true
		}
		if err != nil {
			w.once("look "+string(n), "cannot look for a signal file; trying again every second", "err", err)
		}
	}
	w.hintOtherMode()
	return "", false
}

// hintOtherMode tells the log, once, that the user touched the flag of the
// mode this job does not run in: a frequent mistake after chroot image-root.
func (w *waiter) hintOtherMode() {
	for _, n := range w.names {
		if n != Complete && n != Failed {
			continue
		}
		other := w.set.placeIn(n, !w.set.Jailed)
		if found, err := other.exists(); err == nil && found {
			w.once("other "+string(n), "a signal file lies where only the other mode looks; it is ignored", "found", other.String(), "expected", w.set.Path(n), "jailed", w.set.Jailed)
		}
	}
}

func (w *waiter) once(key, msg string, attrs ...any) {
	if !w.said[key] {
		w.said[key] = true
		w.log.Warn(msg, attrs...)
	}
}
