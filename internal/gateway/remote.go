// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// dialTimeout bounds the connection to the remote node.
const dialTimeout = 30 * time.Second

// runRemote serves a job that is built on another node: every connection is passed on, as
// bytes, to the SSH server there. The image root is not here, so nothing is served from
// this container, and a missing port is the end of the job. The end is seen from the plain
// mode's flags in the parent.
func runRemote(ctx context.Context, cfg Config, set *sshdconf.Settings, flags signalfile.Set) error {
	log := cfg.Log
	text, err := readBounded(flags.Path(signalfile.RemotePort), 64)
	port, perr := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 16)
	if err = errors.Join(err, perr); err != nil || port == 0 {
		err = fmt.Errorf("remote build on %s: no port in %s: %w", cfg.SSHD.RemoteBuildNode, flags.Path(signalfile.RemotePort), err)
		return errors.Join(err, flags.Touch(signalfile.Failed), flags.Touch(signalfile.Exiting))
	}
	target := net.JoinHostPort(cfg.SSHD.RemoteBuildNode, strconv.FormatUint(port, 10))
	ls, err := listen(cfg.Listener, set)
	if err != nil {
		return err
	}
	p := proxy{target: target, log: log, open: map[net.Conn]struct{}{}}
	for _, l := range ls {
		go p.serve(l)
		log.Info("listening", "addr", l.Addr().String(), "remote", target)
	}
	script := startScript(cfg.SSHD.CustomizationScript, log)
	defer script.stop()
	flag, err := flags.Wait(ctx, log, signalfile.Failed, signalfile.Complete)
	if err == nil {
		err = script.wait(ctx)
	}
	for _, l := range ls {
		l.Close()
	}
	p.closeAll()
	if err != nil {
		return fmt.Errorf("stopped before the job was marked complete or failed: %w", err)
	}
	log.Info("exiting", "flag", flag)
	return errors.Join(flags.Remove(signalfile.Complete), flags.Touch(signalfile.Exiting))
}

// proxy passes TCP connections on to one address.
type proxy struct {
	target string
	log    *slog.Logger

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
}

func (p *proxy) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.log.Warn("accept", "err", err)
			time.Sleep(time.Second)
			continue
		}
		go p.pass(c)
	}
}

func (p *proxy) pass(client net.Conn) {
	defer client.Close()
	remote, err := net.DialTimeout("tcp", p.target, dialTimeout)
	if err != nil {
		p.log.Error("remote node", "peer", client.RemoteAddr().String(), "err", err)
		return
	}
	defer remote.Close()
	if !p.track(client, remote) {
		return
	}
	defer p.forget(client, remote)
	var wg sync.WaitGroup
	for _, d := range [][2]net.Conn{{remote, client}, {client, remote}} {
		wg.Go(func() {
			n, err := io.Copy(d[0], d[1])
			p.log.Debug("connection passed", "from", d[1].RemoteAddr().String(), "bytes", n, "err", err)
			if t, ok := d[0].(*net.TCPConn); ok {
				t.CloseWrite()
			}
		})
	}
	wg.Wait()
}

func (p *proxy) track(cs ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range cs {
		p.open[c] = struct{}{}
	}
	return !p.closed
}

func (p *proxy) forget(cs ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range cs {
		delete(p.open, c)
	}
}

func (p *proxy) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for c := range p.open {
		c.Close()
	}
}
