// SPDX-License-Identifier: Apache-2.0

// Package layout is what the containers of a job know of each other's work on
// the job's volume: the image the root was made from, where that came from, and
// how the root was laid out. The init container writes the record, the sidecar
// packs only what changed with its help.
//
// A root is laid out in one of two ways. Unpacked, it is a directory. Layered, the
// image stays packed and is mounted with a writable directory on it, by sshd for
// its sessions; Mount does it, Probe finds out whether it would work. This package
// knows nothing of the inside of an image.
//
// A user of the plain mode is root on the volume. What they put in a record's
// place can only make their own image fail or be packed in full: names here
// are fixed, links are not followed, and who uses the base image checks it
// against the store before a byte of it is taken over from there.
package layout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Names on the volume.
const (
	Image = "image.sqsh"        // the image as it was downloaded
	Index = ".image.sqsh.index" // of the unpacked root, see squash.Index
	Upper = ".image-root.upper" // layered: what was changed in the image
	Work  = ".image-root.work"  // layered: overlayfs's own
	Edit  = ".image-root.edit"  // layered: files of the sidecar on their way to Upper

	State = ".ims-buildenv-state" // how far the sidecar came, see package job

	recordFile  = ".image.sqsh.json"      // the Record
	promiseFile = ".image-root.mountable" // layered: sshd's word
	probeDir    = ".image-root.probe"     // of Probe, while it runs
)

// Names returns all names this package gives meaning to, for cleaning up. State is not among them: it may name what is to
// be taken back in IMS and S3.
func Names() []string {
	return []string{Image, Index, Upper, Work, Edit, recordFile, promiseFile, probeDir}
}

// Started reports whether the sidecar of this job has begun on the volume. Its seal is not looked at: who can forge the
// file has the root anyway.
func Started(parent, job string) bool {
	var file struct {
		State struct {
			JobID string `json:"job_id"`
		} `json:"state"`
	}
	return readJSON(parent, State, &file) == nil && job != "" && file.State.JobID == job
}

// Kind is a way to lay a root out.
type Kind string

// The kinds. A record without one is of an unpacked root.
const (
	Unpacked Kind = "unpacked"
	Layered  Kind = "layered"
)

// Record says where the image came from and how its root is laid out.
type Record struct {
	// URLPath is the path of the URL it was downloaded from, which for S3
	// without virtual hosts is "/<bucket>/<key>".
	URLPath string `json:"urlPath"`
	Size    int64  `json:"size"`
	MD5     string `json:"md5"` // in hexadecimal
	Layout  Kind   `json:"layout"`
	Why     string `json:"why"` // that layout was chosen
}

// Write puts the record on the volume, readable by root alone.
func Write(parent string, r Record) error { return writeJSON(parent, recordFile, r) }

// Read returns the record. An error that is fs.ErrNotExist means that there is
// none, as on volumes that another init container prepared.
func Read(parent string) (Record, error) {
	var r Record
	err := readJSON(parent, recordFile, &r)
	return r, err
}

// promise is what sshd tells the sidecar of a layered root.
type promise struct {
	Why string `json:"why,omitempty"` // it cannot be mounted; empty: it can
}

// Promise tells the sidecar that this container will mount the layered root when
// it is ready, or that it cannot, and why. Until then nothing is mounted, because
// the sidecar writes to the upper layer first.
func Promise(parent string, cannot error) error {
	var p promise
	if cannot != nil {
		p.Why = cannot.Error()
	}
	return writeJSON(parent, promiseFile, p)
}

// Promised returns sshd's word: nil, or why not. ok is false as long as there is
// none; an sshd that knows no layered roots never gives it.
func Promised(parent string) (cannot error, ok bool) {
	var p promise
	switch err := readJSON(parent, promiseFile, &p); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, false
	case err != nil:
		return err, true
	case p.Why != "":
		return errors.New(p.Why), true
	}
	return nil, true
}

func writeJSON(parent, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(parent, name+".*")
	if err != nil {
		return fmt.Errorf("record the layout: %w", err)
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(parent, name))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("record the layout: %w", err), os.Remove(tmp.Name()))
	}
	return nil
}

func readJSON(parent, name string, v any) error {
	f, err := Open(parent, name)
	if err != nil {
		return err
	}
	defer f.Close()
	const most = 64 << 10
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("record %s: %w", f.Name(), err)
	}
	return nil
}

// Open opens one of the names on the volume for reading. It must be a regular
// file; a link in its place is an error.
func Open(parent, name string) (*os.File, error) {
	path := filepath.Join(parent, name)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
