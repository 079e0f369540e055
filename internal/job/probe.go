// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// probeComment marks the probe's key in authorized_keys.
const probeComment = "ims-buildenv-login-probe"

const (
	// sshdTimeout is for the container to come: its image may have to be pulled.
	sshdTimeout  = 30 * time.Minute
	probeTimeout = 2 * time.Minute // from then on, for sshd to let the probe in
	probePause   = 250 * time.Millisecond
	probeAttempt = 20 * time.Second
)

// probe logs in the way a user will. CFS gives a session up at the first
// refused connection after waiting_on_user, so that status needs proof, and
// only a login proves listener, keys and jail together.
type probe struct {
	addr   string
	signer ssh.Signer
	log    *slog.Logger
}

func newProbe(port int, log *slog.Logger) (*probe, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return nil, err
	}
	return &probe{addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), signer: signer, log: log}, nil
}

// keyLine is the probe's line for authorized_keys: good for a command, for
// neither terminal nor forwarding.
func (p *probe) keyLine() []byte {
	key := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(p.signer.PublicKey())))
	return []byte("restrict " + key + " " + probeComment + "\n")
}

// login repeats until a command has run or ctx ends; or sshd does not listen within start, or lets nobody in within timeout
// from then on.
func (p *probe) login(ctx context.Context, start, timeout time.Duration) error {
	began := time.Now()
	var deadline time.Time // zero: nobody listens yet
	for {
		err := p.try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if now := time.Now(); deadline.IsZero() && errors.Is(err, unix.ECONNREFUSED) {
			if now.Sub(began) > start {
				return fmt.Errorf("no sshd listens at %s after %s; see whether the container sshd has started (kubectl describe pod)", p.addr, start)
			}
		} else if deadline.IsZero() {
			deadline = now.Add(timeout)
		} else if now.After(deadline) {
			return fmt.Errorf("sshd at %s let nobody in for %s: %w; see the log of the container sshd", p.addr, timeout, err)
		}
		p.log.Debug("waiting for sshd", "error", err)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(probePause):
		}
	}
}

func (p *probe) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeAttempt)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", p.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var hostKey ssh.PublicKey
	c, channels, requests, err := ssh.NewClientConn(conn, p.addr, &ssh.ClientConfig{
		User: "root",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(p.signer)},
		// The peer is the pod's own loopback, and its key was made a moment ago.
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error { hostKey = key; return nil },
	})
	if err != nil {
		return err
	}
	client := ssh.NewClient(c, channels, requests)
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	err = session.Run("true")
	var exit *ssh.ExitError
	if errors.As(err, &exit) {
		// sshd did its part; an image without a shell still takes sftp.
		p.log.Warn("a login works, but the command true does not; the image may lack a shell", "status", exit.ExitStatus(), "message", exit.Msg())
	} else if err != nil {
		return err
	}
	p.log.Info("a login works", "address", p.addr, "host_key", ssh.FingerprintSHA256(hostKey), "host_key_type", hostKey.Type())
	return nil
}

const (
	watchPause  = 10 * time.Second
	watchMisses = 6

	// closingTime is how long sshd may take from the user's flag, when it
	// closes its port, to the exiting flag: ending sessions and syncing a slow
	// volume.
	closingTime = 15 * time.Minute
)

// watchSSHD returns an error when the sshd container has died: its port, which
// the pod's containers share, is no longer listened on. It looks into the
// kernel's table instead of connecting, which would fill sshd's log for days.
func (r *run) watchSSHD(ctx context.Context) error {
	ticker := time.NewTicker(cmp.Or(r.deps.tune.watchPause, watchPause))
	defer ticker.Stop()
	misses := 0
	var closing time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		up, err := listening(r.cfg.SSHPort)
		if err != nil {
			r.log.Warn("cannot watch over the sshd container", "error", err)
			return nil
		}
		if up {
			misses = 0
			continue
		}
		if r.handingOver() {
			if closing.IsZero() {
				closing = time.Now()
			}
			if time.Since(closing) < closingTime {
				misses = 0
				continue
			}
		}
		if misses++; misses >= watchMisses {
			return errSSHDGone
		}
	}
}

// handingOver reports whether the user has ended the job, so that sshd is
// expected to close its port.
func (r *run) handingOver() bool {
	for _, n := range []signalfile.Name{signalfile.Complete, signalfile.Failed} {
		if found, err := r.flags.Exists(n); err == nil && found {
			return true
		}
	}
	return false
}

// listening looks a port up in /proc/net/tcp and tcp6 (proc_net_tcp.rst in the
// kernel's documentation: local address second, state fourth, 0A is LISTEN).
func listening(port int) (bool, error) {
	var errs []error
	for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		found := listeningIn(f, port)
		f.Close()
		if found {
			return true, nil
		}
	}
	if len(errs) == 2 {
		return false, errors.Join(errs...)
	}
	return false, nil
}

func listeningIn(table io.Reader, port int) bool {
	suffix := fmt.Sprintf(":%04X", port)
	for lines := bufio.NewScanner(table); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], suffix) {
			return true
		}
	}
	return false
}
