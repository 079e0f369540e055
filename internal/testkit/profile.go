// SPDX-License-Identifier: Apache-2.0

package testkit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// hiddenEnv tells the program that it is the one HideProfile began again.
const hiddenEnv = "IMS_BUILDENV_TEST_PROFILE_HIDDEN"

// HideProfile, called by TestMain, lets the shells that the tests start find root's start-up files empty. A session that
// is not jailed has the machine's own home directory, and what a developer's ~/.bashrc runs there takes time, prints,
// or waits for a lock. The home directory is the account's, whatever HOME says, so an empty file is mounted over each, in
// a mount namespace of this process: it begins again there. Without root nothing happens, as no such test runs.
func HideProfile() {
	if os.Geteuid() != 0 || os.Getenv(hiddenEnv) != "" {
		return
	}
	if err := hideProfile(); err != nil {
		fmt.Fprintf(os.Stderr, "hide the shell's start-up files from the tests: %v\n", err)
		os.Exit(1)
	}
}

func hideProfile() error {
	account, err := user.LookupId("0")
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the namespace is this thread's, which execve lets become the process
	if err := unix.Unshare(unix.CLONE_NEWNS); errors.Is(err, unix.EPERM) {
		runtime.UnlockOSThread()
		return nil // a container's root, who may mount nothing: its profile is what it is
	} else if err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts from the machine: %w", err)
	}
	empty, err := os.CreateTemp("", "ims-buildenv-profile-")
	if err != nil {
		return err
	}
	empty.Close()
	for _, name := range []string{".profile", ".bash_profile", ".bash_login", ".bashrc", ".bash_logout"} {
		file := filepath.Join(account.HomeDir, name)
		if err := unix.Mount(empty.Name(), file, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("mount over %s: %w", file, err)
			return errors.Join(err, os.Remove(empty.Name()))
		}
	}
	if err := os.Remove(empty.Name()); err != nil {
		return err
	}
	if err := os.Setenv(hiddenEnv, "1"); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}
