// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	gossh "golang.org/x/crypto/ssh"
)

// Sizes of the readings.
const (
	idleConnections    = 50
	growthExecs        = 20_000
	growthAborted      = 5_000
	latencyRuns        = 20
	memorySettlesAfter = 3 * time.Second // both sides; longer would only flatter a collected heap
)

// reading is what we and perhaps another program read from an instrument, less being better.
type reading struct {
	name, goal string
	measure    func(ctx context.Context) (ours, theirs string, err error)
}

// readings prints what is no duration of a job: memory, growth, latency.
func readings(ctx context.Context, bin, _, work string, w io.Writer) error {
	b, err := newSSHBench(ctx, bin, work)
	if err != nil {
		return err
	}
	defer b.close()
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "gateway\tours\tOpenSSH\tat most\t\n")
	for _, r := range b.readings() {
		ours, theirs, err := r.measure(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t\n", r.name, ours, theirs, r.goal)
	}
	return table.Flush()
}

func (b *sshBench) readings() []reading {
	return []reading{
		{"memory per idle connection", "OpenSSH's", func(ctx context.Context) (ours, theirs string, err error) {
			var each [2]int64
			for i, program := range []string{b.sshd, "/usr/sbin/sshd"} {
				if each[i], err = b.idle(ctx, program); err != nil {
					return "", "", err
				}
			}
			return kib(each[0]), kib(each[1]), nil
		}},
		{fmt.Sprintf("growth: %d execs and %d aborted connections", growthExecs, growthAborted), "none", func(ctx context.Context) (string, string, error) {
			s, err := b.growth(ctx)
			return s, "", err
		}},
		{"flag to exiting, with inotify", "300 ms", func(ctx context.Context) (string, string, error) {
			s, err := b.latency(ctx, "")
			return s, "", err
		}},
		{"flag to exiting, without inotify", "2500 ms", func(ctx context.Context) (string, string, error) {
			s, err := b.latency(ctx, noInotify)
			return s, "", err
		}},
	}
}

func kib(n int64) string { return strconv.FormatInt(n>>10, 10) + " KiB" }

// idle is what one connection on which nothing happens adds to the memory of all processes of the server, in bytes.
func (b *sshBench) idle(ctx context.Context, program string) (int64, error) {
	d, err := b.start(program, "", jobEnv(b.job, "False"), "")
	if err != nil {
		return 0, err
	}
	defer d.stop()
	before, err := d.memory()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	args := append(strings.Fields(b.options()), "-p", strconv.Itoa(d.port), "-N", "root@127.0.0.1")
	for range idleConnections {
		cmd := exec.CommandContext(ctx, "ssh", append([]string{"-o", "LogLevel=VERBOSE"}, args...)...)
		said, err := cmd.StderrPipe()
		if err != nil {
			return 0, err
		}
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		defer func() {
			cancel()
			cmd.Wait()
		}()
		if err := untilSaid(said, "Authenticated to"); err != nil {
			return 0, err
		}
	}
	time.Sleep(memorySettlesAfter)
	after, err := d.memory()
	return (after - before) / idleConnections, err
}

// untilSaid reads until the words appear.
func untilSaid(r io.Reader, words string) error {
	var said []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(said, []byte(words)) {
		n, err := r.Read(buf)
		if said = append(said, buf[:n]...); err != nil {
			return fmt.Errorf("the client ended without %q: %w\n%s", words, err, said)
		}
	}
	return nil
}

// growth is what the gateway keeps of connections and commands that are over.
func (b *sshBench) growth(ctx context.Context) (string, error) {
	d, err := b.start(b.sshd, "", jobEnv(b.job, "False"), "")
	if err != nil {
		return "", err
	}
	defer d.stop()
	files := d.files()
	load := func(execs, aborted int) error {
		if err := execMany(ctx, d.addr(), filepath.Join(b.dir, "id"), execs); err != nil {
			return err
		}
		for i := range aborted {
			if err := errors.Join(ctx.Err(), abort(d.addr(), i)); err != nil {
				return err
			}
			if i%50 == 49 { // a crowd would show how much so many take at once
				d.settleFiles(files)
			}
		}
		return nil
	}
	if err := load(growthExecs/10, growthAborted/10); err != nil { // what the first ones take is kept for the next
		return "", err
	}
	time.Sleep(memorySettlesAfter)
	before, err := d.memory()
	if err != nil {
		return "", err
	}
	if err := load(growthExecs, growthAborted); err != nil {
		return "", err
	}
	time.Sleep(memorySettlesAfter)
	after, err := d.memory()
	return fmt.Sprintf("%s, %d files", kib(after-before), d.files()-files), err
}

// execMany runs n commands on one connection, one after the other.
func execMany(ctx context.Context, addr, keyFile string, n int) error {
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	signer, err := gossh.ParsePrivateKey(key)
	if err != nil {
		return err
	}
	c, err := gossh.Dial("tcp", addr, &gossh.ClientConfig{
		User: "root", Auth: []gossh.AuthMethod{gossh.PublicKeys(signer)}, HostKeyCallback: gossh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return err
	}
	defer c.Close()
	for range n {
		if err := errors.Join(ctx.Err(), execTrue(c)); err != nil {
			return err
		}
	}
	return nil
}

func execTrue(c *gossh.Client) error {
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Run("true")
}

// abort goes away at one of several stages of the handshake.
func abort(addr string, stage int) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, part := range []string{"SSH-2.0-", "OpenSSH_9.2\r\n", "\x00\x00\x01\x00\x08\x14"}[:stage%4] {
		if _, err := c.Write([]byte(part)); err != nil {
			return nil // the server was faster
		}
	}
	return nil
}

// latency is the median of the times from a user's flag to the gateway's, while somebody sits at a terminal.
func (b *sshBench) latency(ctx context.Context, before string) (string, error) {
	var times []time.Duration
	for i := range latencyRuns {
		t, err := b.endOfJob(ctx, filepath.Join(b.dir, "end"), before)
		if err != nil {
			return "", fmt.Errorf("run %d: %w", i+1, err)
		}
		times = append(times, t)
	}
	slices.Sort(times)
	return fmt.Sprintf("%d ms", times[len(times)/2].Milliseconds()), nil
}

func (b *sshBench) endOfJob(ctx context.Context, job string, before string) (time.Duration, error) {
	defer os.RemoveAll(job)
	if err := os.MkdirAll(filepath.Join(job, "image-root"), 0o755); err != nil {
		return 0, err
	}
	touch := func(name string) error { return os.WriteFile(filepath.Join(job, name), nil, 0o644) }
	if err := touch("ready"); err != nil {
		return 0, err
	}
	d, err := b.start(b.sshd, "", jobEnv(job, "False"), before)
	if err != nil {
		return 0, err
	}
	defer d.stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", append(strings.Fields(b.options()), "-p", strconv.Itoa(d.port), "-tt", "root@127.0.0.1")...)
	keyboard, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	screen, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		keyboard.Close()
		cancel()
		cmd.Wait()
	}()
	keyboard.Write([]byte("echo at-$((1+1))-work\n"))
	if err := untilSaid(screen, "at-2-work"); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := touch("complete"); err != nil {
		return 0, err
	}
	err = await(ctx, filepath.Join(job, "exiting"))
	return time.Since(began), err
}
