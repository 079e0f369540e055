// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// handleLimit bounds what a client can hold open, and with it the memory of a session.
const handleLimit = 1024

// reservedFDs are left for the session itself.
const reservedFDs = 16

// openFile is an open file or directory.
type openFile struct {
	fd       int
	path     string // as the client named it, for the log; and what was moved, in bytes
	read     int64
	written  int64
	failed   bool // a read or write failed, and the log has it
	appends  bool // opened with O_APPEND
	dir      bool
	buf      []byte // of a directory: what was read last
	dirents  []byte // of a directory: the part of buf that is not yet listed
	complete bool   // of a directory: nothing left to read
}

func (f *openFile) close() error { return unix.Close(f.fd) }

// handles are numbered from 0, and the lowest free number is used first, as in OpenSSH.
type handles struct {
	files []*openFile
	open  int
	max   int
}

func newHandles() handles {
	h := handles{max: handleLimit}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && limit.Cur < handleLimit+reservedFDs {
		h.max = max(int(limit.Cur)-reservedFDs, 1)
	}
	return h
}

// add takes f, and refuses it when the client has too much open.
func (h *handles) add(f *openFile) (string, error) {
	if h.open >= h.max {
		f.close()
		return "", unix.EMFILE
	}
	i := 0
	for i < len(h.files) && h.files[i] != nil {
		i++
	}
	if i == len(h.files) {
		h.files = append(h.files, nil)
	}
	h.files[i] = f
	h.open++
	return string(binary.BigEndian.AppendUint32(nil, uint32(i))), nil
}

func (h *handles) index(handle []byte) int {
	if len(handle) != 4 {
		return -1
	}
	i := binary.BigEndian.Uint32(handle)
	if uint64(i) >= uint64(len(h.files)) || h.files[i] == nil {
		return -1
	}
	return int(i)
}

// file returns the open file behind a handle; nil when there is none, or a directory.
func (h *handles) file(handle []byte) *openFile {
	if i := h.index(handle); i >= 0 && !h.files[i].dir {
		return h.files[i]
	}
	return nil
}

// any returns what is behind a handle, file or directory, or nil.
func (h *handles) any(handle []byte) *openFile {
	if i := h.index(handle); i >= 0 {
		return h.files[i]
	}
	return nil
}

func (h *handles) directory(handle []byte) *openFile {
	if i := h.index(handle); i >= 0 && h.files[i].dir {
		return h.files[i]
	}
	return nil
}

// close frees the handle even if closing reports an error, such as that of a write on NFS.
func (h *handles) close(handle []byte) error {
	i := h.index(handle)
	if i < 0 {
		return &fault{codeNoSuchFile, "Invalid handle"}
	}
	f := h.files[i]
	h.files[i] = nil
	h.open--
	if err := f.close(); err != unix.EINTR { // after EINTR the descriptor is closed as well: close(2)
		return err
	}
	return nil
}

func (h *handles) closeAll() {
	for _, f := range h.files {
		if f != nil {
			f.close()
		}
	}
	h.files, h.open = nil, 0
}
