// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bufio"
	"errors"
	"io"
	"os"
	"syscall"
	"time"
)

// mount puts a directory or file of the host into a container.
type mount struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only"`
}

// containerSetup is what the container's child is told on its standard input.
type containerSetup struct {
	Hostname   string   `json:"hostname"`
	Args       []string `json:"args"` // Args[0] is an absolute path inside
	Env        []string `json:"env"`  // all of it
	Privileged bool     `json:"privileged"`
	Mounts     []mount  `json:"mounts"` // in order
	// Hide are directories of the host that are empty inside.
	Hide []string `json:"hide"`
	// Scratch is an empty directory on which the container puts its root
	// together, in its own mount namespace.
	Scratch string `json:"scratch"`
}

// container is a running container: a process that is PID 1 of its namespace.
// All of its processes and mounts end with it.
type container struct {
	*child
	name    string
	started time.Time
	drained chan struct{} // closed when its output has been written
}

// startContainer starts setup. Its output, both streams, goes line by line to
// log and to each.
func startContainer(name string, setup containerSetup, log io.Writer, each func(line string)) (*container, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	c, err := startChild(modeContainer, setup, w, syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	})
	if err != nil {
		r.Close()
		if errors.Is(err, syscall.EPERM) {
			err = errors.Join(err, errNeedRoot)
		}
		return nil, err
	}
	ct := &container{child: c, name: name, started: time.Now(), drained: make(chan struct{})}
	go func() {
		defer close(ct.drained)
		defer r.Close()
		copyLines(r, log, each)
	}()
	return ct, nil
}

// copyLines reads r to its end. A line longer than the buffer comes in pieces.
func copyLines(r io.Reader, log io.Writer, each func(string)) {
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, _, err := lines.ReadLine()
		if err != nil {
			return
		}
		_, _ = log.Write(append(line, '\n')) // a full disk must not stop the container
		each(string(line))
	}
}

// stopContainers asks with SIGTERM, and after grace kills what is left.
func stopContainers(grace time.Duration, list ...*container) {
	for _, c := range list {
		c.signal(syscall.SIGTERM)
	}
	timeout := time.NewTimer(grace)
	defer timeout.Stop()
	for _, c := range list {
		select {
		case <-c.done:
		case <-timeout.C:
			for _, c := range list {
				c.kill()
			}
			timeout.Reset(0) // no more waiting for the others
			<-c.done
		}
	}
}
