// SPDX-License-Identifier: Apache-2.0

// Package signalfile knows the files by which the containers of a job and its
// user talk: their names per mode, and how to make, remove and await them.
//
// A flag is a regular file, judged by fstat after resolving its path inside
// the directory it belongs to: an image whose /tmp is a link to /var/tmp is
// asked about its own /var/tmp, never about the container's. FIFOs,
// directories and links that lead nowhere are no flags. Content and size mean
// nothing.
//
// It refuses to rely on inotify, which is silent across virtiofs, NFS, FUSE
// and other kernels: Wait looks every second by path, and an event is only a
// reason to look sooner.
package signalfile

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"golang.org/x/sys/unix"
)

// Name is one signal file. Its value is the file's name on disk.
type Name string

// The signal files of the contract. Complete and Failed lie in the parent in
// plain mode and in the image's /tmp in jailed mode, all others in the parent.
const (
	Ready       Name = "ready"        // sidecar: sshd may start
	Complete    Name = "complete"     // user: pack the root
	Failed      Name = "failed"       // user: give up
	Exiting     Name = "exiting"      // sshd: all sessions are over
	BuildFailed Name = "build_failed" // builder of a create job
	PodError    Name = "pod_error"    // sshd: it cannot serve the job
)

// jailTmp is where the jailed user's flags lie, inside the image root.
const jailTmp = "tmp"

// flagMode lets the user's own tools read a flag we made.
const flagMode = 0o644

// Set is the signal files of one job.
type Set struct {
	Parent string // absolute: /mnt/image
	Root   string // absolute: the image root
	Jailed bool

	// Extra, if set, is asked for a flag that Parent and Root do not show. The
	// gateway looks in the sessions' own mount namespace, where the user may
	// have a tmpfs on /tmp.
	Extra func(Name) bool

	watch watchOptions // zero outside tests
}

// place is a flag's directory, and its path inside it.
type place struct {
	dir  string // opened as a root: nothing below it may lead out of it
	name string
}

func (p place) String() string { return filepath.Join(p.dir, p.name) }

func (s Set) place(n Name) place { return s.placeIn(n, s.Jailed) }

// InRoot is where a flag of the user's lies in the image root, in the jailed mode.
func InRoot(n Name) string { return jailTmp + "/" + string(n) }

func (s Set) placeIn(n Name, jailed bool) place {
	if jailed && (n == Complete || n == Failed) {
		return place{s.Root, InRoot(n)}
	}
	return place{s.Parent, string(n)}
}

// Path returns where the flag lies, for messages: it is not safe to open.
func (s Set) Path(n Name) string { return s.place(n).String() }

// Touch makes the flag. It appears at once and whole, with no byte in it.
func (s Set) Touch(n Name) error {
	p := s.place(n)
	err := p.with(func(r *imageroot.Root) error { return r.Touch(p.name, flagMode) })
	if err != nil {
		return fmt.Errorf("touch signal file %s: %w", p, err)
	}
	return nil
}

// Remove removes the flag. One that is not there is not an error.
func (s Set) Remove(n Name) error { return remove(s.place(n)) }

func remove(p place) error {
	err := p.with(func(r *imageroot.Root) error { return r.Remove(p.name) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove signal file %s: %w", p, err)
	}
	return nil
}

// Exists reports whether the flag is there and is a regular file. Extra is
// asked too.
func (s Set) Exists(n Name) (bool, error) {
	found, err := s.place(n).exists()
	if !found && s.Extra != nil && s.Extra(n) {
		return true, nil
	}
	return found, err
}

// exists opens the directory anew each time: on network file systems this
// asks the server, where a bare stat may be answered from a cache.
func (p place) exists() (found bool, err error) {
	err = p.with(func(r *imageroot.Root) error {
		dir, err := r.OpenDir(filepath.Dir(p.name))
		if imageroot.IsAbsent(err) || errors.Is(err, imageroot.ErrNotRegular) {
			return nil
		}
		if err != nil {
			return err
		}
		dir.Close()
		found, err = r.IsRegular(p.name)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for signal file %s: %w", p, err)
	}
	return found, nil
}

func (p place) with(do func(*imageroot.Root) error) error {
	r, err := imageroot.Open(p.dir)
	if err != nil {
		return err
	}
	defer r.Close()
	return do(r)
}

// RemoveStale removes what an earlier run, or the source image itself, left
// behind: complete and failed of both modes, exiting and pod_error. It belongs
// before the port opens, and again before packing, for a flag is never part
// of an image. Ready stays: see Remove.
func (s Set) RemoveStale() error {
	var errs []error
	for _, n := range []Name{Exiting, PodError} {
		errs = append(errs, s.Remove(n))
	}
	for _, n := range []Name{Complete, Failed} {
		for _, jailed := range []bool{true, false} {
			err := remove(s.placeIn(n, jailed))
			if errors.Is(err, unix.EISDIR) && jailed != s.Jailed {
				continue // nobody waits for that one
			}
			if errors.Is(err, unix.EISDIR) {
				err = fmt.Errorf("%w: a directory of that name keeps the user from ending the job: remove it from the source image", err)
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
