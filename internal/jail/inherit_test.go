// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNothingInherited promises that nothing of the gateway's own process state reaches anything that runs in the jail.
func TestNothingInherited(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		// A file that was leaked to this process, and a signal that it ignores.
		leak, err := unix.Open("/etc", unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(leak)
		signal.Ignore(unix.SIGUSR2)
		defer signal.Reset(unix.SIGUSR2)
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		for name, req := range map[string]Request{
			"exec":             {Kind: Exec, Command: "read x"},
			"exec on terminal": {Kind: Exec, Command: "read x", TTY: &TTY{Term: "dumb"}},
			"shell":            {Kind: Shell},
			"sftp":             {Kind: SFTP},
		} {
			if level == Plain && req.Kind == Shell {
				continue // it does what this machine's profile says
			}
			t.Run(name, func(t *testing.T) { inherited(t, j, req) })
		}
	})
}

// inherited starts req and looks at the process from outside.
func inherited(t *testing.T, j *Jail, req Request) {
	t.Helper()
	theirs, ours, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if req.TTY == nil {
		req.Stdin = theirs
	}
	before := children(j.proc.Pid)
	p, err := j.Spawn(req)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ours.Close()
		if p.PTY() != nil {
			p.PTY().Close()
		}
		p.Wait()
	}()
	var proc string
	for _, pid := range children(j.proc.Pid) {
		if !slices.Contains(before, pid) {
			proc = fmt.Sprintf("/proc/%d", pid)
		}
	}

	// It may still be on its way to what it is going to be; then there are more descriptors, and other capabilities.
	want := map[string]string{
		"descriptors": "[0 1 2]", "SigBlk": "0", "SigIgn": "0 <nil>", "CapInh": "0", "CapAmb": "0", "CapPrm": fmt.Sprintf("%x", j.caps),
		"CapBnd": fmt.Sprintf("%x", j.caps), "Umask": "0022", "Gid": "0 0 0 0", "Uid": "0 0 0 0",
		"own session": "true", "controlling terminal": fmt.Sprint(req.TTY != nil),
		"oom_score_adj below 0": "false",
	}
	var got map[string]string
	defer func() {
		for key := range want {
			if got[key] != want[key] {
				t.Errorf("%s: %q, want %q", key, got[key], want[key])
			}
		}
	}()
	eventually(t, "a neutral process", func() bool {
		got = processState(proc)
		return maps.Equal(got, want)
	})
}

// processState reads what a process may have inherited, except what the Go runtime opens for itself: files without a type.
func processState(proc string) map[string]string {
	state := map[string]string{}
	b, _ := os.ReadFile(proc + "/status")
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		switch key {
		case "SigIgn":
			n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			n &^= 1 << (unix.SIGQUIT - 1) // bash ignores it
			state[key] = fmt.Sprintf("%x %v", n, err)
		case "SigBlk", "CapInh", "CapAmb", "CapPrm", "CapBnd":
			if value = strings.TrimLeft(strings.TrimSpace(value), "0"); value == "" {
				value = "0"
			}
			state[key] = value
		case "Umask", "Uid", "Gid":
			state[key] = strings.Join(strings.Fields(value), " ")
		}
	}
	var open []string
	entries, _ := os.ReadDir(proc + "/fd")
	for _, e := range entries {
		link, err := os.Readlink(proc + "/fd/" + e.Name())
		// In the plain level the runtime also finds the container's CPU limit.
		if err == nil && !strings.HasPrefix(link, "anon_inode:") && !strings.HasPrefix(link, "/sys/fs/cgroup/cpu") {
			open = append(open, e.Name())
		}
	}
	state["descriptors"] = fmt.Sprint(open)
	b, _ = os.ReadFile(proc + "/stat")
	if p, ok := parseStat(b); ok {
		state["own session"] = fmt.Sprint(p.session == p.pid)
		state["controlling terminal"] = fmt.Sprint(p.tty != 0)
	}
	b, _ = os.ReadFile(proc + "/oom_score_adj")
	state["oom_score_adj below 0"] = fmt.Sprint(strings.HasPrefix(string(b), "-"))
	return state
}
