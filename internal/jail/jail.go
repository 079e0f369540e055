// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Level is how strongly the sessions of a job are confined.
type Level int

// The levels, weakest confinement first.
const (
	Auto       Level = iota // the strongest of Namespaces and Chroot the container allows
	Plain                   // no confinement: the container's own root and shell
	Chroot                  // chroot, without the capabilities that lead out again
	Namespaces              // own mount, PID, IPC and UTS namespace below the image root
)

// Kind is what a request starts.
type Kind uint8

// The kinds of requests.
const (
	Shell Kind = iota + 1 // the user's login shell
	Exec                  // $SHELL -c command
	SFTP                  // an SFTP server on stdin and stdout
)

// Config describes the jail of one job.
type Config struct {
	Root  string   // the image root, an existing directory
	Level Level    // Auto, or the one level that is wanted
	DKMS  bool     // the job asked for /proc, /sys and /dev
	Env   []string // KEY=value, part of every shell's environment
	Log   *slog.Logger
}

// Request is one command to start inside the jail.
type Request struct {
	Kind    Kind
	Command string   // Exec: passed to the shell as it is
	Env     []string // KEY=value, weaker than Config.Env
	TTY     *TTY     // nil: no terminal, use the three files
	// Stdin, Stdout and Stderr become the command's; nil means /dev/null. Spawn does not close them. Not used with TTY.
	Stdin, Stdout, Stderr *os.File
}

// TTY describes the terminal of a session (RFC 4254, sections 6.2 and 8).
type TTY struct {
	Term                       string
	Cols, Rows, XPixel, YPixel uint32
	Modes                      map[uint8]uint32 // opcode -> argument
}

// Exit says how a command ended.
type Exit struct {
	Code   int         // 0..255 when Signal is 0
	Signal unix.Signal // the signal that killed it, or 0
	Core   bool        // it dumped core
	Err    error       // set when the end could not be observed because the jail itself ended
}

// Jail is a running jail.
type Jail struct{}

// Process is a command running in the jail.
type Process struct{}

// Start chooses the level, starts the jail's init and proves the confinement.
func Start(ctx context.Context, cfg Config) (*Jail, error) { return nil, errors.New("not yet") }

// ChildMain runs the child modes of this binary and does not return from them.
func ChildMain() {}

// Level returns the level in force.
func (j *Jail) Level() Level { return Plain }

// Done is closed when the jail's init has ended.
func (j *Jail) Done() <-chan struct{} { return nil }

// Err says why the jail ended; nil before Done is closed and after an orderly Stop.
func (j *Jail) Err() error { return nil }

// Spawn starts a command.
func (j *Jail) Spawn(req Request) (*Process, error) { return nil, errors.New("not yet") }

// Exists reports whether path is a regular file as the sessions see it.
func (j *Jail) Exists(path string) (bool, error) { return false, errors.New("not yet") }

// Stop ends every process, undoes what Start did to the root and syncs it.
// It returns the names of the processes that did not end within the grace period.
func (j *Jail) Stop(ctx context.Context, grace time.Duration) ([]string, error) {
	return nil, errors.New("not yet")
}

// PTY returns the master side of the terminal, nil without one. The caller closes it.
func (p *Process) PTY() *os.File { return nil }

// Resize sets the window size.
func (p *Process) Resize(cols, rows, xpixel, ypixel uint32) error { return errors.New("not yet") }

// Signal signals the command's process group.
func (p *Process) Signal(sig unix.Signal) error { return errors.New("not yet") }

// Wait blocks until the command has ended. It may be called more than once.
func (p *Process) Wait() Exit { return Exit{} }
