// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the user reads must say what was done to which path, and what to do.
func TestUnpackHints(t *testing.T) {
	u := &unpacker{target: "/mnt/image"}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{u.explainXattr(Xattr{Name: "security.capability"}, "usr/bin/ping", unix.EPERM),
			"set security.capability on usr/bin/ping: operation not permitted: unpack needs CAP_SETFCAP"},
		{u.explainXattr(Xattr{Name: "trusted.x"}, "a", unix.EPERM), "set trusted.x on a: operation not permitted: unpack needs CAP_SYS_ADMIN"},
		{u.explainXattr(Xattr{Name: "user.x"}, "a", unix.ENOTSUP),
			"set user.x on a: operation not supported: the file system of /mnt/image does not have such attributes, unpack to another"},
		{u.explain("make character device", "dev/null", unix.EPERM), "make character device dev/null: operation not permitted: unpack needs root or CAP_MKNOD"},
		{u.explain("write", "a", unix.EIO), "write a: input/output error"},
	} {
		if tc.err.Error() != tc.want {
			t.Errorf("%v\nwant %s", tc.err, tc.want)
		}
	}
	if u.explain("write", "a", nil) != nil {
		t.Error("no error became one")
	}
}

func TestUnpackForeignOwner(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may give files away")
	}
	img := openImage(t, mksquashfs(t, plainTree(t), "-force-uid", "12345"))
	_, err := Unpack(t.Context(), img, filepath.Join(t.TempDir(), "root"), UnpackOptions{})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "set owner 12345:") || !strings.Contains(err.Error(), "CAP_CHOWN") {
		t.Errorf("%v", err)
	}
}
