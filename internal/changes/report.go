// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// Format is the version of the JSON schema; fields may be added to it.
const Format = 1

// Report is what changed. Everything in it is sorted: packages by manager, name
// and architecture, directories and changes by path as a walk meets them, with
// each directory before what is in it. Sizes are in bytes, times in seconds since
// 1970.
type Report struct {
	Format      int               `json:"format"`
	Old         Image             `json:"old"`
	New         Image             `json:"new"`
	Summary     Summary           `json:"summary"`
	Packages    []PackageChange   `json:"packages"`
	Directories []DirectoryChange `json:"directories"`
	Changes     []Change          `json:"changes"`
	// Notes are sentences about what could not be looked at.
	Notes []string `json:"notes"`
}

// Image is one of the two sides.
type Image struct {
	Name        Name      `json:"name"`
	Bytes       int64     `json:"bytes"` // of the image
	Created     time.Time `json:"created"`
	Files       int64     `json:"files"` // regular files, each inode once
	Directories int64     `json:"directories"`
	Others      int64     `json:"others"`   // links, devices, fifos, sockets
	Content     int64     `json:"content"`  // bytes in files, each inode once
	Packages    int       `json:"packages"` // in all databases
}

// Summary counts changed names and the bytes behind them.
type Summary struct {
	Added    int64 `json:"added"`
	Removed  int64 `json:"removed"`
	Modified int64 `json:"modified"` // without those whose time alone changed
	Renamed  int64 `json:"renamed"`
	Touched  int64 `json:"touched"` // nothing but the time changed

	AddedBytes     int64 `json:"addedBytes"`     // content under added names
	RemovedBytes   int64 `json:"removedBytes"`   // content under removed names
	RewrittenBytes int64 `json:"rewrittenBytes"` // new size of files with other content

	ContentGrowth int64 `json:"contentGrowth"` // of Image.Content
	ImageGrowth   int64 `json:"imageGrowth"`   // of Image.Bytes
}

// Kind is what happened to a name.
type Kind string

// Kinds of changes.
const (
	Added    Kind = "added"
	Removed  Kind = "removed"
	Modified Kind = "modified"
	Renamed  Kind = "renamed" // the content of From, which is gone, is here now
)

// What of a modified name changed. A name whose type changed is modified, with
// How only saying so.
const (
	HowType    = "type"
	HowContent = "content"
	HowMode    = "mode"
	HowOwner   = "owner"
	HowXattrs  = "xattrs"
	HowTarget  = "target" // of a symlink
	HowDevice  = "device"
	HowLinks   = "links" // the set of names the inode has
	HowTime    = "time"
)

// Change is one name that is not what it was. A renamed one may be modified too.
type Change struct {
	Path   Name         `json:"path"`
	Kind   Kind         `json:"kind"`
	From   *Name        `json:"from,omitempty"`   // of a renamed file
	How    []string     `json:"how,omitempty"`    // in the order of the constants
	Old    *State       `json:"old,omitempty"`    // absent for added
	New    *State       `json:"new,omitempty"`    // absent for removed
	Xattrs *XattrChange `json:"xattrs,omitempty"` // when How has it

	weight int64 // bytes that the change is about
}

// State is a name's inode on one side.
type State struct {
	Type   string `json:"type"` // file, directory, symlink, char, block, fifo, socket
	Mode   string `json:"mode"` // twelve bits, octal: "0755"
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Size   int64  `json:"size"` // of a file's content
	Time   int64  `json:"time"`
	Target *Name  `json:"target,omitempty"`
	Device string `json:"device,omitempty"` // "major:minor"
	Links  uint32 `json:"links,omitempty"`  // names of the inode, if more than one
}

// XattrChange lists names of extended attributes.
type XattrChange struct {
	Added   []Name `json:"added,omitempty"`
	Removed []Name `json:"removed,omitempty"`
	Changed []Name `json:"changed,omitempty"`
}

// DirectoryChange sums the changes anywhere below a directory.
type DirectoryChange struct {
	Path           Name  `json:"path"`
	Added          int64 `json:"added"`
	Removed        int64 `json:"removed"`
	Modified       int64 `json:"modified"` // as in Summary
	Renamed        int64 `json:"renamed"`  // into it
	AddedBytes     int64 `json:"addedBytes"`
	RemovedBytes   int64 `json:"removedBytes"`
	RewrittenBytes int64 `json:"rewrittenBytes"`
	Growth         int64 `json:"growth"` // of the bytes under its names
}

// Name is a path or another string of bytes that is text by habit only. In JSON
// it is a string if it is UTF-8, else an object {"base64": "..."}, so that two names
// never become one.
type Name string

// MarshalJSON implements json.Marshaler.
func (n Name) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(n)) {
		return json.Marshal(string(n))
	}
	return json.Marshal(map[string][]byte{"base64": []byte(n)})
}

// UnmarshalJSON implements json.Unmarshaler.
func (n *Name) UnmarshalJSON(b []byte) error {
	var raw struct {
		Base64 []byte `json:"base64"`
	}
	if len(b) > 0 && b[0] == '{' {
		err := json.Unmarshal(b, &raw)
		*n = Name(raw.Base64)
		return err
	}
	var s string
	err := json.Unmarshal(b, &s)
	*n = Name(s)
	return err
}

// String returns the name as it can be shown: what does not print, or could be
// taken for other text, such as a change of direction, is escaped as in Go.
func (n Name) String() string {
	s := string(n)
	q := fmt.Sprintf("%q", s)
	if inner := q[1 : len(q)-1]; strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(inner) == s && !strings.HasPrefix(s, `"`) {
		return s
	}
	return q
}

// WriteJSON writes the report as indented JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

func stateOf(ino *squash.Inode) *State {
	s := &State{Type: typeName(ino.Mode), UID: ino.UID, GID: ino.GID, Time: int64(ino.MTime), Mode: fmt.Sprintf("%04o", permissions(ino.Mode))}
	switch {
	case ino.Mode.IsRegular():
		s.Size = ino.Size
	case ino.Mode&fs.ModeSymlink != 0:
		target := Name(ino.Target)
		s.Target = &target
	case ino.Mode&fs.ModeDevice != 0:
		s.Device = fmt.Sprintf("%d:%d", unix.Major(ino.Rdev), unix.Minor(ino.Rdev))
	}
	return s
}

func permissions(m fs.FileMode) uint32 {
	p := uint32(m.Perm())
	for bit, unixBit := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if m&bit != 0 {
			p |= unixBit
		}
	}
	return p
}

func typeName(m fs.FileMode) string {
	switch m.Type() {
	case fs.ModeDir:
		return "directory"
	case fs.ModeSymlink:
		return "symlink"
	case fs.ModeDevice | fs.ModeCharDevice:
		return "char"
	case fs.ModeDevice:
		return "block"
	case fs.ModeNamedPipe:
		return "fifo"
	case fs.ModeSocket:
		return "socket"
	}
	return "file"
}
