// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// execveat executes the program open in f; x/sys has no wrapper.
func execveat(f *os.File, path *byte, argv, env []*byte) error {
	_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, f.Fd(), uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&env[0])), unix.AT_EMPTY_PATH, 0)
	return errno
}
