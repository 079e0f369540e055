// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
	"golang.org/x/sys/unix"
)

// TestBackgroundLives promises that what a session leaves in the background lives until Stop, and not longer.
func TestBackgroundLives(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		file := filepath.Join(root, "tmp/alive")
		inside := rootPrefix(level, root) + "/tmp/alive"
		output(t, j, fmt.Sprintf("setsid sh -c 'while :; do echo x >> %s; sleep 0.01; done' < /dev/null > /dev/null 2>&1 &", inside))
		size := func() int64 {
			fi, err := os.Stat(file)
			if err != nil {
				return 0
			}
			return fi.Size()
		}
		eventually(t, "the writer writes", func() bool { return size() > 0 })
		before := size()
		output(t, j, "true")
		eventually(t, "the writer goes on", func() bool { return size() > before })
		killed, err := j.Stop(t.Context(), time.Minute)
		if err != nil || len(killed) != 0 {
			t.Errorf("stop: %v, %v", killed, err)
		}
		expectQuiet(t, root, level)
	})
}

// expectQuiet fails if any process is left that could write to root.
func expectQuiet(t *testing.T, root string, level Level) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		t.Fatal(err)
	}
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	if left := rootedAt(all, st.Dev, st.Ino); len(left) > 0 {
		t.Errorf("level %s: left in the root: %v", level, left)
	}
	// This process is the next reaper: whatever outlived init, even for a moment, is now a child of it, dead or alive.
	if left := descendants(all, os.Getpid()); len(left) > 0 {
		t.Errorf("level %s: left of the jail: %d, %v", level, len(left), left[:min(10, len(left))])
	}
}

// TestStopStubborn promises that nothing writes to the root after Stop. ATTACK: a process ignores every signal it can,
// hides from its parent, keeps forking, and writes on.
func TestStopStubborn(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		inside := rootPrefix(level, root) + "/tmp"
		script := fmt.Sprintf(`trap '' TERM HUP INT CONT; cd %s
fork() { echo $1 >> log; (trap '' TERM HUP; sleep 0.02; fork $(($1+1))) & }
for i in 1 2 3; do setsid bash -c 'trap "" TERM HUP; while :; do echo x >> writer; done' & done
fork 0; touch started; sleep 1000`, inside)
		var wg sync.WaitGroup
		var exit Exit
		wg.Go(func() { _, _, exit, _ = tryRun(j, Request{Kind: Exec, Command: script}) })
		eventually(t, "it has started", func() bool { return exists(filepath.Join(root, "tmp/started")) })
		killed, err := j.Stop(t.Context(), 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		expectQuiet(t, root, level)
		names := strings.Join(killed, " ")
		if !strings.Contains(names, "bash[") || !strings.Contains(names, "sleep[") {
			t.Errorf("killed: %v", killed)
		}
		fi, err := os.Stat(filepath.Join(root, "tmp/writer"))
		if err != nil || fi.Size() == 0 {
			t.Errorf("the writer did not write: %v", err)
		}
		wg.Wait()
		if exit.Signal != unix.SIGKILL {
			t.Errorf("the session ended with %+v", exit)
		}
		if _, err := j.Spawn(Request{Kind: Exec, Command: "true"}); !errors.Is(err, ErrStopped) {
			t.Errorf("spawn after stop: %v", err)
		}
		if again, err := j.Stop(t.Context(), time.Hour); err != nil || !slices.Equal(again, killed) {
			t.Errorf("second stop: %v, %v", again, err)
		}
		if err := j.Err(); err != nil {
			t.Errorf("error after an orderly stop: %v", err)
		}
	})
}

// TestStopShell promises that a login shell, which ignores SIGTERM, is hung up within the grace, however slow the machine.
func TestStopShell(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		p, err := j.Spawn(Request{Kind: Shell, TTY: &TTY{Term: "dumb"}})
		if err != nil {
			t.Fatal(err)
		}
		defer p.PTY().Close()
		if _, err := p.PTY().Read(make([]byte, 1)); err != nil { // its prompt: it ignores signals by now
			t.Fatal(err)
		}
		if killed, err := j.Stop(t.Context(), time.Minute); err != nil || len(killed) != 0 {
			t.Errorf("stop: %v, %v", killed, err)
		}
		if e := p.Wait(); e.Signal != unix.SIGHUP {
			t.Errorf("the login shell ended with %+v", e)
		}
		expectQuiet(t, root, level)
	})
}

// TestStopTells promises that every session learns what ended it, however many end in the moment of Stop.
func TestStopTells(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		for range 2 {
			j := startJail(t, Config{Root: newRoot(t), Level: level})
			var all []*Process
			for range 100 {
				p, err := j.Spawn(Request{Kind: Exec, Command: "exec sleep 1000"})
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, p)
			}
			if _, err := j.Stop(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			for i, p := range all {
				if e := p.Wait(); e.Signal != unix.SIGKILL && e.Signal != unix.SIGTERM {
					t.Errorf("session %d ended with %+v", i, e)
				}
			}
		}
	})
}

// TestStopInitStopped promises that Stop returns although init has been stopped, by whoever could signal it.
func TestStopInitStopped(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		if _, err := j.Spawn(Request{Kind: Exec, Command: "sleep 1000"}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(j.proc.Pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		if _, err := j.Stop(t.Context(), time.Minute); err != nil {
			t.Errorf("stop: %v", err)
		}
		expectQuiet(t, root, level)
	})
}

// TestStopInitHangs promises that Stop returns although init does nothing any more, and no signal but SIGKILL changes that.
func TestStopInitHangs(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		var log strings.Builder
		j := startJail(t, Config{Root: root, Level: level, Log: slog.New(slog.NewTextHandler(&log, nil))})
		j.killWait = 100 * time.Millisecond
		p, err := j.Spawn(Request{Kind: Exec, Command: "trap '' TERM; setsid sleep 1000 & touch " + rootPrefix(level, root) + "/tmp/up; wait"})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "it runs", func() bool { return exists(filepath.Join(root, "tmp/up")) })
		ended := holdStill(t, j.proc.Pid)
		killed, err := j.Stop(t.Context(), time.Millisecond)
		if err != nil {
			t.Errorf("stop: %v", err)
		}
		if err := ended(); err != nil {
			t.Errorf("the holder: %v", err)
		}
		if names := strings.Join(killed, " "); level != Namespaces && (!strings.Contains(names, "bash[") || !strings.Contains(names, "sleep[")) {
			t.Errorf("killed: %v", killed)
		}
		if !strings.Contains(log.String(), "jail init could not end the sessions") {
			t.Errorf("init answered:\n%s", &log)
		}
		if e := p.Wait(); !errors.Is(e.Err, ErrStopped) {
			t.Errorf("the session ended with %+v", e)
		}
		expectQuiet(t, root, level)
	})
}

// holdStill has another process stop every thread of pid as a debugger does, which SIGCONT does not end. That one ends when
// pid has; ended waits for it.
func holdStill(t *testing.T, pid int) (ended func() error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), holdEnv+"="+fmt.Sprint(pid))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n, err := out.Read(make([]byte, 1)); n != 1 {
		t.Fatalf("process %d is not held: %v, %v", pid, err, cmd.Wait())
	}
	return cmd.Wait
}

// holdMain is the debugger: it tells on stdout when all threads are stopped, and ends when all of them have.
func holdMain(pid int) error {
	runtime.LockOSThread()
	held := map[int]bool{}
	for again := true; again; {
		again = false
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, e := range threads {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || held[tid] {
				continue
			}
			held[tid], again = true, true // those not stopped yet may start more
			if err := unix.PtraceSeize(tid); err != nil {
				return fmt.Errorf("seize thread %d: %w", tid, err)
			}
			if err := unix.PtraceInterrupt(tid); err != nil {
				return fmt.Errorf("interrupt thread %d: %w", tid, err)
			}
			if _, err := unix.Wait4(tid, nil, unix.WALL, nil); err != nil {
				return fmt.Errorf("wait for thread %d: %w", tid, err)
			}
		}
	}
	if _, err := os.Stdout.WriteString("h"); err != nil {
		return err
	}
	for {
		if _, err := unix.Wait4(-1, nil, unix.WALL, nil); errors.Is(err, unix.ECHILD) {
			return nil
		} else if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// TestStopForkChain promises the same. ATTACK: a process that never exists for longer than a fork takes.
func TestStopForkChain(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		buildAttacker(t, root)
		prefix := rootPrefix(level, root)
		j := startJail(t, Config{Root: root, Level: level})
		file := filepath.Join(root, "tmp/chain")
		run(t, j, prefix+"/usr/bin/attacker fork-chain 50000 "+prefix+"/tmp/chain < /dev/null > /dev/null 2>&1")
		size := func() int64 {
			fi, err := os.Stat(file)
			if err != nil {
				return 0
			}
			return fi.Size()
		}
		eventually(t, "the chain grows", func() bool { return size() > 1000 })
		if _, err := j.Stop(t.Context(), 10*time.Millisecond); err != nil {
			t.Error(err)
		}
		expectQuiet(t, root, level)
		if n := size(); n >= 50_000 {
			t.Errorf("the chain came to its own end after %d links", n)
		}
	})
}

// TestStopHurried promises that the end of the context ends the grace.
func TestStopHurried(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level})
		go tryRun(j, Request{Kind: Exec, Command: "trap '' TERM; touch " + rootPrefix(level, root) + "/tmp/up; while :; do sleep 1; done"})
		eventually(t, "it runs", func() bool { return exists(filepath.Join(root, "tmp/up")) })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		killed, err := j.Stop(ctx, time.Hour)
		if err != nil || len(killed) == 0 {
			t.Errorf("%v, %v", killed, err)
		}
		expectQuiet(t, root, level)
	})
}

// TestInitKilled promises that the jail does not outlive its init, and that everybody waiting is told.
func TestInitKilled(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j, err := Start(t.Context(), Config{Root: root, Level: level, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		up := filepath.Join(root, "tmp/up")
		p, err := j.Spawn(Request{Kind: Exec, Command: "setsid sleep 1000 & touch " + rootPrefix(level, root) + "/tmp/up; wait"})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "it runs", func() bool { return exists(up) })
		if err := unix.Kill(j.proc.Pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if e := p.Wait(); e.Err == nil || !strings.Contains(e.Err.Error(), "init ended unexpectedly") {
			t.Errorf("the session's end: %+v", e)
		}
		<-j.Done()
		if err := j.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("reason: %v", err)
		}
		if _, err := j.Spawn(Request{Kind: Exec, Command: "true"}); err == nil {
			t.Error("a command was started in a dead jail")
		}
		if _, err := j.Stop(t.Context(), time.Minute); err != nil {
			t.Errorf("stop: %v", err)
		}
		expectQuiet(t, root, level)
	})
}

// TestGatewayKilled promises that nothing outlives the gateway: the far end of the socket closes, init ends everything.
func TestGatewayKilled(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j, err := Start(t.Context(), Config{Root: root, Level: level, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := j.Spawn(Request{Kind: Exec, Command: "trap '' TERM; setsid sleep 1000 & touch " + rootPrefix(level, root) + "/tmp/up; wait"}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it runs", func() bool { return exists(filepath.Join(root, "tmp/up")) })
		j.conn.close() // what the kernel does for a process that dies
		<-j.Done()
		expectQuiet(t, root, level)
		if _, err := j.Stop(t.Context(), 0); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
}

// TestMalformed promises that neither side survives a message it cannot read.
func TestMalformed(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j, err := Start(t.Context(), Config{Root: newRoot(t), Level: level, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.conn.send(opSpawn, 99, &stringMsg{s: "nonsense"}); err != nil {
			t.Fatal(err)
		}
		<-j.Done()
		if err := j.Err(); err == nil || !strings.Contains(err.Error(), "malformed packet") {
			t.Errorf("reason: %v", err)
		}
		if _, err := j.Stop(t.Context(), 0); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
}

// TestLeavesNoTrace promises that the image is the same before and after, mount points, devices and times included.
func TestLeavesNoTrace(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		for _, dev := range []bool{false, true} {
			root := newRoot(t)
			if dev {
				tree.Make(t, root, "dir dev 0755", "char dev/null 1 3", "dir dev/shm 1777", "symlink dev/fd /proc/self/fd", "char dev/console 5 1 0600",
					"mtime dev 1000000000", "dir proc 0555", "dir sys 0555")
			}
			tree.Make(t, root, "mtime . 1100000000.5")
			before := snapshot(t, root)
			j := startJail(t, Config{Root: root, Level: level, DKMS: true})
			output(t, j, "echo x > /dev/null; head -c 16 /dev/urandom > /dev/null")
			if _, err := j.Stop(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			for _, d := range tree.Diff(before, root) {
				t.Errorf("dev %v: %s", dev, d)
			}
		}
	})
}

// snapshot copies a tree in full.
func snapshot(t *testing.T, root string) string {
	t.Helper()
	testkit.NeedTool(t, "cp")
	to := filepath.Join(t.TempDir(), "copy")
	runTool(t, "cp", "-a", root, to)
	return to
}

// TestDevRestored promises that /dev of the packed image is what it was, whatever the sessions did to it.
func TestDevRestored(t *testing.T) {
	if !inFilter() {
		t.Skip("the sessions have a /dev of their own")
	}
	root := newRoot(t)
	tree.Make(t, root, "dir dev 0755", "char dev/null 1 3 0666", "dir dev/pts 0755", "dir dev/shm 1777", "symlink dev/fd /proc/self/fd",
		"char dev/console 5 1 0600", "fifo dev/initctl 0600", "owner dev/console 0:5")
	before := snapshot(t, root)
	var log strings.Builder
	j := startJail(t, Config{Root: root, Level: Chroot, Log: slog.New(slog.NewTextHandler(&log, nil))})
	output(t, j, `cd /dev; rm null console fd initctl; echo secret > null; mkdir -p a/b/c; ln -s /etc a/link; echo x > a/b/c/file
		rm -r pts; echo x > pts; touch shm/segment; ln -s /etc/passwd fd; ls -la`)
	if _, err := j.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	for _, d := range tree.Diff(before, root) {
		if !strings.Contains(d, "mtime") {
			t.Error(d)
		}
	}
	for _, want := range []string{`"regular file left in /dev of the image: removed" path=/dev/null`, "path=/dev/a/b/c/file"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %q:\n%s", want, log.String())
		}
	}
}

// TestDevReplaced promises that restoring /dev never acts outside the image. ATTACK: /dev becomes a link to the container.
func TestDevReplaced(t *testing.T) {
	if !inFilter() {
		t.Skip("the sessions have a /dev of their own")
	}
	root := newRoot(t)
	outside := t.TempDir()
	writeFile(t, filepath.Join(outside, "precious"), "x")
	j := startJail(t, Config{Root: root, Level: Chroot})
	output(t, j, "rm -rf /dev && ln -s "+outside+" /dev")
	if _, err := j.Stop(t.Context(), 0); err != nil {
		t.Errorf("stop: %v", err)
	}
	if !exists(filepath.Join(outside, "precious")) {
		t.Error("a file outside the image was removed")
	}
}

// TestMountPointsRemoved promises that no session ends /dev/null for the others, or has the image packed without mount
// points. The kernel guards those of the own mount namespace only, so not those of the chroot level.
func TestMountPointsRemoved(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		if level == Plain {
			t.Skip("nothing is mounted, and the image root is the user's")
		}
		root := newRoot(t)
		tree.Make(t, root, "dir proc 0555", "dir sys 0755", "dir dev 0755", "owner sys 0:5", "mtime proc 1000000000", "mtime sys 1100000000.5")
		before := snapshot(t, root)
		j := startJail(t, Config{Root: root, Level: level})
		if !inFilter() {
			run(t, j, "rm -rf /dev; rm /dev/null; touch /dev/file; mv /dev/file /dev/null; mv /dev/pts /dev/shm/; mknod /dev/null c 1 3")
			output(t, j, "echo gone > /dev/null && cat /dev/null && [ -c /dev/null ] && echo x > /dev/shm/x && [ -c /dev/pts/ptmx ]")
		}
		run(t, j, "rmdir /proc /sys; mv -T /dev /elsewhere")
		if out := output(t, j, "echo still here"); out != "still here" {
			t.Errorf("a session afterwards: %q", out)
		}
		if _, err := j.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		for _, d := range tree.Diff(before, root) {
			if !strings.HasPrefix(d, ".: mtime") && !strings.HasPrefix(d, "elsewhere") {
				t.Error(d)
			}
		}
	})
}

// TestMountPointsRefused: ATTACK: the image's /proc is a link or a file.
func TestMountPointsRefused(t *testing.T) {
	testkit.NeedRoot(t)
	if inPod() {
		t.Skip("nothing can be mounted in a pod")
	}
	for _, line := range []string{"symlink proc /etc", "file proc 0644 x", "symlink dev ..", "symlink sys nowhere"} {
		root := newRoot(t)
		tree.Make(t, root, line)
		before := snapshot(t, root)
		// Not even with Auto: the image must not choose the level.
		if j, err := Start(t.Context(), Config{Root: root, Level: Auto, Log: testLog(t)}); err == nil {
			j.Stop(t.Context(), 0)
			t.Errorf("%s: accepted", line)
		} else {
			t.Log(err)
		}
		for _, d := range tree.Diff(before, root) {
			t.Errorf("%s: %s", line, d)
		}
	}
}

// TestImageDevices promises that no session opens a disk. ATTACK: the image brings the node of one along, far from /dev.
func TestImageDevices(t *testing.T) {
	testkit.NeedRoot(t)
	devs := partitions()
	if len(devs) == 0 {
		t.Skip("this machine has no block device")
	}
	rdev := devs[0].rdev
	root := newRoot(t)
	tree.Make(t, root, fmt.Sprintf("block var/lib/x/disk %d %d", unix.Major(rdev), unix.Minor(rdev)), "char var/lib/x/null 1 3", "block var/lib/x/none 250 77")
	buildAttacker(t, root)
	for _, level := range []Level{Chroot, Namespaces} {
		if level == Namespaces && inPod() {
			continue
		}
		j, err := Start(t.Context(), Config{Root: root, Level: level, Log: testLog(t)})
		if err != nil {
			// Refusing is right where the container lets root open devices, which this machine does.
			if level != Chroot || !errors.Is(err, errImage) || !strings.Contains(err.Error(), "/var/lib/x/disk") {
				t.Errorf("%s: %v", level, err)
			}
			continue
		}
		if out, _, exit := run(t, j, "attacker device-nodes / 0"); exit.Code == 0 {
			t.Errorf("%s: %s", level, out)
		}
		j.Stop(t.Context(), 0)
	}
}
