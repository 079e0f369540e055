// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// sessionCaps is what root keeps inside the jail: what unpacking packages and running their scripts takes, and nothing
// that reaches beyond the image. Left out of a container runtime's default set are only CAP_NET_RAW (the pod's network
// is shared: no sniffing of the sidecar) and, without namespaces of the jail's own, CAP_SYS_CHROOT (it leads out again)
// and CAP_KILL (see Shield): there root stops processes of other users only as these.
// CAP_AUDIT_WRITE is in because PAM lets root neither su nor sudo without it.
const sessionCaps = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID |
	1<<unix.CAP_KILL | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_SETFCAP |
	1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_AUDIT_WRITE | 1<<unix.CAP_MKNOD | 1<<unix.CAP_SYS_CHROOT

// capNames names what appears in messages.
var capNames = map[int]string{
	unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN", unix.CAP_SYS_CHROOT: "CAP_SYS_CHROOT",
	unix.CAP_SETPCAP: "CAP_SETPCAP", unix.CAP_MKNOD: "CAP_MKNOD",
}

// capState is a thread's own capability sets as bit masks.
type capState struct{ effective, permitted, inheritable uint64 }

// threadCaps reads the calling thread's capabilities.
func threadCaps() (capState, error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return capState{}, fmt.Errorf("capget: %w", err)
	}
	wide := func(lo, hi uint32) uint64 { return uint64(hi)<<32 | uint64(lo) }
	return capState{
		effective:   wide(data[0].Effective, data[1].Effective),
		permitted:   wide(data[0].Permitted, data[1].Permitted),
		inheritable: wide(data[0].Inheritable, data[1].Inheritable),
	}, nil
}

// setThreadCaps sets the calling thread's capabilities.
func setThreadCaps(s capState) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(s.effective), Permitted: uint32(s.permitted), Inheritable: uint32(s.inheritable)},
		{Effective: uint32(s.effective >> 32), Permitted: uint32(s.permitted >> 32), Inheritable: uint32(s.inheritable >> 32)},
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// missingCaps names those of want that the calling thread does not have.
func missingCaps(want ...int) (string, error) {
	s, err := threadCaps()
	if err != nil {
		return "", err
	}
	var missing []string
	for _, c := range want {
		if s.effective&(1<<c) == 0 {
			missing = append(missing, capNames[c])
		}
	}
	return strings.Join(missing, ", "), nil
}

// boundingSet reads the calling thread's bounding set.
func boundingSet() uint64 {
	var set uint64
	for c := range 64 {
		v, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err != nil {
			break // EINVAL: beyond the kernel's last capability
		}
		if v == 1 {
			set |= 1 << c
		}
	}
	return set
}

// boundThread cuts the calling thread's bounding set to keep and empties its inheritable and ambient sets. The thread
// itself stays as capable as it was; a program it executes as root gets exactly its bounding set, for good
// (capabilities(7), "Capabilities and execution of programs by root"). It reports the resulting bounding set.
//
// Capabilities belong to threads: the caller must be locked to its own.
func boundThread(keep uint64) (uint64, error) {
	s, err := threadCaps()
	if err != nil {
		return 0, err
	}
	for c := range 64 {
		v, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err != nil {
			break
		}
		if v == 1 && keep&(1<<c) == 0 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
				return 0, fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("clear ambient capabilities: %w", err)
	}
	s.inheritable = 0
	if err := setThreadCaps(s); err != nil {
		return 0, err
	}
	set := boundingSet()
	if set&^keep != 0 {
		return 0, fmt.Errorf("bounding set is %#x after cutting it to %#x", set, keep)
	}
	return set, nil
}
