// SPDX-License-Identifier: Apache-2.0

package job

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// The site says how images are packed, on both layouts, and what the image's kernel cannot read is refused before anything
// is made.
func TestFormat(t *testing.T) {
	const config = "CONFIG_SQUASHFS_XZ=y\n# CONFIG_SQUASHFS_LZ4 is not set\nCONFIG_SQUASHFS_ZSTD=m\n"
	testkit.NeedRoot(t)
	for name, c := range map[string]struct {
		compressor string
		config     string
		layered    bool
		logs       string
		refused    string
	}{
		"zstd":         {"zstd", config, false, "", ""},
		"layered":      {"xz", config, true, "", ""},
		"no config":    {"lz4", "", false, "nothing tells whether the kernel reads the compressor", ""},
		"not readable": {"lz4", config, true, "", "boot/config-6.1 has no CONFIG_SQUASHFS_LZ4"},
	} {
		t.Run(name, func(t *testing.T) {
			lines := []string{"symlink boot/vmlinuz vmlinuz-6.1", "file boot/vmlinuz-6.1 0644 kernel", "file boot/initrd 0644 initrd",
				"file var/cache/pkg.deb 0644 big", "file opt/x.pyc 0644 compiled"}
			if c.config != "" {
				lines = append(lines, "file boot/config-6.1 0644 "+c.config)
			}
			p := newPod(t, lines...)
			excludes := filepath.Join(p.dir, "excludes")
			if err := os.WriteFile(excludes, []byte("/var/cache/*\n... *.pyc\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			p.cfg.Compressor, p.cfg.BlockSize, p.cfg.ExcludeFile = c.compressor, "1M", excludes
			t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
			if c.layered {
				p.cfg.Jailed = false // the flags of a jail would lie in what is mounted, which this pod does not do
				p.layIn()
				if err := layout.Promise(p.cfg.Parent, nil); err != nil {
					t.Fatal(err)
				}
			}
			if c.refused != "" {
				p.check(p.run(t.Context()), failure1(c.refused))
				return
			}
			p.check(p.run(t.Context()), success)
			if !strings.Contains(p.log.String(), c.logs) {
				t.Errorf("log:\n%s", p.log.String())
			}
			got := p.open()
			if in := got.Info(); in.Compressor.String() != c.compressor || in.BlockSize != 1<<20 || in.Created.Unix() != 1e9 {
				t.Errorf("%+v", in)
			}
			for _, name := range []string{"var/cache/pkg.deb", "opt/x.pyc"} {
				if _, err := fs.Stat(got, name); err == nil {
					t.Errorf("%s is packed", name)
				}
			}
			if err := squash.Verify(t.Context(), got, false); err != nil {
				t.Error(err)
			}
		})
	}
}

// What cannot be is said before the user works.
func TestFormatRefused(t *testing.T) {
	p := newPod(t)
	p.cfg.Compressor, p.cfg.BlockSize, p.cfg.ExcludeFile = "lzo", "96K", "/nowhere/excludes"
	p.user = func() { t.Error("the user was asked to work") }
	exit, said := p.run(t.Context()), p.stdout.String()
	p.check(exit, failure1("IMS_BUILDENV_COMPRESSOR: images compressed with lzo are read only"))
	for _, want := range []string{`IMS_BUILDENV_BLOCK_SIZE: \"96K\"`, "IMS_BUILDENV_EXCLUDE_FILE: open /nowhere/excludes"} {
		if !strings.Contains(said, want) {
			t.Errorf("no %q in\n%s", want, said)
		}
	}
}
