// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// abi is one system call table of the machine: its own, and the 32-bit one that programs may call as well.
type abi struct {
	audit          uint32
	clone, unshare uint32 // their first argument is the flags
	clone3         uint32
	unwanted       []uint32
	forbidden      []uint32
	setuid         [3]uint32 // setuid, setreuid, setresuid: as many arguments as their place says
	setuid16       []uint32  // the same with ids of 16 bits, which no C library has used since 2001
}

// newUser is what clone and unshare are not allowed to do. In a user namespace of its own the jail's root would hold
// every capability again; it reaches nothing with them that it should not, but most of the kernel's code.
const newUser = unix.CLONE_NEWUSER

// The unwanted system calls need no capability and act beyond the namespaces: the keyrings of uid 0 are those of the
// node, and bpf, performance counters, userfaultfd and io_uring are of no use to an installation and of much to an
// attacker. Root owns, and may join with setns, every user namespace that the node's root made; since Linux 6.18 it needs
// no process there to find it, only a guessed file handle. Container runtimes' default profiles refuse the same ones.
// Those that load code into the kernel or instead of it take capabilities that no session has; they are forbidden here as
// well, in the words of a missing capability, so that nothing hangs on the one.
// Numbers: arch/*/syscalls in the kernel; those of io_uring are the same everywhere.
var (
	abiX8664 = abi{
		audit: unix.AUDIT_ARCH_X86_64, clone: 56, unshare: 272, clone3: 435,
		unwanted:  []uint32{248, 249, 250, 321, 298, 323, 425, 426, 427, 304, 308}, // add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_* open_by_handle_at setns
		forbidden: []uint32{175, 313, 176, 246, 320},                               // init_module finit_module delete_module kexec_load kexec_file_load
		setuid:    [3]uint32{105, 113, 117},
	}
	abiI386 = abi{
		audit: unix.AUDIT_ARCH_I386, clone: 120, unshare: 310, clone3: 435,
		unwanted:  []uint32{286, 287, 288, 357, 336, 374, 425, 426, 427, 342, 346},
		forbidden: []uint32{128, 350, 129, 283},
		setuid:    [3]uint32{213, 203, 208}, setuid16: []uint32{23, 70, 164},
	}
	abiARM64 = abi{
		audit: unix.AUDIT_ARCH_AARCH64, clone: 220, unshare: 97, clone3: 435,
		unwanted:  []uint32{217, 218, 219, 280, 241, 282, 425, 426, 427, 265, 268},
		forbidden: []uint32{105, 273, 106, 104, 294},
		setuid:    [3]uint32{146, 145, 147},
	}
	abiARM = abi{
		audit: unix.AUDIT_ARCH_ARM, clone: 120, unshare: 337, clone3: 435,
		unwanted:  []uint32{309, 310, 311, 386, 364, 388, 425, 426, 427, 371, 375},
		forbidden: []uint32{128, 379, 129, 347, 401},
		setuid:    [3]uint32{213, 203, 208}, setuid16: []uint32{23, 70, 164},
	}
)

// abis are the tables of each machine we build for.
var abis = map[string][]abi{
	"amd64": {abiX8664, abiI386},
	"arm64": {abiARM64, abiARM},
}

// x32 marks the third table of x86-64, which has no users; its calls are refused.
const x32 = 0x40000000

// Offsets in struct seccomp_data (seccomp(2)); the low half of args[0] comes first on our little-endian machines.
const (
	dataNr    = 0
	dataArch  = 4
	dataArg0  = 16
	retErrno  = unix.SECCOMP_RET_ERRNO
	retAllow  = unix.SECCOMP_RET_ALLOW
	retNosys  = retErrno | uint32(unix.ENOSYS)
	retEPERM  = retErrno | uint32(unix.EPERM)
	loadWord  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpEqual = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpBits  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	ret       = unix.BPF_RET | unix.BPF_K
)

// filterProgram is the classic BPF program over struct seccomp_data. clone3 hides its flags from a filter: ENOSYS makes
// the C libraries use clone. shield is a user that nobody may become, 0 for none.
func filterProgram(tables []abi, shield int) []unix.SockFilter {
	var p []unix.SockFilter
	emit := func(code uint16, k uint32, jt, jf uint8) {
		p = append(p, unix.SockFilter{Code: code, K: k, Jt: jt, Jf: jf})
	}
	for _, a := range tables {
		emit(loadWord, dataArch, 0, 0)
		at := len(p)
		emit(jumpEqual, a.audit, 0, 0) // to the next table if it is another one: set below
		emit(loadWord, dataNr, 0, 0)
		if a.audit == unix.AUDIT_ARCH_X86_64 {
			emit(jumpBits, x32, 0, 1)
			emit(ret, retNosys, 0, 0)
		}
		unwanted := append([]uint32{a.clone3}, a.unwanted...)
		if shield != 0 {
			unwanted = append(unwanted, a.setuid16...)
		}
		for _, nr := range unwanted {
			emit(jumpEqual, nr, 0, 1)
			emit(ret, retNosys, 0, 0)
		}
		for _, nr := range a.forbidden {
			emit(jumpEqual, nr, 0, 1)
			emit(ret, retEPERM, 0, 0)
		}
		for i, nr := range a.setuid {
			if shield == 0 {
				break
			}
			ids := uint8(i + 1)
			emit(jumpEqual, nr, 0, 2*ids+2)
			for n := range ids { // the kernel looks at their low halves, too
				emit(loadWord, dataArg0+8*uint32(n), 0, 0)
				emit(jumpEqual, uint32(shield), 2*(ids-n)-1, 0)
			}
			emit(ret, retAllow, 0, 0)
			emit(ret, retEPERM, 0, 0)
		}
		emit(jumpEqual, a.clone, 1, 0)
		emit(jumpEqual, a.unshare, 0, 3)
		emit(loadWord, dataArg0, 0, 0)
		emit(jumpBits, newUser, 0, 1)
		emit(ret, retEPERM, 0, 0)
		emit(ret, retAllow, 0, 0)
		p[at].Jf = uint8(len(p) - at - 1)
	}
	emit(ret, retNosys, 0, 0) // a table nobody knows
	return p
}

// sealThread filters without CAP_SYS_ADMIN. That takes no_new_privs: set-uid programs and file capabilities give users
// other than root nothing any more.
func sealThread(goarch string, shield int) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	return filterThread(goarch, shield)
}

// filterThread installs the filter on the calling thread; its children inherit it for good. It takes CAP_SYS_ADMIN, or
// no_new_privs.
func filterThread(goarch string, shield int) error {
	p := filterProgram(abis[goarch], shield)
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	return nil
}
