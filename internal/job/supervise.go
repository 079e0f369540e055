// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
)

// ChildArg is the subcommand that runs the job itself, below Supervise.
const ChildArg = "run-child"

const (
	// childGrace is how long the child may take to clean up after a signal.
	childGrace = 28 * time.Second

	// childOOMScore makes the kernel choose the child, which packs, before its
	// small supervisor (proc(5), oom_score_adj).
	childOOMScore = 500

	// settle lets the store finish with the dead process's last requests: parts
	// that arrive after an abort stay in some stores for ever.
	settle = 2 * time.Second
)

// Supervise runs the job in a child process and, when that ends in a way it
// could not report itself (killed for its memory, a panic in some goroutine),
// takes its image back and sets the job to error for it. load is called once
// the child has its own copy of the environment, secrets included.
func Supervise(ctx context.Context, args []string, stdout, stderr io.Writer, load func() (config.Sidecar, Deps, error)) int {
	// Pdeathsig is about the thread that forked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", append([]string{ChildArg}, args...)...)
	cmd.Args[0] = os.Args[0] // a familiar name in process lists
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	startErr := cmd.Start()
	cfg, deps, err := load()
	if startErr != nil {
		return Refuse(ctx, cfg, deps, errors.Join(fmt.Errorf("start the job's process: %w", startErr), err))
	}
	score := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/oom_score_adj"
	if err := os.WriteFile(score, []byte(strconv.Itoa(childOOMScore)), 0); err != nil {
		deps.Log.Debug("the kernel may choose the supervisor when memory ends", "error", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		cmd.Process.Signal(unix.SIGTERM)
		select {
		case err = <-ended:
		case <-time.After(childGrace):
			deps.Log.Error("the job's process did not end in time and is killed")
			cmd.Process.Kill()
			err = <-ended
		}
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit) && exit.ExitCode() == exitFailure:
		return exitFailure
	}
	return takeOver(ctx, cfg, deps, fmt.Errorf("the job's process ended without a report: %w; when it was killed, raise job_mem_size", err))
}

// takeOver ends a job whose process is gone, from its state file.
func takeOver(ctx context.Context, cfg config.Sidecar, deps Deps, cause error) int {
	r, err := newRun(cfg, deps)
	if err != nil {
		return r.refuse(ctx, errors.Join(cause, err))
	}
	if r.state, err = r.loadState(); err != nil {
		r.log.Warn("the state of the job is lost", "error", err)
	}
	if r.state.Phase == phaseRegistered {
		return r.finish(ctx, nil)
	}
	if r.state.ImageID != "" {
		time.Sleep(settle)
	}
	return r.finish(ctx, cause)
}
