// SPDX-License-Identifier: Apache-2.0

// Package layout is what the containers of a job know of each other's work on
// the job's volume: the image the root was made from, where that came from, and
// how the root was laid out. The init container writes the record, the sidecar
// packs only what changed with its help.
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
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Names on the volume.
const (
	Image = "image.sqsh"        // the image as it was downloaded
	Index = ".image.sqsh.index" // of the unpacked root, see squash.Index
	file  = ".image.sqsh.json"  // the Record
)

// Names returns all names this package gives meaning to, for cleaning up.
func Names() []string { return []string{Image, Index, file} }

// Record says where the image came from.
type Record struct {
	// URLPath is the path of the URL it was downloaded from, which for S3
	// without virtual hosts is "/<bucket>/<key>".
	URLPath string `json:"urlPath"`
	Size    int64  `json:"size"`
	MD5     string `json:"md5"` // in hexadecimal
}

// Write puts the record on the volume, readable by root alone.
func Write(parent string, r Record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	name := filepath.Join(parent, file)
	tmp, err := os.CreateTemp(parent, file+".*")
	if err != nil {
		return fmt.Errorf("record the image: %w", err)
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("record the image: %w", err), os.Remove(tmp.Name()))
	}
	return nil
}

// Read returns the record. An error that is fs.ErrNotExist means that there is
// none, as on volumes that another init container prepared.
func Read(parent string) (Record, error) {
	f, err := Open(parent, file)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	const most = 64 << 10
	b, err := io.ReadAll(io.LimitReader(f, most))
	var r Record
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return Record{}, fmt.Errorf("record of the image: %w", err)
	}
	return r, nil
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
