// SPDX-License-Identifier: Apache-2.0

// Package cgroup runs commands in control groups of their own, of version 1 or
// 2, to show how they do with little memory or few processors. Making groups
// needs root, and /sys/fs/cgroup to be writable.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Limits is what the processes of a group may take; zero is no limit.
type Limits struct {
	Memory int64   // bytes, page cache included
	Cores  float64 // processors' time
}

// Group is a control group. Of version 1 it is one in each hierarchy it needs.
type Group struct{ dirs []string }

const mount = "/sys/fs/cgroup"

// period is the one a processor quota is for, in microseconds.
const period = 100_000

// New makes a group.
func New(l Limits) (*Group, error) {
	g := &Group{}
	name := fmt.Sprintf("ims-buildenv-%d-%d", os.Getpid(), time.Now().UnixNano())
	_, err := os.Stat(filepath.Join(mount, "cgroup.controllers"))
	v2 := err == nil
	var settings [][3]string // controller, file, value
	if n := strconv.FormatInt(l.Memory, 10); l.Memory > 0 && v2 {
		settings = append(settings, [3]string{"memory", "memory.max", n}, [3]string{"memory", "memory.swap.max", "0"})
	} else if l.Memory > 0 {
		settings = append(settings, [3]string{"memory", "memory.limit_in_bytes", n})
	}
	if quota := strconv.Itoa(int(l.Cores * period)); l.Cores > 0 && v2 {
		settings = append(settings, [3]string{"cpu", "cpu.max", fmt.Sprint(quota, " ", period)})
	} else if l.Cores > 0 {
		settings = append(settings, [3]string{"cpu", "cpu.cfs_period_us", strconv.Itoa(period)}, [3]string{"cpu", "cpu.cfs_quota_us", quota})
	}
	for _, s := range settings {
		dir := filepath.Join(mount, s[0], name)
		if v2 {
			dir = filepath.Join(mount, name)
		}
		if err := g.set(dir, s, v2); err != nil {
			return nil, errors.Join(err, g.Remove())
		}
	}
	return g, nil
}

// set makes the group if need be and writes one of its files.
func (g *Group) set(dir string, s [3]string, v2 bool) error {
	if len(g.dirs) == 0 || g.dirs[len(g.dirs)-1] != dir {
		if v2 {
			// Fails where the controller is on already, or out of reach: then the file is not there.
			_ = os.WriteFile(filepath.Join(mount, "cgroup.subtree_control"), []byte("+cpu +memory"), 0)
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		g.dirs = append(g.dirs, dir)
	}
	err := os.WriteFile(filepath.Join(dir, s[1]), []byte(s[2]), 0)
	if s[1] == "memory.swap.max" && errors.Is(err, os.ErrNotExist) {
		return nil // a kernel without swap
	}
	return err
}

// Command returns a command that joins the group before its program starts.
func (g *Group) Command(ctx context.Context, argv ...string) *exec.Cmd {
	script := ""
	for _, dir := range g.dirs {
		script += "echo $$ > " + filepath.Join(dir, "cgroup.procs") + " && "
	}
	return exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", script + `exec "$@"`, "sh"}, argv...)...)
}

// Remove removes the group, whose processes must have ended.
func (g *Group) Remove() error {
	var errs []error
	for _, dir := range g.dirs {
		err := syscall.Rmdir(dir)
		for i := 0; err == syscall.EBUSY && i < 100; i++ { // they are gone a moment after they were waited for
			time.Sleep(10 * time.Millisecond)
			err = syscall.Rmdir(dir)
		}
		if err != nil {
			errs = append(errs, &os.PathError{Op: "remove", Path: dir, Err: err})
		}
	}
	return errors.Join(errs...)
}
