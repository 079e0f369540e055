// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Stop removes the sockets that Listen and ListenAgent made, ends every process of the jail, undoes what Start did to the
// image root and writes the root to disk. Processes get SIGTERM, those on a terminal also SIGHUP, and SIGKILL after
// grace, or at once when ctx ends. It returns the names of those that had to be killed.
//
// When Stop returns without error nothing of the jail is left, and nothing writes to the root any more. Later calls
// return what the first one did.
func (j *Jail) Stop(ctx context.Context, grace time.Duration) ([]string, error) {
	j.stopOnce.Do(func() {
		j.killed, j.stopErr = j.stop(ctx, grace)
		close(j.stopDone)
	})
	<-j.stopDone
	return j.killed, j.stopErr
}

func (j *Jail) stop(ctx context.Context, grace time.Duration) (killed []string, err error) {
	j.socks.close(j)
	died := j.Err()
	j.mu.Lock()
	j.stopping = true
	j.mu.Unlock()
	stopHurry := context.AfterFunc(ctx, func() {
		go func() { _, _ = j.request(opStop, &numberMsg{n: 0}, nil) }()
	})
	defer stopHurry()

	// An init that hangs ends nobody: it is killed, and what it leaves is hunted from here.
	hung := time.AfterFunc(max(grace, 0)+2*j.killWait, func() { _ = j.proc.Kill() })
	defer hung.Stop()

	var errs []error
	answer, err := j.request(opStop, &numberMsg{n: uint64(max(grace, 0) / time.Millisecond)}, nil)
	if err == nil {
		var m stoppedMsg
		err = m.decode(answer.body)
		answer.closeFiles()
		killed = m.killed
		if len(m.left) > 0 {
			errs = append(errs, fmt.Errorf("processes that SIGKILL does not end: %s", strings.Join(m.left, ", ")))
		}
	}
	if err != nil && died == nil {
		j.log.Warn("jail init could not end the sessions", "err", err)
	}
	j.conn.close()
	select {
	case <-j.done:
	case <-time.After(j.killWait):
		if j.level != Namespaces && err == nil {
			// Init still hunts; without it nobody would.
			errs = append(errs, errors.New("sessions do not end"))
			break
		}
		_ = j.proc.Kill()
		<-j.done
	}
	// In the namespaces level nothing survives its init: the kernel reaps the PID namespace before the wait returns.
	if j.level != Namespaces {
		j.orphans = died != nil || err != nil || len(errs) > 0
		more, left := j.strayHerd().end(0, nil)
		killed = append(killed, more...)
		if len(left) > 0 {
			errs = append(errs, fmt.Errorf("processes that SIGKILL does not end: %s", strings.Join(left, ", ")))
		}
	}
	errs = append(errs, j.dir.restore(), j.dir.sync(), j.dir.f.Close())
	if err := errors.Join(errs...); err != nil {
		return killed, fmt.Errorf("stop jail: %w", err)
	}
	return killed, nil
}

// strayHerd is what init left behind, which is nothing unless somebody killed it.
func (j *Jail) strayHerd() herd {
	// The gateway has children of its own: that it has none of the jail's is not provable, only likely.
	const looks = 10
	quiet := 0
	return herd{
		list: j.strays,
		strike: func() {
			if j.orphans {
				killDescendants(os.Getpid())
			}
			quiet = 0
		},
		gone: func() bool {
			if !j.orphans {
				return true
			}
			for ; quiet < looks; quiet++ {
				if procs, err := j.strays(); err != nil || len(procs) > 0 {
					return false
				}
			}
			return true
		},
	}
}

// strays lists what is left: in the chroot level everything rooted in the image, and after init's death the descendants
// that came to the gateway as the next reaper and do not share its session.
func (j *Jail) strays() ([]procInfo, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	session, err := unix.Getsid(0)
	if err != nil {
		return nil, err
	}
	var found []procInfo
	if j.level == Chroot {
		found = rootedAt(all, j.dir.st.Dev, j.dir.st.Ino)
	}
	if j.orphans {
		for _, p := range descendants(all, self) {
			if p.session == session {
				continue
			}
			if p.dead() && p.ppid == self {
				_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
			}
			found = append(found, p)
		}
	}
	return living(found, self), nil
}
