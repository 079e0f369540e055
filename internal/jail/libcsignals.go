// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The addresses of a signal handler that returns at once and, where the kernel wants one, of what a handler returns to.
// Plain code: the Go runtime takes a signal that it did not ask for as a reason to end.
var ignoreSignalPC, sigreturnPC uintptr

// Flags of struct sigaction, asm-generic/signal-defs.h and arch/*/include/uapi/asm/signal.h.
const (
	saRestorer = 0x04000000
	saOnStack  = 0x08000000 // a goroutine's stack may be too small
	saRestart  = 0x10000000
)

// catchLibcSignals gives a handler to the signals that C libraries keep for themselves and signal.Notify therefore leaves
// alone, unless there is one: the runtime, or glibc, may use them to change the ids of all threads. By default they would
// end init: the first process of a namespace does not get what it has no handler for, but what comes while its main thread
// has it blocked, as in every handler, is given to another thread and does end it (complete_signal in kernel/signal.c). And
// if they are ignored, as in everything that glibc's posix_spawn(3) starts, make for one, the sessions would inherit that.
func catchLibcSignals() error {
	const first, last = 32, 34 // SIGCANCEL and SIGSETXID of glibc, and SIGSYNCCALL of musl
	type action struct {       // struct sigaction of the kernel, linux/signal_types.h
		handler, flags, restorer uintptr
		mask                     uint64
	}
	const ignored = 1 // SIG_IGN; SIG_DFL is 0
	ours := action{handler: ignoreSignalPC, flags: saOnStack | saRestart}
	if sigreturnPC != 0 {
		ours.flags, ours.restorer = ours.flags|saRestorer, sigreturnPC
	}
	for sig := uintptr(first); sig <= last; sig++ {
		var old action
		size := unsafe.Sizeof(old.mask)
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&old)), size, 0, 0)
		if errno == 0 && old.handler <= ignored {
			_, _, errno = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&ours)), 0, size, 0, 0)
		}
		if errno != 0 {
			return fmt.Errorf("handle signal %d: %w", sig, errno)
		}
	}
	return nil
}
