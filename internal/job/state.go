// SPDX-License-Identifier: Apache-2.0

package job

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/ims-buildenv/ims-buildenv/internal/imageroot"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
)

// phase is how far a job came.
type phase string

const (
	phaseNew        phase = ""
	phaseShell      phase = "shell"      // set up, the user may be at work
	phasePackaging  phase = "packaging"  // ImageID, when set, may have objects
	phaseRegistered phase = "registered" // IMS knows the image and the job's result
	phaseFailed     phase = "failed"     // taken back, not reported
)

// state is what a restarted job must know.
type state struct {
	JobID   string `json:"job_id"`
	Phase   phase  `json:"phase"`
	ImageID string `json:"image_id,omitempty"`
	Layered bool   `json:"layered,omitempty"` // the root is, see package layout
}

// sealed is the file: the state and a MAC that whoever can write to the volume
// cannot make.
type sealed struct {
	State json.RawMessage `json:"state"`
	MAC   []byte          `json:"mac"`
}

func stateKey(secret string) []byte {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("ims-buildenv state file"))
	return m.Sum(nil)
}

func (r *run) mac(b []byte) []byte {
	m := hmac.New(sha256.New, r.key)
	m.Write(b)
	return m.Sum(nil)
}

// loadState reads the state of an earlier run of this job. Without one, or on
// error, the state is that of a new job.
func (r *run) loadState() (state, error) {
	fresh := state{JobID: r.cfg.JobID}
	parent, err := imageroot.Open(r.cfg.Parent)
	if err != nil {
		return fresh, err
	}
	defer parent.Close()
	f, err := parent.OpenRegular(layout.State)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return fresh, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return fresh, err
	}
	var file sealed
	var s state
	if err := json.Unmarshal(b, &file); err != nil || !hmac.Equal(file.MAC, r.mac(file.State)) {
		return fresh, fmt.Errorf("%s was not written by this job's sidecar", layout.State)
	}
	if err := json.Unmarshal(file.State, &s); err != nil {
		return fresh, err
	}
	if s.JobID != r.cfg.JobID {
		return fresh, fmt.Errorf("%s belongs to job %s, whose volume this was", layout.State, s.JobID)
	}
	return s, nil
}

// saveState makes the state durable. Failing to is logged and not fatal: it
// costs the ability to restart, not the job.
func (r *run) saveState() {
	r.state.JobID = r.cfg.JobID
	b, err := json.Marshal(r.state)
	if err == nil {
		b, err = json.Marshal(sealed{State: b, MAC: r.mac(b)})
	}
	if err == nil {
		err = renameio.WriteFile(filepath.Join(r.cfg.Parent, layout.State), b, 0o600)
	}
	if err != nil {
		r.log.Warn("the job's state cannot be saved; a restarted sidecar would not know how far it came", "error", err)
	}
}

// dropState forgets the job after its final status is set.
func (r *run) dropState() {
	if err := os.Remove(filepath.Join(r.cfg.Parent, layout.State)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.log.Debug("state file", "error", err)
	}
}
