// SPDX-License-Identifier: Apache-2.0

package sftpserver

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// Level is how much of what a session does is logged.
type Level int

// The levels. Those of OpenSSH between them and beyond mean the nearest lower one.
const (
	LogNothing Level = iota // QUIET, FATAL, ERROR
	LogChanges              // INFO: what opens, changes or lists files, and every refusal
	LogAll                  // VERBOSE and DEBUG: looks at files as well; never each read and write
)

// Options are those of sftp-server(8) that mean something here. The zero value logs nothing.
type Options struct {
	Level    Level    // -l
	ReadOnly bool     // -R
	Umask    int      // -u; -1: as it is
	Dir      string   // -d, with %d for the home and %u for the name of the user; empty: where the process is
	Deny     []string // -P: requests that are refused
	Allow    []string // -p: the only ones that are not; empty: all
}

// ParseOptions reads the arguments of internal-sftp in sshd_config. ignored are those that have no effect: -f, because
// the gateway's log has no facilities, and -e and -h, which choose another log than the gateway's.
func ParseOptions(args []string) (o Options, ignored []string, err error) {
	o = Options{Level: LogChanges}
	set := pflag.NewFlagSet("internal-sftp", pflag.ContinueOnError)
	set.Usage = func() {}
	set.BoolVarP(&o.ReadOnly, "read-only", "R", false, "")
	set.StringVarP(&o.Dir, "start", "d", "", "")
	set.StringSliceVarP(&o.Deny, "deny", "P", nil, "")
	set.StringSliceVarP(&o.Allow, "allow", "p", nil, "")
	level := set.StringP("level", "l", "INFO", "")
	umask := set.StringP("umask", "u", "", "")
	set.StringP("facility", "f", "", "")
	set.BoolP("stderr", "e", false, "")
	set.BoolP("host", "h", false, "")
	fail := func(err error) (Options, []string, error) {
		return Options{}, nil, fmt.Errorf("arguments of the SFTP server: %w; it takes -d -e -f -h -l -P -p -R and -u of sftp-server(8)", err)
	}
	if err := set.Parse(args); err != nil {
		return fail(err)
	}
	if set.NArg() > 0 {
		return fail(fmt.Errorf("unexpected %q", set.Arg(0)))
	}
	var known bool
	if o.Level, known = levels[strings.ToUpper(*level)]; !known {
		return fail(fmt.Errorf("unknown level %q", *level))
	}
	o.Umask = -1
	if *umask != "" {
		n, err := strconv.ParseUint(*umask, 8, 32)
		if err != nil || n > 0o777 {
			return fail(fmt.Errorf("umask %q is not an octal number up to 777", *umask))
		}
		o.Umask = int(n)
	}
	for _, name := range slices.Concat(o.Deny, o.Allow) {
		if _, known := requests[name]; !known {
			return fail(fmt.Errorf("unknown request %q", name))
		}
	}
	for _, flag := range []string{"e", "f", "h"} {
		if set.ShorthandLookup(flag).Changed {
			ignored = append(ignored, "-"+flag)
		}
	}
	return o, ignored, nil
}

var levels = map[string]Level{
	"QUIET": LogNothing, "FATAL": LogNothing, "ERROR": LogNothing, "INFO": LogChanges,
	"VERBOSE": LogAll, "DEBUG": LogAll, "DEBUG1": LogAll, "DEBUG2": LogAll, "DEBUG3": LogAll,
}

// refused reports whether the options forbid a request.
func (o *Options) refused(name string) bool {
	return o.ReadOnly && requests[name].changes || slices.Contains(o.Deny, name) ||
		len(o.Allow) > 0 && !slices.Contains(o.Allow, name)
}

// requests are those that options and log call by their names in sftp-server(8), which `sftp-server -Q requests` lists.
// Reads and writes are logged with the closing of their file; these levels are for those that fail.
var requests = map[string]struct {
	changes bool // refused to a read-only session
	level   Level
}{
	"open": {false, LogChanges}, "close": {false, LogChanges}, "read": {false, LogChanges}, "write": {true, LogChanges},
	"lstat": {false, LogAll}, "fstat": {false, LogAll}, "stat": {false, LogAll},
	"setstat": {true, LogChanges}, "fsetstat": {true, LogChanges}, "lsetstat": {true, LogChanges},
	"opendir": {false, LogChanges}, "readdir": {false, LogAll}, "remove": {true, LogChanges}, "mkdir": {true, LogChanges},
	"rmdir": {true, LogChanges}, "realpath": {false, LogAll}, "rename": {true, LogChanges}, "readlink": {false, LogAll},
	"symlink": {true, LogChanges}, "posix-rename": {true, LogChanges}, "statvfs": {false, LogAll}, "fstatvfs": {false, LogAll},
	"hardlink": {true, LogChanges}, "fsync": {true, LogAll}, "limits": {false, LogAll}, "expand-path": {false, LogAll},
	"copy-data": {true, LogChanges}, "home-directory": {false, LogAll}, "users-groups-by-id": {false, LogAll},
}

// requestNames are the names of the packet types; those of extensions are in their requests.
var requestNames = [256]string{
	typeOpen: "open", typeClose: "close", typeRead: "read", typeWrite: "write", typeLstat: "lstat", typeFstat: "fstat",
	typeSetstat: "setstat", typeFsetstat: "fsetstat", typeOpendir: "opendir", typeReaddir: "readdir", typeRemove: "remove",
	typeMkdir: "mkdir", typeRmdir: "rmdir", typeRealpath: "realpath", typeStat: "stat", typeRename: "rename",
	typeReadlink: "readlink", typeSymlink: "symlink",
}
