// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// script is the CUSTOMIZATION_SCRIPT: it runs once, in the container and not in the jail,
// as soon as the port listens. Its outcome does not decide the job's; the flags do.
type script struct {
	cmd  *exec.Cmd
	done chan struct{}
	log  *slog.Logger
}

// startScript starts the script if there is one. Like the legacy, which sourced it, it
// needs neither an executable bit nor a #! line.
func startScript(path string, log *slog.Logger) *script {
	s := &script{done: make(chan struct{}), log: log}
	st, err := os.Stat(path)
	if path == "" || errors.Is(err, fs.ErrNotExist) {
		close(s.done)
		return s
	}
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		log.Error("customization script", "path", path, "err", err)
		close(s.done)
		return s
	}
	shell, err := exec.LookPath("bash")
	if err != nil {
		shell = "/bin/sh"
	}
	s.cmd = exec.Command(shell, path)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: jail.AsRoot()}
	// A real pipe: Wait then returns when the script ends, though a background process of it
	// may still hold the other end.
	out, in, err := os.Pipe()
	if err == nil {
		err = jail.AdoptOrphans()
	}
	if err == nil {
		s.cmd.Stdout, s.cmd.Stderr = in, in
		err = s.cmd.Start()
		in.Close()
	}
	if err != nil {
		log.Error("customization script", "path", path, "err", err)
		s.cmd = nil
		close(s.done)
		return s
	}
	log.Info("customization script started", "path", path)
	go s.logLines(out)
	go func() {
		defer close(s.done)
		if err := s.cmd.Wait(); err != nil {
			log.Error("customization script failed", "path", path, "err", err)
			return
		}
		log.Info("customization script ended", "path", path)
	}()
	return s
}

func (s *script) logLines(r io.ReadCloser) {
	defer r.Close()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		s.log.Info("customization script", "output", lines.Text())
	}
	io.Copy(io.Discard, r) // a line beyond the scanner's limit must not block the script
}

// wait returns when the script is over.
func (s *script) wait(ctx context.Context) error {
	select {
	case <-s.done:
		return nil
	default:
	}
	s.log.Info("waiting for the customization script to end")
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop kills the script and all that it left running, when the jail has ended: then nothing else is a child of ours.
func (s *script) stop() error {
	if s.cmd == nil {
		return nil
	}
	err := jail.KillDescendants()
	if err == nil {
		<-s.done
	}
	return err
}
