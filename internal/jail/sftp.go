// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"os"

	"github.com/ims-buildenv/ims-buildenv/internal/sftpserver"
)

// sftpMain serves SFTP on stdin and stdout, inside the jail, where "/" is the image and names come from its passwd
// file. It starts in the user's home, as sftp-server does. The end of the input is the normal end.
func sftpMain() error {
	if err := os.Chdir(os.Getenv("HOME")); err != nil {
		if err := os.Chdir("/"); err != nil {
			return err
		}
	}
	return sftpserver.Serve(os.Stdin, os.Stdout)
}
