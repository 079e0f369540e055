// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// modeLend is the child mode that mounts what the sessions of the chroot level need.
const modeLend = "jail-lend"

// The pod's default capabilities mount nothing, but in a user namespace of its own anybody may mount. The sessions cannot
// live in one: mknod(2) would fail in it, file capabilities would be written for that namespace, and its root would
// hold every capability. So a short-lived child builds the view of the namespaces level there and hands over an open
// directory, its root. The sessions chroot into that, although it belongs to another mount namespace, and remain what
// they are. For them the kernel treats such a foreign mount as nosuid (mnt_may_suid).
//
// The lent mounts live as long as somebody holds the namespace: init does, and nobody else.

// lentFiles is how many descriptors make up the loan.
const lentFiles = 3

// borrow has the mounts made; the caller gives the files to init: the root directory, the namespace, and this program as
// it may be seen in a jail with a /proc (readonlyBinary).
func (j *Jail) borrow(ctx context.Context, m setupMsg) (files []*os.File, err error) {
	uids, err := idMap("/proc/self/uid_map")
	if err != nil {
		return nil, err
	}
	gids, err := idMap("/proc/self/gid_map")
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), modeLend)
	defer theirs.Close()
	c, err := newConn(os.NewFile(uintptr(fds[0]), "jail"))
	if err != nil {
		return nil, err
	}
	defer c.close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	child, err := os.StartProcess("/proc/self/exe", []string{"sshd", modeLend}, &os.ProcAttr{
		Dir: "/", Env: childEnv, Files: []*os.File{null, null, null, theirs},
		Sys: &syscall.SysProcAttr{
			Setsid: true, Credential: AsRoot(), Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			UidMappings: uids, GidMappings: gids, GidMappingsEnableSetgroups: true,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	theirs.Close()
	stop := context.AfterFunc(ctx, func() { _ = child.Kill() })
	defer stop()
	defer child.Wait() //nolint:errcheck // what it had to say came by the socket
	if err := c.send(opSetup, 0, &m); err != nil {
		return nil, err
	}
	p, err := c.recv()
	if err != nil {
		return nil, fmt.Errorf("mount in a user namespace: the child ended: %w", err)
	}
	var failed failedMsg
	var ready readyMsg
	switch {
	case p.op == opFailed && failed.decode(p.body) == nil:
		err = errors.New(failed.text)
	case p.op == opReady && ready.decode(p.body) == nil && len(p.files) == lentFiles:
		for _, n := range ready.notes {
			j.log.Warn("jail is incomplete", "level", j.level, "note", n)
		}
		return p.files, nil
	default:
		err = errMalformed
	}
	p.closeFiles()
	return nil, fmt.Errorf("mount in a user namespace: %w", err)
}

// idMap is the identity map of all ids that the calling process's user namespace has (user_namespaces(7)).
func idMap(path string) ([]syscall.SysProcIDMap, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var ids []syscall.SysProcIDMap
	for line := range strings.Lines(string(b)) {
		var inside, outside, size int
		if _, err := fmt.Sscan(line, &inside, &outside, &size); err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		ids = append(ids, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: size})
	}
	return ids, nil
}

// lendMain builds the mounts and hands them over.
func lendMain() error {
	runtime.LockOSThread()
	if t, err := unix.GetsockoptInt(socketFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		return errors.New("internal mode, started by sshd only")
	}
	unix.CloseOnExec(socketFD)
	c, err := newConn(os.NewFile(socketFD, "gateway"))
	if err != nil {
		return err
	}
	p, err := c.recv()
	if err != nil {
		return fmt.Errorf("read setup: %w", err)
	}
	p.closeFiles()
	var m setupMsg
	if err := m.decode(p.body); err != nil {
		return err
	}
	files, notes, err := lend(&m)
	if err != nil {
		return c.send(opFailed, p.id, &failedMsg{text: err.Error()})
	}
	return c.send(opReady, p.id, &readyMsg{notes: notes}, files...)
}

func lend(m *setupMsg) (files []*os.File, notes []string, err error) {
	self, err := readonlyBinary()
	if err != nil {
		return nil, nil, err
	}
	if notes, err = enterRoot(m, true); err != nil {
		return nil, nil, err
	}
	root, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, nil, err
	}
	ns, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return nil, nil, err
	}
	return []*os.File{root, ns, self}, notes, nil
}
