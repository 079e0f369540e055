// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// procInfo is one process as /proc/PID/stat shows it (proc_pid_stat(5)).
type procInfo struct {
	pid, ppid, session int
	name               string
	state              byte
	tty                int    // device number of the controlling terminal, 0 without one
	start              uint64 // clock ticks after boot; with pid it names a process for good
}

func (p procInfo) String() string { return fmt.Sprintf("%s[%d]", p.name, p.pid) }

// dead reports whether only the process's entry is left.
func (p procInfo) dead() bool { return p.state == 'Z' || p.state == 'X' }

// processes lists all processes of the PID namespace that /proc shows.
func processes() ([]procInfo, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var procs []procInfo
	for _, n := range names {
		if n[0] < '1' || n[0] > '9' {
			continue
		}
		b, err := os.ReadFile("/proc/" + n + "/stat")
		if err != nil {
			continue // it ended meanwhile
		}
		if p, ok := parseStat(b); ok {
			procs = append(procs, p)
		}
	}
	return procs, nil
}

// parseStat takes a stat line apart. The name is the user's text and may hold spaces and parentheses: it ends at the
// last one.
func parseStat(b []byte) (procInfo, bool) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return procInfo{}, false
	}
	f := bytes.Fields(b[end+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return procInfo{}, false
	}
	p := procInfo{name: string(b[open+1 : end]), state: f[0][0]}
	for _, v := range []struct {
		field []byte
		to    *int
	}{{bytes.TrimSpace(b[:open]), &p.pid}, {f[1], &p.ppid}, {f[3], &p.session}, {f[4], &p.tty}} {
		n, err := strconv.Atoi(string(v.field))
		if err != nil {
			return procInfo{}, false
		}
		*v.to = n
	}
	start, err := strconv.ParseUint(string(f[19]), 10, 64)
	p.start = start
	return p, err == nil
}

// descendants picks those of procs that root is an ancestor of.
func descendants(procs []procInfo, root int) []procInfo {
	children := make(map[int][]procInfo)
	for _, p := range procs {
		children[p.ppid] = append(children[p.ppid], p)
	}
	var found []procInfo
	for todo := []int{root}; len(todo) > 0; todo = todo[1:] {
		for _, c := range children[todo[0]] {
			found = append(found, c)
			todo = append(todo, c.pid)
		}
		delete(children, todo[0])
	}
	return found
}

// rootedAt picks those of procs whose root directory is the given one.
func rootedAt(procs []procInfo, dev, ino uint64) []procInfo {
	var found []procInfo
	for _, p := range procs {
		var st unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/root", p.pid), &st) == nil && st.Dev == dev && st.Ino == ino {
			found = append(found, p)
		}
	}
	return found
}

// living returns procs once each, without the dead and without self.
func living(procs []procInfo, self int) []procInfo {
	seen := map[int]bool{self: true}
	var found []procInfo
	for _, p := range procs {
		if !seen[p.pid] && !p.dead() {
			seen[p.pid] = true
			found = append(found, p)
		}
	}
	return found
}

const (
	killPoll = 10 * time.Millisecond

	// killWait is how long processes may take to vanish after SIGKILL; only one stuck in the kernel takes that long.
	killWait = 20 * time.Second

	// strikes is how often strike is called between two listings: a listing takes milliseconds, a fork less than one.
	strikes = 32
)

// herd is a set of processes to be ended.
type herd struct {
	list   func() ([]procInfo, error) // those alive that a look at /proc shows
	strike func()                     // kill quickly whatever can be found quickly
	gone   func() bool                // asked after an empty list: there is really nothing left
}

// empty reports whether nothing is left of procs and besides.
func (h herd) empty(procs []procInfo, err error) bool {
	return err == nil && len(procs) == 0 && h.gone()
}

// end ends the herd: SIGTERM, and SIGHUP too where there is a terminal, because interactive shells ignore the former;
// SIGKILL when hurry is closed or the grace is over. It returns the names of those it had to kill and of those that are
// still there.
func (h herd) end(grace time.Duration, hurry <-chan struct{}) (killed, left []string) {
	if grace > 0 && h.ask(grace, hurry) {
		return nil, nil
	}
	names := make(map[procInfo]bool)
	for end := time.Now().Add(killWait); ; {
		procs, err := h.list()
		if h.empty(procs, err) {
			return killed, nil
		}
		for _, p := range procs {
			if key := (procInfo{pid: p.pid, start: p.start}); !names[key] && len(killed) < maxList {
				names[key] = true
				killed = append(killed, p.String())
			}
			unix.Kill(p.pid, unix.SIGKILL)
		}
		if time.Now().After(end) {
			if err != nil {
				left = append(left, err.Error())
			}
			for _, p := range procs[:min(len(procs), maxList-1)] {
				left = append(left, p.String())
			}
			if len(left) == 0 {
				left = append(left, "processes too short-lived to be seen")
			}
			return killed, left
		}
		for range strikes {
			h.strike()
		}
	}
}

// ask sends the polite signals, to those that appear later as well, and reports whether all went in time. SIGHUP follows a
// look after SIGTERM: at its prompt bash notes only the last of two that come at once, and ignores the latter.
func (h herd) ask(grace time.Duration, hurry <-chan struct{}) bool {
	deadline := time.After(grace)
	asked := make(map[procInfo]int) // how often
	tick := time.NewTicker(killPoll)
	defer tick.Stop()
	for {
		procs, err := h.list()
		if h.empty(procs, err) {
			return true
		}
		for _, p := range procs {
			key := procInfo{pid: p.pid, start: p.start}
			switch n := asked[key]; {
			case n == 0:
				unix.Kill(p.pid, unix.SIGTERM)
			case n == 1 && p.tty != 0:
				unix.Kill(p.pid, unix.SIGHUP)
			default:
				continue
			}
			asked[key]++
			unix.Kill(p.pid, unix.SIGCONT)
		}
		select {
		case <-tick.C:
		case <-deadline:
			return false
		case <-hurry:
			return false
		}
	}
}

// AdoptOrphans has all descendants of the calling process stay its descendants, whoever of them ends.
func AdoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	return nil
}

// KillDescendants kills all descendants of the calling process, after AdoptOrphans, but those in its own session. An error
// names what SIGKILL does not end.
func KillDescendants() error {
	self := os.Getpid()
	session, err := unix.Getsid(0)
	if err != nil {
		return err
	}
	_, left := herd{
		list: func() ([]procInfo, error) {
			all, err := processes()
			ours := slices.DeleteFunc(descendants(all, self), func(p procInfo) bool { return p.session == session })
			return living(ours, self), err
		},
		strike: func() { killDescendants(self) },
		gone:   func() bool { return true },
	}.end(0, nil)
	if len(left) > 0 {
		return fmt.Errorf("processes that SIGKILL does not end: %s", strings.Join(left, ", "))
	}
	return nil
}

// killDescendants kills what it finds of self's descendants, except those in self's own session. A process that forks and
// exits all the time is faster than any listing of /proc; its heir is a child of self, though, and the kernel lists those
// at once (where it is built with CONFIG_PROC_CHILDREN). A process group dies in one blow, forks and all; a group in
// another session than self's consists of descendants only.
func killDescendants(self int) {
	session, err := unix.Getsid(0)
	if err != nil {
		return
	}
	seen := make(map[int]bool)
	for todo := children(self); len(todo) > 0; todo = todo[1:] {
		pid := todo[0]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		if sid, err := unix.Getsid(pid); err == nil && sid != session {
			if group, err := unix.Getpgid(pid); err == nil && group > 1 {
				unix.Kill(-group, unix.SIGKILL)
			}
			unix.Kill(pid, unix.SIGKILL)
		}
		todo = append(todo, children(pid)...)
	}
}

// children lists pid's children.
func children(pid int) []int {
	var pids []int
	task := fmt.Sprintf("/proc/%d/task", pid)
	threads, err := os.ReadDir(task)
	if err != nil {
		return nil
	}
	for _, t := range threads {
		b, err := os.ReadFile(task + "/" + t.Name() + "/children")
		if err != nil {
			continue
		}
		for _, f := range bytes.Fields(b) {
			if n, err := strconv.Atoi(string(f)); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}
