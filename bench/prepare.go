// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// gigabit is a link of 1 Gb/s, in bytes per second.
const gigabit = 125e6

// prepare compares the start of a job whose root is unpacked, with the image in a store behind a link of 1 Gb/s and in one
// on this machine, with what the legacy container does: download, MD5 sum, unsquashfs.
func prepare(ctx context.Context, bin, image, work string) ([]comparison, func(), error) {
	dir := filepath.Join(work, "prepare")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	// What a disk does after the last tree was removed differs from run to run.
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=0700"); err != nil {
		return nil, nil, fmt.Errorf("mount a tmpfs to unpack to (needs root): %w", err)
	}
	var servers []*http.Server
	done := func() {
		for _, s := range servers {
			s.Close()
		}
		unix.Unmount(dir, unix.MNT_DETACH)
	}
	var list []comparison
	for _, link := range []struct {
		name   string
		bytesS float64
	}{{"1 Gb/s", gigabit}, {"loopback", 0}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			done()
			return nil, nil, err
		}
		s := &http.Server{Handler: &store{image: image, line: line{bytesS: link.bytesS}}}
		servers = append(servers, s)
		go s.Serve(l)
		url := fmt.Sprintf("http://%s/boot-images/bench/rootfs", l.Addr())
		volume, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
		empty := func(d string) func() error {
			return func() error {
				if err := os.RemoveAll(d); err != nil {
					return err
				}
				return os.Mkdir(d, 0o755)
			}
		}
		list = append(list, comparison{
			name: "prepare over " + link.name + " vs curl, md5sum, unsquashfs",
			ours: side{argv: []string{"env", "IMS_JOB_ID=11111111-2222-3333-4444-555555555555", "IMS_URL=http://" + l.Addr().String(),
				"IMS_ACTION=customize", "SSH_JAIL=True", filepath.Join(bin, "sidecar"), "prepare", volume, url}, before: empty(volume)},
			theirs: side{argv: []string{"bash", "-euc", "cd $0; curl -fsS -o image.sqsh $1; md5sum image.sqsh; unsquashfs -q -n -d image-root image.sqsh", theirs, url},
				before: empty(theirs)},
			goals: goals{speed: 1.5},
		})
	}
	return list, done, nil
}

// store serves the image, and nods at the API's calls.
type store struct {
	image string
	line  line
}

func (s *store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasSuffix(r.URL.Path, "/rootfs") {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, "{}")
		return
	}
	f, err := os.Open(s.image)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer f.Close()
	w.Header().Set("ETag", `"image"`)
	http.ServeContent(&lineWriter{w, &s.line}, r, "", time.Time{}, f)
}

// line is a link whose connections share what it carries; 0: all there is.
type line struct {
	bytesS float64

	mu   sync.Mutex
	free time.Time // when what was sent so far is through
}

func (l *line) send(n int) {
	if l.bytesS == 0 {
		return
	}
	// Sleeping takes longer than it should, so short waits are added up, and what was overslept is made good.
	const slack = 20 * time.Millisecond
	l.mu.Lock()
	now := time.Now()
	if earliest := now.Add(-slack); l.free.Before(earliest) {
		l.free = earliest
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.bytesS * float64(time.Second)))
	wait := l.free.Sub(now)
	l.mu.Unlock()
	if wait > slack/4 {
		time.Sleep(wait)
	}
}

// lineWriter passes an answer through a line; it hides ReadFrom, with which the server would go round it.
type lineWriter struct {
	http.ResponseWriter
	line *line
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.line.send(len(p))
	return w.ResponseWriter.Write(p)
}
