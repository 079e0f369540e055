// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// The login proof and the configuration must also work with OpenSSH, which is
// what the legacy sshd container runs.
func TestProbeWithOpenSSH(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "ssh-keygen")
	const sshd = "/usr/sbin/sshd"
	if _, err := os.Stat(sshd); err != nil {
		testkit.NeedTool(t, sshd)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // its privilege separation directory
		t.Fatal(err)
	}
	p := newPod(t)
	held, addr, err := port.Hold("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	p.cfg.SSHPort = addr.Port
	r, err := newRun(p.cfg, Deps{Log: slog.New(slog.NewTextHandler(&p.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	probe, err := newProbe(p.cfg.SSHPort, r.log)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.writeShared("sshd_config", r.sshdConfig()); err != nil {
		t.Fatal(err)
	}
	if err := r.writeShared("authorized_keys", probe.keyLine()); err != nil {
		t.Fatal(err)
	}
	hostKey := filepath.Join(p.dir, "host")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hostKey).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// StrictModes would look at the test's /tmp; in the pod it sees /etc/cray/ims.
	cmd := exec.Command(sshd, "-D", "-e", "-f", filepath.Join(p.cfg.IMSDir, "sshd_config"), "-h", hostKey,
		"-o", "ListenAddress=127.0.0.1", "-o", "StrictModes=no", "-o", "PidFile=none", "-o", "UsePAM=no")
	cmd.Stderr = &p.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	if err := probe.login(t.Context(), time.Minute, 2*time.Minute); err != nil {
		t.Fatalf("%v\n%s", err, p.log.String())
	}
	if up, err := listening(p.cfg.SSHPort); err != nil || !up {
		t.Errorf("the port of a running sshd is not seen: %v", err)
	}
	// Without the key's line the same key is refused.
	if err := r.writeShared("authorized_keys", nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := probe.try(ctx); err == nil {
		t.Error("the probe's key still logs in")
	}
}
