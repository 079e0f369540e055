// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
)

// publish compares what comes after the user's work when there is no image to take anything from, with the store behind
// links of 100 Mb/s and 1 Gb/s and on this machine: our whole sequence beside our own tools one after the other.
func publish(ctx context.Context, bin, image, work string) (list []comparison, done func(), err error) {
	dir := filepath.Join(work, "publish")
	if err := os.MkdirAll(filepath.Join(dir, "mnt/build"), 0o700); err != nil {
		return nil, nil, err
	}
	tree, sidecar := filepath.Join(dir, "mnt/build/image-root"), filepath.Join(bin, "sidecar")
	if out, err := exec.CommandContext(ctx, sidecar, "unpack", image, tree).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("%w\n%s", err, out)
	}
	s, err := serveStore(ctx, bin, dir)
	if err != nil {
		return nil, nil, err
	}
	closers := []func(){s.stop}
	done = func() {
		for _, c := range closers {
			c()
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	api, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	nods := &http.Server{Handler: http.HandlerFunc(nod)}
	go nods.Serve(api)
	closers = append(closers, func() { nods.Close() })
	for _, link := range []struct {
		name   string
		bytesS float64
	}{{"100 Mb/s", gigabit / 10}, {"1 Gb/s", gigabit}, {"loopback", 0}} {
		to := s.address
		if link.bytesS > 0 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, nil, err
			}
			go forward(l, s.address, &line{bytesS: link.bytesS})
			closers = append(closers, func() { l.Close() })
			to = l.Addr().String()
		}
		env := append(s.environ(), "IMS_URL=http://"+api.Addr().String(), "IMS_JOB_ID="+uuid.NewString(), "IMAGE_ROOT_PARENT="+filepath.Join(dir, "mnt"),
			"IMAGE_ROOT_ARCHIVE_NAME=bench", "S3_ENDPOINT=http://"+to, "S3_BUCKET=boot-images", "S3_SSL_VALIDATE=false")
		c := comparison{
			name: "publish over " + link.name + " vs sidecar pack, then sidecar upload",
			ours: side{argv: []string{sidecar, "package-and-upload"}, env: env},
			theirs: side{argv: []string{"bash", "-euc", `cd "$0"; "$2" pack "$1" new.sqsh >/dev/null
"$2" upload --name bench --rootfs new.sqsh --kernel "$1/boot/vmlinuz" --initrd "$1/boot/initrd" >/dev/null; rm new.sqsh`,
				dir, tree, sidecar}, env: env},
			goals: goals{speed: 1},
		}
		if link.bytesS > 0 && link.bytesS < gigabit {
			c = c.once()
		}
		list = append(list, c)
	}
	return list, done, nil
}

// s3Server is imslocal's.
type s3Server struct {
	address string
	stop    func()

	keys struct {
		Access string `json:"access_key"`
		Secret string `json:"secret_key"`
	}
}

// environ is our own, with the server's keys.
func (s *s3Server) environ() []string {
	return append(os.Environ(), "S3_ACCESS_KEY="+s.keys.Access, "S3_SECRET_KEY="+s.keys.Secret)
}

// serveStore starts one with its data below dir.
func serveStore(ctx context.Context, bin, dir string) (*s3Server, error) {
	held, addr, err := port.Hold("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer held.Close()
	s := &s3Server{address: addr.String()}
	data := filepath.Join(dir, "data")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "imslocal"), "serve", "--data", data, "--runner", "none", "--listen", "127.0.0.1:0", "--s3-listen", s.address)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s.stop = func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
	for range 100 {
		if err = s.connect(filepath.Join(data, "s3-credentials")); err == nil {
			return s, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	s.stop()
	return nil, fmt.Errorf("imslocal's store does not answer: %w", err)
}

// connect reads the keys and tries whether somebody listens.
func (s *s3Server) connect(credentials string) error {
	b, err := os.ReadFile(credentials)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &s.keys); err != nil {
		return err
	}
	c, err := net.Dial("tcp", s.address)
	if err != nil {
		return err
	}
	return c.Close()
}

// nod answers every call of the API with a new record.
func nod(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"id": %q, "name": "bench"}`, uuid.NewString())
}

// forward passes connections on to an address through a line.
func forward(l net.Listener, to string, ln *line) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			s, err := net.Dial("tcp", to)
			if err != nil {
				return
			}
			defer s.Close()
			var both sync.WaitGroup
			for _, way := range [][2]*net.TCPConn{{c.(*net.TCPConn), s.(*net.TCPConn)}, {s.(*net.TCPConn), c.(*net.TCPConn)}} {
				both.Go(func() {
					io.Copy(lineConn{way[1], ln}, onlyReader{way[0]}) // a broken transfer shows at both ends
					way[1].CloseWrite()
				})
			}
			both.Wait()
		}()
	}
}

// lineConn passes what is written through a line; both hide what would go round it.
type lineConn struct {
	to   io.Writer
	line *line
}

func (c lineConn) Write(p []byte) (int, error) {
	c.line.send(len(p))
	return c.to.Write(p)
}

type onlyReader struct{ io.Reader }
