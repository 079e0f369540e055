// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

const statusUsage = `Lists the connections and sessions of the running gateway of this container.

Usage:
  sshd status [--json] [--close ID]

ID is what the first column shows: 3 is a connection, 3.1 its first session. Closing a
session hangs up its terminal and sends its command SIGHUP. Closing a connection is what
a client does that goes away: commands without a terminal run on. IN and OUT are bytes
from and to the client, AGE and IDLE times; IDLE counts from the last byte moved.

Options:
%s
Exit status: 0 if it could be done, 1 if no gateway answers or there is no such ID, 2 for a
wrong command line.
`

// statusMain is `sshd status`, asking the gateway that has its socket in dir.
func statusMain(args []string, dir string, stdout, stderr io.Writer) int {
	set := pflag.NewFlagSet("sshd status", pflag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.SortFlags = false
	asJSON := set.Bool("json", false, "print JSON, as docs/operations.md describes it")
	id := set.String("close", "", "close the connection or session ID")
	err := set.Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(stdout, statusUsage, set.FlagUsagesWrapped(90))
		return 0
	case err == nil && set.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if err != nil {
		return fail(stderr, 2, fmt.Errorf("status: %w; see sshd status --help", err))
	}
	st, err := ask(dir, statusRequest{Close: *id})
	if err != nil {
		return fail(stderr, 1, err)
	}
	if st == nil {
		return 0
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		err = enc.Encode(st)
	} else {
		err = st.print(stdout)
	}
	if err != nil {
		return fail(stderr, 1, fmt.Errorf("print status: %w", err))
	}
	return 0
}

// ask puts a request to the one gateway that answers in dir. A socket nobody listens on is what a gateway left that
// was killed.
func ask(dir string, req statusRequest) (*status, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*"+socketSuffix))
	if err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	var open []net.Conn
	var names []string
	for _, path := range paths {
		c, err := net.DialTimeout("unix", path, statusTimeout)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("status: %w: it takes the user that runs the gateway", err)
		}
		defer c.Close()
		open, names = append(open, c), append(names, strings.TrimSuffix(filepath.Base(path), socketSuffix))
	}
	switch len(open) {
	case 0:
		return nil, fmt.Errorf("status: no gateway is running here: none answers in %s; run this in the container of sshd", dir)
	case 1:
		return exchange(open[0], req)
	}
	return nil, fmt.Errorf("status: %d gateways are running here, of the jobs %s; run this in the container of one", len(open), strings.Join(names, ", "))
}

func exchange(c net.Conn, req statusRequest) (*status, error) {
	if err := c.SetDeadline(time.Now().Add(2 * statusTimeout)); err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return nil, fmt.Errorf("status: ask the gateway: %w", err)
	}
	var reply statusReply
	if err := json.NewDecoder(io.LimitReader(c, maxStatus)).Decode(&reply); err != nil {
		return nil, fmt.Errorf("status: answer of the gateway: %w", err)
	}
	if reply.Error != "" {
		return nil, errors.New(reply.Error)
	}
	return reply.Status, nil
}

// print writes a table: a line per session, and one for each connection without.
func (st *status) print(w io.Writer) error {
	if st.Closing != "" {
		fmt.Fprintf(w, "closing: %s\n", st.Closing)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tPEER\tKEY\tKIND\tTTY\tAGE\tIDLE\tIN\tOUT\tPID\tCOMMAND")
	for _, c := range st.Connections {
		key := "(not logged in)"
		if c.Authenticated {
			key = plain(strings.TrimSpace(cut(c.Comment, 32) + " " + cut(c.Key, 19)))
		}
		if len(c.Sessions) == 0 {
			kind := "-"
			if c.Forwarded+c.Listening > 0 {
				kind = "forward"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t-\t%s\t%s\t%s\t%s\t-\t\n", c.ID, c.Peer, key, kind, span(c.Age), span(c.Idle), size(c.In), size(c.Out))
		}
		for _, s := range c.Sessions {
			tty, kind := "no", s.Kind
			if s.TTY {
				tty = "yes"
			}
			if kind == "" {
				kind = "-"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n",
				s.ID, c.Peer, key, kind, tty, span(s.Age), span(s.Idle), size(s.In), size(s.Out), s.PID, plain(cut(s.Command, 60)))
		}
	}
	return t.Flush()
}

// plain makes others' text safe for a terminal and a table.
func plain(s string) string { q := strconv.Quote(s); return q[1 : len(q)-1] }

func span(seconds int64) string { return (time.Duration(seconds) * time.Second).String() }

func size(n int64) string {
	if n < 10<<10 {
		return strconv.FormatInt(n, 10)
	}
	for _, unit := range []string{"K", "M", "G"} {
		if n >>= 10; n < 10<<10 {
			return strconv.FormatInt(n, 10) + unit
		}
	}
	return strconv.FormatInt(n>>10, 10) + "T"
}
