// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
)

// ticks is the unit of times in /proc/PID/stat: USER_HZ, 100 on every architecture we build for (proc_pid_stat(5)).
const ticks = 100

// daemon is one SSH server under comparison.
type daemon struct {
	cmd   *exec.Cmd
	port  int
	alone int // its processes when nobody is connected
}

// sshConfig is what both servers read; each takes the keywords it knows.
const sshConfig = `Port %d
ListenAddress 127.0.0.1
HostKey %s
PermitRootLogin yes
PubkeyAuthentication yes
AuthorizedKeysFile %s
PasswordAuthentication no
StrictModes no
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
%s
`

// noInotify makes programs of a user namespace find no inotify; user_namespaces(7), "namespace limits".
const noInotify = "echo 0 > /proc/sys/user/max_inotify_instances"

// start runs program with the keys in dir and lines more of configuration, and waits until it accepts connections. It
// has namespaces of its own, in which the shell command before runs, because root's home must be empty: bash reads
// .bashrc when a server of SSH starts it, and what that does would be in every figure.
func (b *sshBench) start(program, lines string, env []string, before string) (*daemon, error) {
	held, addr, err := port.Hold("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer held.Close()
	config := filepath.Join(b.dir, strconv.Itoa(addr.Port)+".conf")
	text := fmt.Sprintf(sshConfig, addr.Port, filepath.Join(b.dir, "host"), filepath.Join(b.dir, "authorized_keys"), lines)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	argv := []string{"sh", "-euc", before + "\nmount -t tmpfs -o mode=700 none /root\n" + `exec "$0" "$@"`, program, "-D", "-e", "-f", config}
	var log bytes.Buffer
	d := &daemon{cmd: exec.CommandContext(b.ctx, argv[0], argv[1:]...), port: addr.Port}
	d.cmd.Env, d.cmd.Stderr = append(os.Environ(), env...), &log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if before == noInotify {
		all := []syscall.SysProcIDMap{{Size: 1 << 16}}
		d.cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: all, GidMappings: all, GidMappingsEnableSetgroups: true,
		}
	}
	d.cmd.Cancel = func() error { return d.cmd.Process.Signal(syscall.SIGTERM) }
	d.cmd.WaitDelay = 10 * time.Second
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	for range 200 {
		if c, err := net.Dial("tcp", d.addr()); err == nil {
			c.Close()
			time.Sleep(200 * time.Millisecond) // OpenSSH's process of this connection is gone
			d.alone = len(tree(d.cmd.Process.Pid))
			return d, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	d.stop()
	return nil, fmt.Errorf("%s does not listen\n%s", program, log.Bytes())
}

func (d *daemon) addr() string { return "127.0.0.1:" + strconv.Itoa(d.port) }

// stop ends the server as its user would.
func (d *daemon) stop() {
	d.cmd.Process.Signal(syscall.SIGTERM)
	d.cmd.Wait()
}

// settle waits until nobody is connected any more.
func (d *daemon) settle() {
	for range 500 {
		if len(tree(d.cmd.Process.Pid)) <= d.alone {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// cpu is what the server's processes have used, those that have ended among them, in seconds.
func (d *daemon) cpu() float64 {
	d.settle()
	var sum int64
	for _, p := range tree(d.cmd.Process.Pid) {
		sum += p.ticks
	}
	return float64(sum) / ticks
}

// memory is the server's share of memory (PSS), in bytes: pages that processes share are counted once.
func (d *daemon) memory() (sum int64, err error) {
	for _, p := range tree(d.cmd.Process.Pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // ended meanwhile
		} else if err != nil {
			return 0, err
		}
		for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
			if f := strings.Fields(sc.Text()); len(f) == 3 && f[0] == "Pss:" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				sum += n << 10
			}
		}
	}
	return sum, nil
}

// files counts the open descriptors of the server's processes.
func (d *daemon) files() (n int64) {
	for _, p := range tree(d.cmd.Process.Pid) {
		list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid))
		n += int64(len(list))
	}
	return n
}

// settleFiles waits until no more than n descriptors are open.
func (d *daemon) settleFiles(n int64) {
	for range 500 {
		if d.files() <= n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

type proc struct {
	pid, parent int
	ticks       int64 // user and system time, its own and of children it has waited for
}

// tree returns the process pid and all its descendants.
func tree(pid int) []proc {
	dirs, _ := os.ReadDir("/proc")
	children := map[int][]proc{}
	var found []proc
	for _, dir := range dirs {
		n, err := strconv.Atoi(dir.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + dir.Name() + "/stat")
		if err != nil {
			continue // ended meanwhile
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // state is the first, field 3 of proc_pid_stat(5)
		p := proc{pid: n}
		p.parent, _ = strconv.Atoi(f[1])
		for _, time := range f[11:15] {
			t, _ := strconv.ParseInt(time, 10, 64)
			p.ticks += t
		}
		children[p.parent] = append(children[p.parent], p)
		if n == pid {
			found = []proc{p}
		}
	}
	for i := 0; i < len(found); i++ {
		found = slices.Concat(found, children[found[i].pid])
	}
	return found
}

// await looks every millisecond until the file is there.
func await(ctx context.Context, path string) error {
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}
