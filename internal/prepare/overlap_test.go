// SPDX-License-Identifier: Apache-2.0

package prepare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

// inUnits has images fetched in many small ranges.
var inUnits = tuning{stall: patient, pause: time.Millisecond, rangesFrom: 1 << 20, rangeSize: 100_000}

var overlapLines = []string{"data a/first 0644 400000 random:1", "data m/middle 0644 3000000 random:2", "data z/last 0644 400000 random:3", "mtime . 1600000000"}

// TestUnpackWhileReceiving: the first file is on the volume before the middle of the image has been sent.
func TestUnpackWhileReceiving(t *testing.T) {
	dir, image := makeImage(t, overlapLines...)
	j := newJob(t, image)
	j.tune = inUnits
	first := filepath.Join(j.cfg.Parent, ".image-root.partial/a/first")
	want, err := os.ReadFile(filepath.Join(dir, "a/first"))
	if err != nil {
		t.Fatal(err)
	}
	held := fmt.Sprintf("bytes=%d-", 2_000_000)
	s := newS3(t, image, func(w http.ResponseWriter, r *http.Request, object []byte) {
		for deadline := time.Now().Add(patient); strings.HasPrefix(r.Header.Get("Range"), held); time.Sleep(time.Millisecond) {
			if got, err := os.ReadFile(first); err == nil && bytes.Equal(got, want) {
				break
			}
			if time.Now().After(deadline) {
				t.Error("nothing was unpacked before the image was there")
				break
			}
		}
		serve(`"one"`)(w, r, object)
	})
	if err := j.run(t, t.Context(), s.link()); err != nil {
		t.Fatal(err)
	}
	tree.Equal(t, dir, filepath.Join(j.cfg.Parent, "image-root"), tree.Seconds)
	if log := j.log.String(); strings.Count(log, "image unpacked") != 1 || strings.Contains(log, "unpacking again") {
		t.Errorf("unpacked otherwise than once:\n%s", log)
	}
}

// TestUnpackWhileReceivingFails: whatever happens to the download, the tree is that of the image that was summed, or none.
func TestUnpackWhileReceivingFails(t *testing.T) {
	dir, image := makeImage(t, overlapLines...)
	_, other := makeImage(t, append(overlapLines, "file n/another 0644 x")...)
	after := func(n int, then act) []act {
		var acts []act
		for range n {
			acts = append(acts, serve(`"one"`))
		}
		return append(acts, then)
	}
	for name, c := range map[string]struct {
		begin   []byte
		acts    []act
		wantErr string
	}{
		"replaced meanwhile":   {other, append(after(20, func(w http.ResponseWriter, r *http.Request, _ []byte) { serve(`"two"`)(w, r, image) }), serveOther(image, `"two"`)), ""},
		"no ranges any more":   {image, append(after(20, serveAll), serveAll), ""},
		"broken connections":   {image, append(after(20, cut(100, serve(`"one"`))), serve(`"one"`)), ""},
		"another sum":          {other, after(1, serve(`"one"`)), "MD5"},
		"no data of the image": {append(bytes.Clone(image[:200_000]), append(content(len(image)-300_000, "x"), image[len(image)-100_000:]...)...), after(1, serve(`"one"`)), "MD5"},
		"refused in the end":   {image, append(after(20, answer(403, "")), answer(403, "")), "presigned URL"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, image)
			j.tune = inUnits
			s := newS3(t, c.begin, c.acts...)
			err := j.run(t, t.Context(), s.link())
			if c.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), c.wantErr) {
					t.Errorf("%q is not in: %v", c.wantErr, err)
				}
				if left := j.left(t); len(left) > 0 {
					t.Errorf("left on the volume: %q", left)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, &j.log)
			}
			tree.Equal(t, dir, filepath.Join(j.cfg.Parent, "image-root"), tree.Seconds)
			got, err := os.ReadFile(filepath.Join(j.cfg.Parent, "image.sqsh"))
			if err != nil || !bytes.Equal(got, image) {
				t.Errorf("image.sqsh is another image: %v", err)
			}
		})
	}
}

// TestArrival has many readers read at random while units land in any order.
func TestArrival(t *testing.T) {
	const size, unit, head = 1_000_003, 10_000, 25_000
	object := content(size, "object")
	f, err := os.Create(filepath.Join(t.TempDir(), "object"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(object[:head], 0); err != nil {
		t.Fatal(err)
	}
	a := newArrival(f, head, size, unit)
	var readers, fetchers sync.WaitGroup
	for seed := range uint64(8) {
		readers.Go(func() {
			random := rand.New(rand.NewPCG(seed, 0))
			for range 200 {
				off := random.Int64N(size)
				b := make([]byte, min(random.Int64N(3*unit), size-off))
				if n, err := a.ReadAt(b, off); err != nil || !bytes.Equal(b[:n], object[off:off+int64(n)]) || n != len(b) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
				}
			}
		})
	}
	for range 3 {
		fetchers.Go(func() {
			for i, ok := a.next(); ok; i, ok = a.next() {
				from, to := a.span(i)
				if _, err := f.WriteAt(object[from:to], from); err != nil {
					t.Error(err)
				}
				a.land(i)
			}
		})
	}
	readers.Wait()
	fetchers.Wait()
	if err := a.wait(t.Context(), 0); err != nil {
		t.Error(err)
	}
}

// TestArrivalPriority: what a reader waits for comes next; what was on its way and did not come, comes again; an end ends
// all waiting.
func TestArrivalPriority(t *testing.T) {
	a := newArrival(nil, 0, 1000, 100)
	a.take(0)
	failed := make(chan error)
	go func() {
		_, err := a.ReadAt(make([]byte, 10), 795)
		failed <- err
	}()
	for deadline := time.Now().Add(patient); ; time.Sleep(time.Millisecond) {
		a.mu.Lock()
		waits := len(a.wanted)
		a.mu.Unlock()
		if waits > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody waits")
		}
	}
	var order []int
	for range 3 {
		i, _ := a.next()
		order = append(order, i)
	}
	a.release()
	i, _ := a.next()
	if want := []int{7, 1, 2, 7}; fmt.Sprint(append(order, i)) != fmt.Sprint(want) {
		t.Errorf("units in the order %v, want %v", append(order, i), want)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if err := a.wait(ctx, 3); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	a.fail(errRestart)
	if err := <-failed; !errors.Is(err, errRestart) {
		t.Errorf("%v", err)
	}
}
