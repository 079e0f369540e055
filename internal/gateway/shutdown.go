// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"sync"
	"time"
)

// lookEvery is how often the end of sessions is looked for.
const lookEvery = 10 * time.Millisecond

// quiesce returns when no command is running that is not a person's shell, and no
// connection ended one within quietTime, or after grace.
func (s *server) quiesce(grace time.Duration) {
	deadline := time.Now().Add(grace)
	for time.Now().Before(deadline) && s.active(time.Now()) {
		time.Sleep(lookEvery)
	}
}

func (s *server) active(now time.Time) bool {
	if s.outlived.Load() > 0 {
		return true
	}
	for _, c := range s.snapshot() {
		for _, ss := range c.sessionList() {
			if ss.busy() {
				return true
			}
		}
		c.mu.Lock()
		recent := now.Sub(c.lastEnd) < quietTime
		c.mu.Unlock()
		if recent {
			return true
		}
	}
	return false
}

// hangUp ends every session on a terminal, with a line that says why.
func (s *server) hangUp(why string) {
	var wg sync.WaitGroup
	for _, c := range s.snapshot() {
		for _, ss := range c.sessionList() {
			wg.Go(func() {
				defer c.guard("hang-up")
				ss.hangUp(why)
			})
		}
	}
	wg.Wait()
}

// part closes every connection, after giving the sessions, whose commands have ended, at
// most d to tell their clients so.
func (s *server) part(d time.Duration, why string) {
	deadline := time.Now().Add(d)
	for time.Now().Before(deadline) && s.sessions() > 0 {
		time.Sleep(lookEvery)
	}
	for _, c := range s.snapshot() {
		c.end(why)
	}
}

// sessions counts the sessions that have a command.
func (s *server) sessions() (n int) {
	for _, c := range s.snapshot() {
		for _, ss := range c.sessionList() {
			if ss.process() != nil {
				n++
			}
		}
	}
	return n
}
