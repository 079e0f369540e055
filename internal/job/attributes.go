// SPDX-License-Identifier: Apache-2.0

package job

import (
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// foreign tells which extended attributes of the tree are not the image's: a node with SELinux labels every file that is
// made on it. An image without such labels gets none; in one that has them nobody can tell the two apart, and they stay.
func (r *run) foreign(base *squash.Image) func(name string) bool {
	const label = "security.selinux"
	if has, err := base.HasXattr(func(name string) bool { return name == label }); has || err != nil {
		return nil
	}
	var told sync.Once
	return func(name string) bool {
		if name != label {
			return false
		}
		told.Do(func() {
			r.log.Warn("the labels of the node's SELinux are left out: the image has had none", "attribute", label)
		})
		return true
	}
}

// warnOfHidden tells of attributes that are in the tree and cannot be seen: without CAP_SYS_ADMIN the kernel lists no
// trusted ones (xattr(7)), and what is not listed is not packed.
func (r *run) warnOfHidden(base *squash.Image) {
	if maySeeTrusted() {
		return
	}
	has, err := base.HasXattr(func(name string) bool {
		return strings.HasPrefix(name, "trusted.") && !strings.HasPrefix(name, "trusted.overlay.")
	})
	if has && err == nil {
		r.log.Warn("trusted.* attributes of the image cannot be read in this container and will be missing in the new one; run the container buildenv-sidecar with CAP_SYS_ADMIN to keep them")
	}
}

func maySeeTrusted() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&head, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}
