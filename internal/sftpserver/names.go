// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What is read of passwd and group is bounded, in bytes: the files, and a name, which is repeated in many answers.
const (
	maxNamesFile = 1 << 20
	maxName      = 255
)

// names knows users and groups from the files of the system that is served. They belong to whoever is served, who can
// also change them during the session; nothing depends on them but what the client is shown.
type names struct {
	passwd, groupFile namesFile
	users, groups     map[uint32]string
	homes             map[string]string
}

// namesFile is a file and what it looked like when it was read.
type namesFile struct {
	path   string
	looked bool
	seen   unix.Stat_t
}

func newNames(passwd, group string) names {
	return names{passwd: namesFile{path: passwd}, groupFile: namesFile{path: group}}
}

// refresh reads the files again if they have changed.
func (n *names) refresh() {
	if b, changed := n.passwd.read(); changed {
		n.users, n.homes = map[uint32]string{}, map[string]string{}
		eachEntry(b, 7, func(name string, id uint32, f []string) {
			if _, ok := n.users[id]; !ok {
				n.users[id] = name
			}
			if _, ok := n.homes[name]; !ok && len(f[5]) < pathMax {
				n.homes[name] = f[5]
			}
		})
	}
	if b, changed := n.groupFile.read(); changed {
		n.groups = map[uint32]string{}
		eachEntry(b, 4, func(name string, id uint32, _ []string) {
			if _, ok := n.groups[id]; !ok {
				n.groups[id] = name
			}
		})
	}
}

// read returns the file's content if it is another than the last time: nothing if there is no regular file.
func (f *namesFile) read() (content []byte, changed bool) {
	var st unix.Stat_t
	if retry(func() error { return unix.Stat(f.path, &st) }) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		st = unix.Stat_t{}
	}
	st.Atim = unix.Timespec{} // reading is no change
	if f.looked && st == f.seen {
		return nil, false
	}
	f.looked, f.seen = true, st
	if st.Mode == 0 {
		return nil, true
	}
	file, err := os.OpenFile(f.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, true
	}
	defer file.Close()
	content, _ = io.ReadAll(io.LimitReader(file, maxNamesFile)) // what can be read is better than nothing
	return content, true
}

// eachEntry calls f for each line with that many fields, an id in the third.
func eachEntry(b []byte, fields int, f func(name string, id uint32, fields []string)) {
	for line := range bytes.Lines(b) {
		e := strings.Split(strings.TrimSuffix(string(line), "\n"), ":")
		if len(e) != fields || e[0] == "" || len(e[0]) > maxName {
			continue
		}
		if id, err := strconv.ParseUint(e[2], 10, 32); err == nil {
			f(e[0], uint32(id), e)
		}
	}
}

func (n *names) user(uid uint32) string  { return nameOrNumber(n.users, uid) }
func (n *names) group(gid uint32) string { return nameOrNumber(n.groups, gid) }

func nameOrNumber(known map[uint32]string, id uint32) string {
	if name, ok := known[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}
