// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/pkg/sftp"
)

// sftpSession starts an SFTP server in the jail and connects a client to it.
func sftpSession(t *testing.T, j *Jail) (*sftp.Client, *Process) {
	t.Helper()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := j.Spawn(Request{Kind: SFTP, Stdin: inR, Stdout: outW, Env: []string{"LD_PRELOAD=/nonexistent"}})
	inR.Close()
	outW.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { outR.Close() })
	c, err := sftp.NewClientPipe(outR, inW)
	if err != nil {
		t.Fatal(err)
	}
	return c, p
}

// TestSFTP promises that SFTP sees exactly what the shells see, and nothing outside.
func TestSFTP(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		canary := plantCanary(t, root)
		j := startJail(t, Config{Root: root, Level: level})
		c, p := sftpSession(t, j)
		prefix := rootPrefix(level, root)
		if wd, err := c.Getwd(); err != nil || wd != "/root" {
			t.Errorf("start directory %q, %v", wd, err)
		}
		f, err := c.Create(prefix + "/tmp/upload")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte("content")); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if got := output(t, j, "stat -c '%a %u:%g %s' "+prefix+"/tmp/upload"); got != "644 0:0 7" {
			t.Errorf("uploaded file: %s", got)
		}
		for name, target := range map[string]string{"abs": canary, "rel": "upload", "up": "../../../../../../../../.." + canary} {
			if err := c.Symlink(target, prefix+"/tmp/"+name); err != nil {
				t.Error(err)
			}
			if got, err := os.Readlink(filepath.Join(root, "tmp", name)); err != nil || got != target {
				t.Errorf("link %s holds %q, %v", name, got, err)
			}
		}
		if level != Plain {
			for _, name := range []string{canary, "/tmp/abs", "/tmp/up", "/.." + canary, "/proc/1/root" + canary} {
				if f, err := c.Open(name); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
					t.Errorf("opened %s: %v", name, err)
					f.Close()
				}
			}
		}
		// The client closes its side: that is a normal end.
		c.Close()
		if e := p.Wait(); e != (Exit{}) {
			t.Errorf("end of session: %+v", e)
		}
	})
}

// TestSFTPTruncated: the connection breaks in the middle of a packet.
func TestSFTPTruncated(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		j := startJail(t, Config{Root: newRoot(t), Level: level})
		inR, inW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		outR, outW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer outR.Close()
		p, err := j.Spawn(Request{Kind: SFTP, Stdin: inR, Stdout: outW})
		inR.Close()
		outW.Close()
		if err != nil {
			t.Fatal(err)
		}
		inW.Write([]byte{0, 0, 0, 9, 1, 0})
		inW.Close()
		io.Copy(io.Discard, outR)
		if e := p.Wait(); e.Signal != 0 {
			t.Errorf("%+v", e)
		}
	})
}
