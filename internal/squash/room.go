// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// leastShare is what an image takes of its files at the very least, as a
// divisor: root file systems come down to a half or third, a tenth is rare.
const leastShare = 16

// packsItself tells file systems on which files may take less than their size
// (statfs(2), linux/magic.h, OpenZFS).
var packsItself = map[int64]bool{
	unix.BTRFS_SUPER_MAGIC: true, unix.F2FS_SUPER_MAGIC: true, 0xca451a4e: true /* bcachefs */, 0x2fc12fc1: true, /* ZFS */
}

// checkRoom fails when the volume of f has less room than so many bytes and
// inodes, which is known before anything is written.
func checkRoom(f *os.File, bytes, inodes int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || packsItself[int64(st.Type)] {
		return nil // writing will show
	}
	free := int64(st.Bavail) * int64(st.Bsize)
	if bytes > free {
		return fmt.Errorf("%w: at least %d bytes are needed, the volume has %d left", unix.ENOSPC, bytes, free)
	}
	if st.Files > 0 && inodes > int64(st.Ffree) {
		return fmt.Errorf("%w: %d inodes are needed, the volume has %d left", unix.ENOSPC, inodes, st.Ffree)
	}
	return nil
}
