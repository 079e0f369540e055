// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/embedgw"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

const (
	bucketImages = "boot-images"
	bucketIMS    = "ims"

	// s3Ready bounds the wait for the first answer of the store.
	s3Ready = 30 * time.Second
)

// s3Keys are the store's one pair of keys.
type s3Keys struct {
	AccessKey string `json:"access_key"`
	SecretKey string `json:"secret_key"`
}

// s3Setup is what the S3 child is told on its standard input.
type s3Setup struct {
	Keys   s3Keys `json:"keys"`
	Listen string `json:"listen"`
	Dir    string `json:"dir"` // objects
	// SideDir is for metadata where the file system has no user xattrs. The
	// backend refuses one whose path begins with that of Dir, even as text.
	SideDir string `json:"sidedir"`
}

// s3Child serves S3 until it is killed. It is a process of its own because the
// posix backend works relative to the working directory and knows only one
// instance per process.
func s3Child(stdin io.Reader) int {
	if err := serveS3(stdin); err != nil {
		fmt.Fprintln(os.Stderr, "S3 server:", err)
		return 1
	}
	return 0
}

func serveS3(stdin io.Reader) error {
	var s s3Setup
	if err := readSetup(stdin, &s); err != nil {
		return err
	}
	var store meta.MetadataStorer = meta.XattrMeta{}
	opts := posix.PosixOpts{
		NewDirPerm:  0o700,
		NewFilePerm: 0o600,
		// one server-side copy of any size: there is no 5 GiB limit to imitate
		CopyObjectThreshold: 1 << 50,
		Concurrency:         64,
	}
	if err := (meta.XattrMeta{}).Test(s.Dir); err != nil {
		if err := os.MkdirAll(s.SideDir, 0o700); err != nil {
			return err
		}
		side, err := meta.NewSideCar(s.SideDir)
		if err != nil {
			return err
		}
		store, opts.SideCarDir = side, s.SideDir
	}
	backend, err := posix.New(s.Dir, store, opts)
	if err != nil {
		return err
	}
	return embedgw.RunVersityGW(context.Background(), backend, &embedgw.Config{
		RootUserAccess:    s.Keys.AccessKey,
		RootUserSecret:    s.Keys.SecretKey,
		Ports:             []string{s.Listen},
		MaxConnections:    1024,
		MaxRequests:       1024,
		MultipartMaxParts: 10000,
		KeepAlive:         true,
		Quiet:             true,
	})
}

// s3Server is the running store.
type s3Server struct {
	*child
	keys     s3Keys
	endpoint string // http://host:port
}

// startS3 starts the store of a data directory and waits until it answers.
// listen is the address, its port 0 for a free one.
func startS3(ctx context.Context, data, listen string, log *slog.Logger) (*s3Server, error) {
	keys, err := loadKeys(filepath.Join(data, "s3-credentials"))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(data, "s3")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// versitygw cannot be handed a listener nor asked for its port
	held, addr, err := port.Hold(listen)
	if err != nil {
		return nil, fmt.Errorf("S3 server: %w; give another --s3-listen", err)
	}
	defer held.Close()
	out, err := os.OpenFile(filepath.Join(data, "s3.log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	c, err := startChild(modeS3, s3Setup{Keys: keys, Listen: addr.String(), Dir: dir, SideDir: filepath.Join(data, "object-metadata")}, out, syscall.SysProcAttr{})
	if err != nil {
		return nil, err
	}
	s := &s3Server{child: c, keys: keys, endpoint: "http://" + reachable(addr)}
	if err := s.ready(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("S3 server: %w; %s says: %s", err, out.Name(), lastLine(out.Name()))
	}
	log.Info("S3 server runs", "endpoint", s.endpoint, "bucket", bucketImages)
	return s, nil
}

// lastLine is the last line of a file, for an error text.
func lastLine(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}

// ready creates the buckets, which proves that the store answers.
func (s *s3Server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s3Ready, fmt.Errorf("no answer within %s", s3Ready))
	defer cancel()
	go func() {
		select {
		case <-s.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	for _, bucket := range []string{bucketImages, bucketIMS} {
		client, err := s.client(bucket)
		if err != nil {
			return err
		}
		if err := client.MakeBucket(ctx); err != nil {
			select {
			case <-s.done:
				return fmt.Errorf("ended at once: %s", s.exit())
			default:
				return err
			}
		}
	}
	return nil
}

// client is an S3 client for one bucket. Its retries are short: the store is on
// this machine and lives as long as we do.
func (s *s3Server) client(bucket string) (*upload.S3, error) {
	return upload.NewS3(upload.S3Config{
		Endpoint: s.endpoint, AccessKey: s.keys.AccessKey, SecretKey: s.keys.SecretKey, Bucket: bucket,
		Budget: s3Ready, RetryPause: 20 * time.Millisecond,
	})
}

// stop ends the store. The posix backend makes objects appear by rename, so
// there is nothing to lose in a kill.
func (s *s3Server) stop() {
	s.kill()
	<-s.done
}

// loadKeys reads the store's keys, or makes them on the first start.
func loadKeys(path string) (s3Keys, error) {
	var keys s3Keys
	err := loadOnce(path, &keys, func() error {
		keys = s3Keys{AccessKey: "ims" + rand.Text()[:13], SecretKey: rand.Text() + rand.Text()}
		return nil
	})
	if err == nil && (keys.AccessKey == "" || keys.SecretKey == "") {
		err = fmt.Errorf("%s: holds no keys; remove it to get new ones", path)
	}
	return keys, err
}

// reachable is where this machine reaches a listening address.
func reachable(addr *net.TCPAddr) string {
	if addr.IP.IsUnspecified() {
		addr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: addr.Port}
	}
	return addr.String()
}
