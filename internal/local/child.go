// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// The child modes of imslocal, accepted only as argv[1].
const (
	modeS3        = "s3-server"
	modeContainer = "pod-container"
)

// ChildMain runs the child mode named by argv[1] and does not return, or
// returns when argv names none. It must be the first thing main does: a child
// is started with a set-up message on its standard input.
func ChildMain() {
	if len(os.Args) != 2 {
		return
	}
	switch os.Args[1] {
	case modeS3:
		os.Exit(s3Child(os.Stdin))
	case modeContainer:
		os.Exit(containerChild(os.Stdin))
	}
}

// child is a process of our own binary in one of its child modes.
type child struct {
	cmd   *exec.Cmd
	done  chan struct{} // closed when the process has been reaped
	ended time.Time     // when that was; valid when done is closed
}

// startChild starts mode with setup as its standard input. The child is killed
// when this process ends, however it ends. stdout and stderr both go to out,
// which startChild closes on our side.
func startChild(mode string, setup any, out *os.File, attr syscall.SysProcAttr) (*child, error) {
	defer out.Close()
	message, err := json.Marshal(setup)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", mode)
	cmd.Args[0] = "imslocal"
	cmd.Env = []string{} // nothing is inherited
	cmd.Stdout, cmd.Stderr = out, out
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	// a session of its own: Ctrl-C reaches only the parent, which stops its
	// children in order
	attr.Setsid = true
	attr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr = &attr
	c := &child{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// the kernel sends Pdeathsig when the thread that forked ends, so that
		// thread is kept until the child is gone
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // the state tells all
			c.ended = time.Now()
			close(c.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", mode, err)
	}
	_, err = stdin.Write(message)
	if cerr := stdin.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		c.kill()
		<-c.done
		return nil, fmt.Errorf("set up %s: %w", mode, err)
	}
	return c, nil
}

func (c *child) signal(s os.Signal) {
	_ = c.cmd.Process.Signal(s) // an error means it is gone
}

func (c *child) kill() { c.signal(syscall.SIGKILL) }

// exit is how the process ended; valid when done is closed.
func (c *child) exit() exit {
	ws := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return exit{Code: -1, Signal: ws.Signal().String()}
	}
	return exit{Code: ws.ExitStatus()}
}

// exit is the end of a process: an exit code, or -1 and a signal.
type exit struct {
	Code   int    `json:"exit_code"`
	Signal string `json:"signal,omitempty"`
}

func (e exit) String() string {
	if e.Signal != "" {
		return "signal " + e.Signal
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// readSetup reads the set-up message of a child to its end.
func readSetup(r io.Reader, v any) error {
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("set-up message: %w", err)
	}
	return nil
}
