// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"io"
	"os"

	"github.com/pkg/sftp"
)

// stdio is the client's side of an SFTP session.
type stdio struct {
	io.Reader
	io.WriteCloser
}

// sftpMain serves SFTP on stdin and stdout, inside the jail, where "/" is the image and names come from its passwd
// file. It starts in the user's home, as sftp-server does: the library's own working-directory option would rewrite the
// targets of symbolic links. The end of the input is the normal end.
func sftpMain() error {
	if err := os.Chdir(os.Getenv("HOME")); err != nil {
		if err := os.Chdir("/"); err != nil {
			return err
		}
	}
	srv, err := sftp.NewServer(stdio{os.Stdin, os.Stdout})
	if err != nil {
		return err
	}
	if err := srv.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
