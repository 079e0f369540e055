// SPDX-License-Identifier: Apache-2.0

package escape

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/pkg/sftp"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// built is the hostile program, compiled once.
var built struct {
	once sync.Once
	path string
}

func attacker(t *testing.T) string {
	t.Helper()
	built.once.Do(func() {
		path := filepath.Join(built.path, "attacker")
		testkit.BuildAttacker(t, path)
		built.path = path
	})
	return built.path
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ims-buildenv-escape-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built.path = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// result is how one attack ended in one container.
type result struct {
	worked bool
	how    string
}

func (r result) String() string {
	if r.worked {
		return "OUT"
	}
	return "held"
}

// column is one sshd in one container.
type column struct {
	name             string
	ours, privileged bool
	// falls are attacks that must work, or the list proves nothing.
	falls []string
}

var columns = []column{
	{name: "namespaces", ours: true, privileged: true},
	{name: "chroot", ours: true},
	{name: "OpenSSH", falls: []string{"chroot", "chroot-held", "raw-socket", "signal", "capabilities"}},
	{name: "OpenSSH privileged", privileged: true, falls: []string{"chroot", "chroot-held", "proc-links", "ptrace", "mount", "mknod", "setns", "signal"}},
}

// TestEscape promises that root gets out of neither level of the jail, whatever
// the container allows. ATTACK: the hostile program's whole list, in a session
// of its own. The same list gets out of OpenSSH's ChrootDirectory, so it would
// get out of a chroot that was no more than that.
func TestEscape(t *testing.T) {
	results := make([]map[string]result, len(columns))
	var attacks [][2]string
	t.Run("columns", func(t *testing.T) {
		for i, col := range columns {
			c := start(t, fmt.Sprint(i), col.ours, col.privileged)
			if i == 0 {
				attacks = list(t, c)
			}
			t.Run(col.name, func(t *testing.T) {
				c.t = t
				results[i] = c.attack(attacks)
				results[i][race] = c.race()
				col.judge(t, results[i])
			})
		}
	})
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "attack\t")
	for _, col := range columns {
		fmt.Fprintf(w, "%s\t", col.name)
	}
	fmt.Fprintln(w)
	for _, a := range append(attacks, [2]string{race, "swap a directory for a link while SFTP opens files below it"}) {
		fmt.Fprintf(w, "%s\t", a[1])
		for i := range columns {
			fmt.Fprintf(w, "%s\t", results[i][a[0]])
		}
		if a[0] == filtered {
			fmt.Fprint(w, "\n  by our filter, and by nobody's\t")
			for i := range columns {
				name, _, _ := strings.Cut(results[i][filtered].how, " ")
				fmt.Fprintf(w, "%s\t", name)
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	t.Logf("root in a session tries to get out:\n%s", &table)
}

// list asks the hostile program for what it can do: names and descriptions.
func list(t *testing.T, c *container) (attacks [][2]string) {
	t.Helper()
	out, err := c.run("attacker list")
	if err != nil {
		t.Fatalf("list the attacks: %v\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		name, what, _ := strings.Cut(strings.TrimSpace(line), "\t")
		attacks = append(attacks, [2]string{name, what})
	}
	if len(attacks) < 25 {
		t.Fatalf("only %d attacks", len(attacks))
	}
	return attacks
}

// attack runs every attack in one session. The gateway is the container's
// first process.
func (c *container) attack(attacks [][2]string) map[string]result {
	c.t.Helper()
	command := ""
	for _, a := range attacks {
		command += fmt.Sprintf("echo == %s; /usr/bin/attacker %s %s 1; echo status $?;", a[0], a[0], strings.Join(secretFiles, ":"))
	}
	out, err := c.run(command)
	if err != nil {
		c.t.Fatalf("attack: %v\n%s", err, out)
	}
	results := make(map[string]result)
	for part := range strings.SplitSeq(out, "== ") {
		name, rest, _ := strings.Cut(part, "\n")
		how, status, found := strings.Cut(rest, "status ")
		if !found {
			continue
		}
		how = strings.Join(strings.Fields(how), " ")
		switch strings.TrimSpace(status) {
		case "0", "1":
			results[name] = result{strings.TrimSpace(status) == "0", how}
		default:
			c.t.Errorf("attack %s ended with %s: %s", name, status, how)
		}
	}
	if len(results) != len(attacks) {
		c.t.Errorf("%d results of %d attacks:\n%s", len(results), len(attacks), out)
	}
	return results
}

const race = "sftp-race"

// filtered is the attack that our filter answers, and not only the kernel, which may have no modules.
const filtered = "module"

// race exchanges a directory with a link that leads out, as fast as it goes,
// while an SFTP client reads, writes and renames below that name.
func (c *container) race() result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// The client first: what is swapped while it logs in is swapped for nobody.
	server := c.ssh(ctx, "-s", "sftp")
	in, err := server.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		c.t.Fatal(err)
	}
	client, err := sftp.NewClientPipe(out, in)
	if err != nil {
		c.t.Fatal(err)
	}
	const seconds = 2
	up := strings.Repeat("../", 20)
	swap := c.ssh(ctx, fmt.Sprintf("mkdir -p /tmp/race/a && cd /tmp/race && echo inside > a/client-secret && ln -s %setc/admin-client-auth b && "+
		"echo ready && attacker swap a b %d && echo done", up, seconds))
	output, err := swap.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := swap.Start(); err != nil {
		c.t.Fatal(err)
	}
	line := make([]byte, 64)
	if n, err := output.Read(line); err != nil || string(line[:n]) != "ready\n" {
		c.t.Fatalf("race: %q, %v", line[:n], err)
	}
	over := make(chan string, 1)
	go func() {
		n, _ := output.Read(line)
		over <- string(line[:n])
	}()

	got, tries, inside := result{}, 0, 0
	for running := true; running; tries++ {
		select {
		case end := <-over:
			if running = false; end != "done\n" {
				c.t.Errorf("the swapping ended with %q", end)
			}
		default:
		}
		if f, err := client.Open("/tmp/race/a/client-secret"); err == nil {
			text := make([]byte, 256)
			n, _ := f.Read(text)
			f.Close()
			if strings.Contains(string(text[:n]), fileSecret) {
				got = result{true, "read the secret"}
			} else if n > 0 {
				inside++
			}
		}
		client.Mkdir("/tmp/race/a/made")
		client.Rename("/tmp/race/a/made", "/tmp/race/a/moved")
		if path, err := client.RealPath("/tmp/race/a/" + up + "mnt"); err == nil && path != "/mnt" {
			client.Remove(path)
		}
	}
	client.Close()
	server.Wait()
	if err := swap.Wait(); err != nil {
		c.t.Errorf("swap: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Join(c.dir, filepath.Dir(secretFiles[0]))); err != nil || len(entries) != 1 {
		got = result{true, fmt.Sprintf("wrote outside: %v %v", entries, err)}
	}
	if inside == 0 || inside == tries {
		c.t.Errorf("%d of %d openings met the directory: there was no race", inside, tries)
	}
	got.how += fmt.Sprintf(" (%d tries)", tries)
	return got
}

// judge compares a column with what is promised.
func (col column) judge(t *testing.T, results map[string]result) {
	t.Helper()
	for name, r := range results {
		t.Logf("%s: %s: %s", name, r, r.how)
		if col.ours && name == filtered && strings.Count(r.how, "=EPERM") != strings.Count(r.how, "=") {
			t.Errorf("%s is not refused by the filter of system calls: %s", name, r.how)
		}
		if col.ours && r.worked {
			t.Errorf("%s got out: %s", name, r.how)
		}
		if col.ours && (strings.Contains(r.how, fileSecret) || strings.Contains(r.how, envSecret)) {
			t.Errorf("%s saw a secret: %s", name, r.how)
		}
		if !r.worked && slices.Contains(col.falls, name) {
			t.Errorf("%s does not work where nothing should hold it: it proves nothing (%s)", name, r.how)
		}
	}
	for _, name := range []string{"chroot", "chroot-held"} {
		if !col.ours && !strings.Contains(results[name].how, fileSecret) {
			t.Errorf("%s did not read the secret: %s", name, results[name].how)
		}
	}
}
