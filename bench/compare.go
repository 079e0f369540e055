// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"syscall"
	"time"
)

// comparison is one job done by our program and by another one.
type comparison struct {
	name         string
	ours, theirs side
	goals        goals
	single       bool // takes minutes: run once, without warming up
}

// goals are what we mean to reach; 0: none is set.
type goals struct {
	speed  float64 // how many times as fast as the other
	memory float64 // our peak, as a share of the other's
	size   float64 // our output, as a share of the other's
}

// missed names what was not reached.
func (g goals) missed(ours, theirs figures) []string {
	var list []string
	if g.speed > 0 && theirs.wall/ours.wall < g.speed {
		list = append(list, "speed")
	}
	if g.memory > 0 && float64(ours.rss) > g.memory*float64(theirs.rss) {
		list = append(list, "memory")
	}
	if g.size > 0 && float64(ours.bytes) > g.size*float64(theirs.bytes) {
		list = append(list, "size")
	}
	return list
}

// once returns the comparison for a job that takes minutes.
func (c comparison) once() comparison {
	c.single = true
	return c
}

// side is one way to do the job.
type side struct {
	argv   []string
	env    []string       // nil: ours
	before func() error   // puts things back, outside the measured time
	output string         // a file whose size matters
	server func() float64 // CPU of the server that serves argv since its start, in seconds; nil: there is none
}

// figures are medians: seconds, seconds of user and system CPU, bytes.
type figures struct {
	wall, cpu  float64
	rss, bytes int64
}

// measure runs both sides n times in turn, after one run of each that only warms
// the caches.
func (c comparison) measure(ctx context.Context, n int) (ours, theirs figures, err error) {
	var a, b []figures
	warm := 1
	if c.single {
		n, warm = 1, 0
	}
	for i := range n + warm {
		x, err := c.ours.run(ctx)
		if err != nil {
			return ours, theirs, err
		}
		y, err := c.theirs.run(ctx)
		if err != nil {
			return ours, theirs, err
		}
		if i >= warm {
			a, b = append(a, x), append(b, y)
		}
	}
	return median(a), median(b), nil
}

func (s side) run(ctx context.Context) (figures, error) {
	if s.before != nil {
		if err := s.before(); err != nil {
			return figures{}, err
		}
	}
	var out bytes.Buffer
	resetPeak()
	served := 0.0
	if s.server != nil {
		served = -s.server()
	}
	cmd := exec.CommandContext(ctx, s.argv[0], s.argv[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, nil, &out
	start := time.Now()
	err := cmd.Run()
	wall := time.Since(start)
	if err != nil {
		return figures{}, fmt.Errorf("%v: %w\n%s", s.argv, err, out.Bytes())
	}
	f := figures{wall: wall.Seconds(), cpu: (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()}
	if s.server != nil {
		f.cpu += served + s.server()
	}
	if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		f.rss = usage.Maxrss << 10 // getrusage(2): kilobytes
	}
	if s.output != "" {
		st, err := os.Stat(s.output)
		if err != nil {
			return figures{}, err
		}
		f.bytes = st.Size()
	}
	return f, nil
}

// resetPeak forgets our own peak memory, with which a child's begins: until it
// executes its program it shares our memory (proc_pid_clear_refs(5)).
func resetPeak() {
	debug.FreeOSMemory()
	os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // without it the peaks are upper bounds
}

func median(runs []figures) figures {
	middle := func(value func(figures) float64) float64 {
		var values []float64
		for _, f := range runs {
			values = append(values, value(f))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return figures{
		wall:  middle(func(f figures) float64 { return f.wall }),
		cpu:   middle(func(f figures) float64 { return f.cpu }),
		rss:   int64(middle(func(f figures) float64 { return float64(f.rss) })),
		bytes: int64(middle(func(f figures) float64 { return float64(f.bytes) })),
	}
}
