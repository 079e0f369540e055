// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// Go's client, with many requests under way at a time.
func TestGo(t *testing.T) {
	each(t, func(t *testing.T, g *gateway) {
		c := g.dial(t)
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				s, err := c.NewSession()
				if err != nil {
					t.Error(err)
					return
				}
				s.Stdin = strings.NewReader(fmt.Sprint(i))
				out, err := s.Output(fmt.Sprintf("cat; exit %d", i))
				var exit *ssh.ExitError
				if i > 0 && (!errors.As(err, &exit) || exit.ExitStatus() != i) || string(out) != fmt.Sprint(i) {
					t.Errorf("session %d: %q, %v", i, out, err)
				}
			})
		}
		wg.Wait()
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var exit *ssh.ExitError
		if err := s.Run("kill -SEGV $$"); !errors.As(err, &exit) || exit.Signal() != "SEGV" {
			t.Errorf("death by a signal: %v", err)
		}

		here, there := g.space(t)
		f, err := sftp.NewClient(c, sftp.UseConcurrentReads(true), sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(64))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		data := noise(8<<20 + 13)
		w, err := f.Create(there + "/file")
		if err == nil {
			_, err = w.ReadFrom(bytes.NewReader(data))
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		same(t, filepath.Join(here, "file"), data)
		r, err := f.Open(there + "/file")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes of %d came back, %v", len(got), len(data), err)
		}
		r.Close()
		save(t, filepath.Join(here, "other"), nil)
		if err := f.Rename(there+"/file", there+"/other"); err == nil {
			t.Error("rename replaced a file")
		}
		if err := f.PosixRename(there+"/file", there+"/other"); err != nil {
			t.Error(err)
		}
		if err := f.Symlink("../x/./other", there+"/link"); err != nil {
			t.Error(err)
		}
		if to, err := f.ReadLink(there + "/link"); err != nil || to != "../x/./other" {
			t.Errorf("the link's text: %q, %v", to, err)
		}
		if err := f.Chmod(there+"/other", 0o4755); err != nil { // pkg/sftp sends Unix bits as they are
			t.Error(err)
		}
		if st, err := os.Stat(filepath.Join(here, "other")); err != nil || st.Mode() != 0o755|os.ModeSetuid {
			t.Errorf("mode %v, %v", st, err)
		}
		if _, err := f.Stat(there + "/file"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a missing file: %v", err)
		}
	})
}
