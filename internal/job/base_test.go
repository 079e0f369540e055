// SPDX-License-Identifier: Apache-2.0

package job

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// What did not change is taken over from the image the init container left; and
// whatever that is like, the image holds what the user made.
func TestBase(t *testing.T) {
	for name, c := range map[string]struct {
		change func(volume string) error
		logs   string
	}{
		"as prepared":   {func(string) error { return nil }, "unchanged data was taken over from the old image\" layout=append files=3 of=6 bytes=13000017"},
		"without index": {func(v string) error { return os.Remove(filepath.Join(v, layout.Index)) }, "every file is read to see what changed"},
		"index damaged": {func(v string) error { return os.Truncate(filepath.Join(v, layout.Index), 100) }, "every file is read to see what changed"},
		"image damaged": {func(v string) error { return os.Truncate(filepath.Join(v, layout.Image), 5000) }, "the image the root was made from cannot be read"},
		"no image":      {func(v string) error { return os.Remove(filepath.Join(v, layout.Image)) }, "is not on the volume: everything is compressed"},
		"a link": {func(v string) error {
			if err := os.Rename(filepath.Join(v, layout.Image), filepath.Join(v, "elsewhere")); err != nil {
				return err
			}
			return os.Symlink("elsewhere", filepath.Join(v, layout.Image))
		}, "everything is compressed"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			volume, root := p.cfg.Parent, p.cfg.RootDir
			image := filepath.Join(volume, layout.Image)
			src, err := squash.DirSource(root, squash.DirOptions{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = squash.PackFile(t.Context(), src, image, squash.Options{Compressor: squash.Zstd})
			src.Close()
			if err == nil {
				err = os.RemoveAll(root)
			}
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			img, err := squash.Open(f, info.Size())
			if err == nil {
				_, err = squash.Unpack(t.Context(), img, root, squash.UnpackOptions{})
			}
			if err == nil {
				err = squash.WriteIndex(t.Context(), img, root, filepath.Join(volume, layout.Index))
			}
			if err == nil {
				err = c.change(volume)
			}
			if err != nil {
				t.Fatal(err)
			}
			p.user = func() {
				for file, text := range map[string]string{"etc/new": "new", "etc/hostname": "other"} {
					if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o644); err != nil {
						t.Error(err)
					}
				}
				if err := p.flags().Touch(signalfile.Complete); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), success)
			if !strings.Contains(p.log.String(), c.logs) {
				t.Errorf("the log does not say %q:\n%s", c.logs, p.log.String())
			}
			got := p.open()
			if err := squash.Verify(t.Context(), got, false); err != nil {
				t.Error(err)
			}
			for file, text := range map[string]string{"etc/new": "new", "etc/hostname": "other", "boot/vmlinuz": "kernel"} {
				if b, err := fs.ReadFile(got, file); err != nil || string(b) != text {
					t.Errorf("%s: %q %v", file, b, err)
				}
			}
			if b, err := fs.ReadFile(got, "opt/payload"); err != nil || len(b) != 13000000 {
				t.Errorf("payload of %d bytes: %v", len(b), err)
			}
		})
	}
}
