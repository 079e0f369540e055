// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// maxKeys bounds authorized_keys; a ConfigMap holds at most 1 MiB.
const maxKeys = 1 << 20

// shell opens the user's shell and returns when its sessions are over.
func (r *run) shell(ctx context.Context, removeStale func() error) error {
	resumed := r.state.Phase == phaseShell
	ended := false
	if resumed {
		r.log.Warn("an earlier run ended while the user was at work; waiting on")
		var err error
		if ended, err = r.flags.Exists(signalfile.Exiting); err != nil {
			return err
		}
	} else if err := removeStale(); err != nil {
		// A flag inside the source image, or of the volume's previous job, would
		// end this one before it began.
		return err
	}
	r.state.Phase = phaseShell
	r.saveState()
	if !ended {
		if err := r.open(ctx); err != nil {
			return err
		}
		if err := r.wait(ctx); err != nil {
			return err
		}
	}
	r.log.Info("the shell is closed")
	return r.flags.Remove(signalfile.Exiting)
}

// open makes the shell reachable and tells IMS only when it is.
func (r *run) open(ctx context.Context) error {
	// Left by an earlier run, it would start sshd with no or an old configuration.
	if err := r.flags.Remove(signalfile.Ready); err != nil {
		return err
	}
	keys, err := readKeys(r.cfg.AuthorizedKeys, r.log)
	if err != nil {
		return err
	}
	if err := os.Chmod(r.cfg.IMSDir, 0o700); err != nil {
		return fmt.Errorf("directory shared with sshd: %w; mount an emptyDir there", err)
	}
	if err := r.writeShared("sshd_config", r.sshdConfig()); err != nil {
		return err
	}
	probe, err := newProbe(r.cfg.SSHPort, r.log)
	if err != nil {
		return err
	}
	if err := r.writeShared("authorized_keys", append(bytes.Clone(keys), probe.keyLine()...)); err != nil {
		return err
	}
	err = r.flags.Touch(signalfile.Ready)
	if err == nil {
		err = r.login(ctx, probe)
	}
	// The probe's key goes before the user comes.
	if kerr := r.writeShared("authorized_keys", keys); err == nil {
		err = kerr
	}
	if err != nil {
		return err
	}
	r.log.Info("the shell is ready", "done", "touch "+r.inside(signalfile.Complete), "give_up", "touch "+r.inside(signalfile.Failed))
	return r.setStatus(ctx, ims.WaitingOnUser)
}

// login proves that sshd works, unless the pod breaks meanwhile.
func (r *run) login(ctx context.Context, p *probe) error {
	return r.whileHealthy(ctx, func(ctx context.Context) error {
		return p.login(ctx, cmp.Or(r.deps.tune.sshdTimeout, sshdTimeout), cmp.Or(r.deps.tune.probeTimeout, probeTimeout))
	})
}

// wait returns when sshd says that all sessions are over.
func (r *run) wait(ctx context.Context) error {
	return r.whileHealthy(ctx, func(ctx context.Context) error {
		_, err := r.flags.Wait(ctx, r.log, signalfile.Exiting)
		return err
	}, r.watchSSHD, r.readBase)
}

// whileHealthy runs do until it ends, the pod reports an error, or one of the
// watchers does.
func (r *run) whileHealthy(ctx context.Context, do func(context.Context) error, watch ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := make(chan struct{}, 1+len(watch))
	guard := func(f func(context.Context) error) {
		defer func() { over <- struct{}{} }()
		if err := r.guard(func() error { return f(ctx) }); err != nil && ctx.Err() == nil {
			cancel(err)
		}
	}
	go guard(func(ctx context.Context) error {
		if _, err := r.flags.Wait(ctx, r.log, signalfile.PodError); err != nil {
			return err
		}
		return fmt.Errorf("the sshd container gave up (%s); its log says why", r.flags.Path(signalfile.PodError))
	})
	for _, w := range watch {
		go guard(w)
	}
	err := do(ctx)
	if err == nil {
		cancel(nil)
	} else if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(err)
	for range cap(over) {
		<-over
	}
	return err
}

// inside is a flag's path as the user in the shell types it.
func (r *run) inside(n signalfile.Name) string {
	if r.cfg.Jailed {
		return "/tmp/" + string(n)
	}
	return r.flags.Path(n)
}

// readKeys returns the usable lines of the user's authorized_keys. One bad
// line does not cost the others; no good line costs the job now rather than
// after its user has waited for it.
func readKeys(path string, log *slog.Logger) ([]byte, error) {
	const next = "create the job with a public_key_id whose key is an OpenSSH public key (ssh-ed25519 AAAA…)"
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the user's public key: %w; %s", err, next)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeys))
	if err != nil {
		return nil, fmt.Errorf("the user's public key: %w; mount the ConfigMap with the public key so that this is a file", err)
	}
	var good []byte
	number := 0
	for line := range bytes.Lines(text) {
		number++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key, _, _, _, err := ssh.ParseAuthorizedKey(line)
		if err == nil && key.Type() == "ssh-dss" {
			err = errors.New("DSA keys are accepted by no current sshd")
		}
		if err != nil {
			log.Warn("skipping a line of authorized_keys", "file", path, "line", number, "error", err)
			continue
		}
		log.Info("public key", "type", key.Type(), "fingerprint", ssh.FingerprintSHA256(key))
		good = append(append(good, line...), '\n')
	}
	if good == nil {
		return nil, fmt.Errorf("%s holds no usable public key, nobody could log in; %s", path, next)
	}
	return good, nil
}

// sshdConfig is what the legacy sidecar wrote, line by line: OpenSSH or our own
// gateway may be on the other side.
func (r *run) sshdConfig() []byte {
	return fmt.Appendf(nil, `Port %d
LogLevel INFO
PermitRootLogin yes
PubkeyAuthentication yes
AuthorizedKeysFile %s
PasswordAuthentication no
ChallengeResponseAuthentication no
Subsystem sftp internal-sftp
`, r.cfg.SSHPort, filepath.Join(r.cfg.IMSDir, "authorized_keys"))
}

// writeShared writes a file for sshd, owner-only as OpenSSH's StrictModes
// wants, and whole or not at all.
func (r *run) writeShared(name string, content []byte) error {
	if err := renameio.WriteFile(filepath.Join(r.cfg.IMSDir, name), content, 0o600, renameio.WithTempDir(r.cfg.IMSDir)); err != nil {
		return fmt.Errorf("write %s for sshd: %w", name, err)
	}
	return nil
}
