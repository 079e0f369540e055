// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// observe opens what shows a running job to its operators, until closeListeners. Metrics were asked for; the status socket was
// not, so a container that has no place for it is no reason to fail the job.
func (g *gate) observe() error {
	if addr := g.set.MetricsListen; addr != "" {
		srv, at, err := g.srv.seen.serve(addr, g.jail.Level(), g.log)
		if err != nil {
			return err
		}
		g.observers = append(g.observers, srv)
		g.log.Info("serving metrics", "url", "http://"+at.String()+"/metrics")
	}
	dir := g.cfg.RunDir
	if dir == "" {
		dir = DefaultRunDir
	}
	l, err := listenStatus(dir, g.cfg.SSHD.JobID)
	if err != nil {
		g.log.Warn("sshd status will not work", "err", err)
		return nil
	}
	g.observers = append(g.observers, l)
	go g.srv.serveStatus(l, g.cfg.SSHD.JobID)
	return nil
}

// abandon marks the job failed when it had no session for AbandonTimeout; the customization script counts as one, and a
// command whose client has gone. What was left running in the background does not.
func (g *gate) abandon(ctx context.Context, script *script) {
	select {
	case <-script.done:
	case <-ctx.Done():
		return
	}
	limit := g.set.AbandonTimeout
	g.srv.seen.active.Store(time.Now().UnixNano())
	for {
		idle := time.Duration(0)
		if g.srv.sessions() == 0 && g.srv.outlived.Load() == 0 {
			idle = time.Since(g.srv.seen.lastActivity())
		}
		if idle >= limit {
			g.log.Warn("job abandoned: nobody was there, so it is marked failed", "AbandonTimeout", limit, "flag", g.flags.Path(signalfile.Failed))
			err := g.flags.Touch(signalfile.Failed)
			if err == nil {
				return
			}
			g.log.Error("job abandoned; trying again", "err", err)
		}
		select {
		case <-time.After(min(max(limit-idle, time.Second), time.Minute)):
		case <-ctx.Done():
			return
		}
	}
}
