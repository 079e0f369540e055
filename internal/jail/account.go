// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

const (
	// maxAccountFile bounds passwd, group and environment, which belong to whoever had the shell.
	maxAccountFile = 1 << 20

	// maxGroups bounds the supplementary groups; the kernel's own limit is 65536.
	maxGroups = 1024

	defaultShell = "/bin/sh"
	defaultHome  = "/root"
	defaultPath  = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// account is root as the jail's own files describe it.
type account struct {
	name, home, shell string
	gid               uint32
	groups            []uint32
	ttyGID            int      // of group tty, -1 without one
	env               []string // /etc/environment
}

// lookupAccount reads root's entry from the passwd, group and environment files below root. It is tolerant: what cannot
// be read or parsed leaves the defaults, since a broken image must still be repairable through a shell.
func lookupAccount(root *os.File, files *rootFiles) account {
	a := account{name: "root", home: defaultHome, shell: defaultShell, ttyGID: -1}
	if b, err := files.read(root, "/etc/passwd"); err == nil {
		a.parsePasswd(b)
	}
	if b, err := files.read(root, "/etc/group"); err == nil {
		a.parseGroup(b)
	}
	if b, err := files.read(root, "/etc/environment"); err == nil {
		a.env = parseEnvironment(b)
	}
	return a
}

// parsePasswd takes the first entry named root, whatever its uid: like sshd, the session is uid 0 anyway.
func (a *account) parsePasswd(b []byte) {
	for line := range lines(b) {
		f := strings.Split(line, ":")
		if len(f) != 7 || f[0] != a.name {
			continue
		}
		if gid, err := strconv.ParseUint(f[3], 10, 32); err == nil {
			a.gid = uint32(gid)
		}
		if strings.HasPrefix(f[5], "/") {
			a.home = f[5]
		}
		if strings.HasPrefix(f[6], "/") {
			a.shell = f[6]
		}
		return
	}
}

func (a *account) parseGroup(b []byte) {
	a.groups = []uint32{a.gid}
	for line := range lines(b) {
		f := strings.Split(line, ":")
		if len(f) != 4 {
			continue
		}
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		if f[0] == "tty" && a.ttyGID < 0 && gid <= 1<<31-1 {
			a.ttyGID = int(gid)
		}
		if slices.Contains(strings.Split(f[3], ","), a.name) && !slices.Contains(a.groups, uint32(gid)) && len(a.groups) < maxGroups {
			a.groups = append(a.groups, uint32(gid))
		}
	}
}

// parseEnvironment reads KEY=value lines as pam_env(8) does for /etc/environment: an optional "export ", one pair of
// quotes around the value, # starts a comment line.
func parseEnvironment(b []byte) []string {
	var env []string
	for line := range lines(b) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") || !validKey(key) || strings.ContainsRune(value, 0) {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		if len(env) < maxList {
			env = append(env, key+"="+value)
		}
	}
	return env
}

func validKey(key string) bool {
	return key != "" && !strings.ContainsFunc(key, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	}) && (key[0] < '0' || key[0] > '9')
}

// lines iterates over the lines of b, leaving out those longer than a scanner's buffer and all after them.
func lines(b []byte) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		s := bufio.NewScanner(bytes.NewReader(b))
		for s.Scan() {
			if !yield(s.Text()) {
				return
			}
		}
	}
}

// defaultEnv is what a session's environment starts from. Where "/" is an image, systemctl must neither look for a running
// systemd nor fail for want of one: enable and mask work on the files, start and reload do nothing and succeed, as in any
// chroot. With the jail's own /proc it could not tell (systemd: running_in_chroot_or_offline).
func defaultEnv(level Level) []string {
	env := []string{"PATH=" + defaultPath}
	if level != Plain {
		env = append(env, "SYSTEMD_OFFLINE=1")
	}
	return env
}

// environment builds a session's environment on the defaults: what login(1) sets on top of what the caller asks for.
// Later entries win, in the order of do_setup_env in OpenSSH's session.c, PAM with the image's /etc/environment included:
// the client's, the image's, the server's, the job's, and last what describes the session itself.
func (a *account) environment(defaults []string, shell, home, ttyName string, req *spawnMsg, job []string) []string {
	pairs := slices.Concat(defaults, req.env, a.env, req.setEnv, job, []string{
		"HOME=" + home, "USER=" + a.name, "LOGNAME=" + a.name, "SHELL=" + shell, "MAIL=/var/mail/" + a.name,
	})
	if req.tty != nil {
		if req.tty.Term != "" { // a client without TERM; bash makes it dumb then
			pairs = append(pairs, "TERM="+req.tty.Term)
		}
		if ttyName != "" {
			pairs = append(pairs, "SSH_TTY="+ttyName)
		}
	}
	at := make(map[string]int, len(pairs))
	env := make([]string, 0, len(pairs))
	for _, kv := range pairs {
		key, _, ok := strings.Cut(kv, "=")
		if !ok || key == "" || strings.ContainsRune(kv, 0) {
			continue
		}
		if i, dup := at[key]; dup {
			env[i] = kv
			continue
		}
		at[key] = len(env)
		env = append(env, kv)
	}
	return env
}

// openInRoot resolves name with root as "/", through symlinks but never out of it, and returns an O_PATH handle. The kernel
// does that alone where it can; the library would have it confirm each result by way of /proc, a dozen calls for each of
// the files that a command's start takes.
func openInRoot(root *os.File, name string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	dir, err := rawFD(root)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat2(dir, name, &how)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EAGAIN) { // an old kernel or filter; a rename on the way
		return pathrs.OpenatInRoot(root, name)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open in image root", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// rootFiles remembers files that are read again and again.
type rootFiles struct {
	mu    sync.Mutex
	known map[string]rootFile
}

type rootFile struct {
	identity fileIdentity
	data     []byte
}

type fileIdentity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// settled is how old a file's last change must be for its identity to vouch for its content: more than a tick of the
// clock that stamps it.
const settled = 2 * time.Second

// read is readInRoot, for a file that has not changed without reading it.
func (r *rootFiles) read(root *os.File, name string) ([]byte, error) {
	h, err := openInRoot(root, name)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	fd, err := rawFD(h)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	now := rootFile{identity: fileIdentity{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}}
	r.mu.Lock()
	defer r.mu.Unlock()
	if k, ok := r.known[name]; ok && k.identity == now.identity {
		return k.data, nil
	}
	delete(r.known, name)
	if now.data, err = readHandle(h, name); err != nil {
		return nil, err
	}
	if time.Since(time.Unix(st.Ctim.Unix())) > settled {
		if r.known == nil {
			r.known = make(map[string]rootFile)
		}
		r.known[name] = now
	}
	return now.data, nil
}

// readInRoot reads a regular file of at most maxAccountFile bytes below root. Nothing but a regular file is ever
// opened for reading: opening a FIFO would hang, opening a device would act on it.
func readInRoot(root *os.File, name string) ([]byte, error) {
	h, err := openInRoot(root, name)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return readHandle(h, name)
}

func readHandle(h *os.File, name string) ([]byte, error) {
	fi, err := h.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a regular file", name)
	}
	f, err := pathrs.Reopen(h, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAccountFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxAccountFile {
		return nil, fmt.Errorf("read %s: above %d bytes", name, maxAccountFile)
	}
	return b, nil
}

// modeInRoot returns the mode of what name resolves to below root.
func modeInRoot(root *os.File, name string) (os.FileMode, error) {
	h, err := openInRoot(root, name)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	fi, err := h.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Mode(), nil
}

// regularInRoot reports whether name is a regular file below root; a missing file or directory is no error.
func regularInRoot(root *os.File, name string) (bool, error) {
	mode, err := modeInRoot(root, name)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	return err == nil && mode.IsRegular(), err
}
