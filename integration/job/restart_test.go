// SPDX-License-Identifier: Apache-2.0

package job

import (
	"path/filepath"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// TestRestart stops an installation with a user at work and starts it again:
// records and images stay, the job is an error, the next one works.
func TestRestart(t *testing.T) {
	shared := need(t)
	t.Parallel()
	w := startWorld(t, shared.bin, filepath.Join(t.TempDir(), "data"))
	t.Cleanup(func() { w.stop() }) // after the clean-up of its jobs, which needs it
	s := &stage{world: w, user: newUser(t, w, filepath.Join(t.TempDir(), "id"))}
	s.base = w.publish(t, "base", shared.base.file)
	j := s.create(t, order{jail: true, dkms: true})
	j.wait(ims.WaitingOnUser)
	keys := []string{w.secretKey, w.clientSecret}
	if err := w.stop(); err != nil {
		t.Error(err)
	}
	for _, p := range processesOf(t, j.ID) {
		t.Errorf("still running: %s", p)
	}
	bin, data := w.bin, w.data
	w = startWorld(t, bin, data)
	s.world, j.w = w, w
	if w.secretKey != keys[0] || w.clientSecret != keys[1] {
		t.Error("other keys than before")
	}
	j.wait(ims.Failed)
	j.checkNothingLeft()
	w.checkNoImage(t, j.name)
	again := s.create(t, order{jail: true, dkms: true})
	again.wait(ims.WaitingOnUser)
	again.ssh("touch /tmp/complete")
	again.wait(ims.Success)
	checkTree(t, s.base.file, again.result(kernelText, initrdText).file, traces(true)...)
}
