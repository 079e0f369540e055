// SPDX-License-Identifier: Apache-2.0

package job

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/layers"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// layIn makes the pod's root one in layers.
func (p *pod) layIn() {
	p.t.Helper()
	img, f := p.packRoot(squash.Options{})
	defer f.Close()
	err := errors.Join(layers.LayOut(img, p.cfg.Parent, p.cfg.RootDir),
		layout.Write(p.cfg.Parent, layout.Record{Layout: layout.Layered}))
	if err != nil {
		p.t.Fatal(err)
	}
}

// What sshd says of a layered root decides: mounted there, or unpacked here.
func TestLayout(t *testing.T) {
	testkit.NeedRoot(t)
	for name, c := range map[string]struct {
		promise func(parent string) error
		logs    string
		layered bool
	}{
		"promised":        {func(p string) error { return layout.Promise(p, nil) }, "layered=true", true},
		"refused":         {func(p string) error { return layout.Promise(p, errors.New("no loop devices")) }, "unpacked after all, which takes its time\" why=\"no loop devices\"", false},
		"another program": {func(string) error { return nil }, "it seems to be another program than ours", false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			p.cfg.Jailed = !c.layered // the flags of this pod's sshd do not lie in an upper layer
			p.tune.mountWait = 30 * time.Second
			p.layIn()
			if name == "another program" {
				p.tune.mountWait = 10 * time.Millisecond
			}
			if err := c.promise(p.cfg.Parent); err != nil {
				t.Fatal(err)
			}
			p.user = func() {
				dir := p.cfg.RootDir
				if c.layered { // nothing is mounted by this pod's sshd
					dir = filepath.Join(p.cfg.Parent, layout.Upper)
				}
				if err := errors.Join(os.WriteFile(filepath.Join(dir, "etc/new"), []byte("new"), 0o644), p.flags().Touch(signalfile.Complete)); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), success)
			if !strings.Contains(p.log.String(), c.logs) {
				t.Errorf("the log does not say %q:\n%s", c.logs, p.log.String())
			}
			got := p.open()
			for file, text := range map[string]string{"etc/new": "new", "etc/hostname": "image", "boot/vmlinuz": "kernel"} {
				if b, err := fs.ReadFile(got, file); err != nil || string(b) != text {
					t.Errorf("%s: %q %v", file, b, err)
				}
			}
			if _, err := got.Lstat("etc/resolv.conf"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the container's resolv.conf is in the image: %v", err)
			}
		})
	}
}
