// SPDX-License-Identifier: Apache-2.0

package job

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/changes"
	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// The report on the changes lies beside the job's log, in the store only if asked
// for, and is never a reason to fail: not when its place is taken either. A link
// left in its place is neither written through nor uploaded.
func TestChanges(t *testing.T) {
	for name, c := range map[string]struct {
		setting  string
		before   func(dir string) error
		written  bool
		uploaded []string
		log      string
	}{
		"written":  {setting: config.ChangesWrite, written: true, log: "added=4 removed=0 modified=1"},
		"uploaded": {setting: config.ChangesUpload, written: true, uploaded: []string{changesHTML, changesJSON}, log: "what the job changed"},
		"off":      {setting: config.ChangesOff},
		"a link in its place": {setting: config.ChangesUpload, written: true, uploaded: []string{changesHTML, changesJSON},
			before: func(dir string) error { return os.Symlink("../secret", filepath.Join(dir, changesJSON)) }},
		"its place is taken": {setting: config.ChangesWrite, before: func(dir string) error {
			return os.MkdirAll(filepath.Join(dir, changesJSON, "x"), 0o755)
		}, log: "there is no report on what the job changed"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t)
			p.prepare()
			p.cfg.Changes = c.setting
			secret := filepath.Join(filepath.Dir(p.cfg.IMSDir), "secret")
			if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			p.user = func() {
				if c.before != nil {
					if err := c.before(p.cfg.IMSDir); err != nil {
						t.Error(err)
					}
				}
				for _, file := range []string{"etc/new", "etc/hostname"} {
					if err := os.WriteFile(filepath.Join(p.cfg.RootDir, file), []byte(file), 0o644); err != nil {
						t.Error(err)
					}
				}
				if err := p.flags().Touch(signalfile.Complete); err != nil {
					t.Error(err)
				}
			}
			p.check(p.run(t.Context()), success)
			if !strings.Contains(p.log.String(), c.log) {
				t.Errorf("the log does not say %q:\n%s", c.log, p.log.String())
			}
			b, err := os.ReadFile(filepath.Join(p.cfg.IMSDir, changesJSON))
			if (err == nil) != c.written {
				t.Fatalf("report: %v", err)
			}
			var report changes.Report
			if c.written {
				if err := json.Unmarshal(b, &report); err != nil {
					t.Fatal(err)
				}
				// The job adds etc/cray/ca/certificate_authority.crt to the user's file.
				if s := report.Summary; s.Added != 4 || s.Modified != 1 || s.Removed != 0 {
					t.Errorf("%+v", s)
				}
			}
			if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
				t.Errorf("written through the link: %q %v", b, err)
			}
			var got []string
			for id := range p.ims.images {
				list, err := p.newStore().List(t.Context(), id+"/changes.")
				if err != nil {
					t.Fatal(err)
				}
				for _, o := range list {
					got = append(got, strings.TrimPrefix(o.Key, id+"/"))
					if o.Size < 100 {
						t.Errorf("%s has %d bytes", o.Key, o.Size)
					}
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, c.uploaded) {
				t.Errorf("in the store: %q, want %q", got, c.uploaded)
			}
		})
	}
}
