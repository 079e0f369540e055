// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/emulate"
	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
	"github.com/ims-buildenv/ims-buildenv/internal/layout"
	"github.com/ims-buildenv/ims-buildenv/internal/signalfile"
)

// DefaultStateDir keeps the host keys made at the first start: in the container, outside
// every image and volume.
const DefaultStateDir = "/var/lib/ims-buildenv"

// Config is what Run needs.
type Config struct {
	SSHD       config.SSHD
	ConfigFile string         // sshd_config; empty: defaults
	RunDir     string         // of the status socket; empty: DefaultRunDir
	Options    []string       // Key=Value, before the file
	StateDir   string         // empty: DefaultStateDir
	Listener   net.Listener   // nil: as sshd_config says
	Level      *slog.LevelVar // of Log, when LogLevel may change it; may be nil
	Log        *slog.Logger
}

// errNoShell ends a create job whose build needs no shell.
var errNoShell = errors.New("no shell for this job")

// Run serves a job from its ready flag to its exiting flag: it returns nil when the job was
// marked complete or failed and everything is over, or when the job is a create job that
// needs no shell. When ctx ends first, the sessions are ended and no flag is made. A gateway
// that cannot start makes the flag pod_error.
func Run(ctx context.Context, cfg Config) (err error) {
	log := cfg.Log
	for _, w := range cfg.SSHD.Warnings {
		log.Warn(w)
	}
	flags := signalfile.Set{Parent: cfg.SSHD.Parent, Root: cfg.SSHD.ImageRoot(), Jailed: cfg.SSHD.Jailed}
	if err := shellWanted(cfg, &flags); errors.Is(err, errNoShell) {
		log.Info(err.Error())
		return nil
	} else if err != nil {
		return err
	}
	promiseMount(cfg)
	log.Info("waiting for the ready flag", "file", flags.Path(signalfile.Ready))
	if _, err := flags.Wait(ctx, log, signalfile.Ready); err != nil {
		return fmt.Errorf("wait for %s: %w", flags.Path(signalfile.Ready), err)
	}
	started := false
	defer func() {
		// The sidecar need not wait for a login that will never work: it ends the job on this flag.
		if err != nil && !started && ctx.Err() == nil {
			err = errors.Join(err, flags.Touch(signalfile.PodError))
		}
	}()
	set, err := LoadSettings(cfg)
	if err != nil {
		return err
	}
	if cfg.SSHD.RemoteBuildNode != "" {
		// Passing connections on is the least of it: the end of the work there has to be looked for, the node watched,
		// the artifacts fetched. A job that nobody ends would wait for ever.
		return fmt.Errorf("remote builds are not supported: this job is to be built on %s; create it without remote build nodes for its architecture", cfg.SSHD.RemoteBuildNode)
	}
	if err := applyChroot(set, &flags); err != nil {
		return err
	}
	g := &gate{cfg: cfg, set: set, flags: flags, root: flags.Root, log: log}
	if g.layered, err = isLayered(cfg); err != nil {
		return err
	}
	if g.layered {
		// There the flags of the jailed mode lie for those who do not see the mount.
		g.flags.Root = filepath.Join(flags.Parent, layout.Upper)
	}
	if err := g.start(ctx); err != nil {
		return err
	}
	started = true
	defer g.recorder.close()
	return g.serve(ctx)
}

// promiseMount tells the sidecar, which waits for it, whether a layered root can be mounted here. The
// root itself is not mounted before the ready flag: until then the sidecar edits what is below.
func promiseMount(cfg Config) {
	if layered, err := isLayered(cfg); err != nil || !layered {
		return // an error comes again when the root is to be used
	}
	cannot := layout.Probe(cfg.SSHD.Parent, cfg.SSHD.ImageRoot())
	if cannot != nil {
		cfg.Log.Warn("this container cannot mount the layered image root: the sidecar is to unpack it", "why", cannot)
	}
	if err := layout.Promise(cfg.SSHD.Parent, cannot); err != nil {
		cfg.Log.Warn("the sidecar is not told whether the image root can be mounted, and will unpack it", "err", err)
	}
}

// isLayered reports whether the image root has to be mounted.
func isLayered(cfg Config) (bool, error) {
	if cfg.SSHD.Action != config.ActionCustomize {
		return false, nil
	}
	record, err := layout.Read(cfg.SSHD.Parent)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return record.Layout == layout.Layered, err
}

// LoadSettings reads sshd_config and reports what has no effect.
func LoadSettings(cfg Config) (*sshdconf.Settings, error) {
	set, err := sshdconf.Load(cfg.ConfigFile, cfg.Options)
	if err != nil {
		return nil, err
	}
	if cfg.Level != nil && set.LogLevel != nil && *set.LogLevel < cfg.Level.Level() {
		cfg.Level.Set(*set.LogLevel)
	}
	for _, k := range set.Ignored {
		cfg.Log.Debug("sshd_config keyword without effect", "keyword", k)
	}
	for _, k := range set.Missed {
		cfg.Log.Warn("sshd_config asks for what this server does not do", "keyword", k)
	}
	if set.RecordDirectory == "" && (set.RecordCommands || len(set.RecordRedact) > 0) {
		cfg.Log.Warn("nothing is recorded: RecordCommands and RecordRedact have no effect without RecordDirectory")
	}
	for _, v := range set.Variants() {
		if err := checkPeers(v); err != nil {
			return nil, err
		}
		if _, err := chooseAlgorithms(v); err != nil {
			return nil, err
		}
	}
	if err := checkSFTP(set, cfg.Log); err != nil {
		return nil, err
	}
	return set, nil
}

// shellWanted applies the legacy rule for create jobs: a shell only after a failed build
// and only with debugging on. It then is a shell in the build's own root.
func shellWanted(cfg Config, flags *signalfile.Set) error {
	if cfg.SSHD.Action != config.ActionCreate {
		return nil
	}
	failed, err := flags.Exists(signalfile.BuildFailed)
	if err != nil {
		return err
	}
	switch {
	case !failed:
		return fmt.Errorf("%w: the build did not fail", errNoShell)
	case !cfg.SSHD.Debug:
		return fmt.Errorf("%w: the build failed, and ENABLE_DEBUG is off", errNoShell)
	}
	if build := filepath.Join(cfg.SSHD.Parent, "build", filepath.Base(flags.Root)); isDir(build) {
		flags.Root = build
	}
	return nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// applyChroot lets ChrootDirectory in sshd_config ask for the jail as SSH_JAIL does.
func applyChroot(set *sshdconf.Settings, flags *signalfile.Set) error {
	dir := set.ChrootDirectory
	if dir == "" {
		return nil
	}
	if !filepath.IsAbs(dir) || strings.Contains(dir, "%") {
		return fmt.Errorf("sshd_config: ChrootDirectory %s must be an absolute path without tokens", dir)
	}
	if dir = filepath.Clean(dir); dir != flags.Root {
		return fmt.Errorf("sshd_config: ChrootDirectory %s is not this job's image root %s; leave it out and set SSH_JAIL", dir, flags.Root)
	}
	flags.Jailed = true
	return nil
}

// gate is a running job.
type gate struct {
	cfg       Config
	set       *sshdconf.Settings
	flags     signalfile.Set
	root      string // the image root as the sessions see it
	layered   bool   // it has to be mounted
	log       *slog.Logger
	jail      *jail.Jail
	srv       *server
	listeners []net.Listener
	recorder  *recordings
	observers []io.Closer // status and metrics
	emulator  *os.File    // keeps aarch64 programs running
}

// start brings everything up to a listening port, and takes it down again on error.
func (g *gate) start(ctx context.Context) (err error) {
	if g.flags.Jailed {
		if err := g.ownRoot(); err != nil {
			return err
		}
	}
	n, err := checkKeys(g.set, g.log.Warn)
	if err != nil {
		return err
	}
	if g.set.RecordDirectory != "" {
		if g.recorder, err = newRecordings(g.set, g.root, g.cfg.SSHD.JobID); err != nil {
			return err
		}
	}
	dir := g.cfg.StateDir
	if dir == "" {
		dir = DefaultStateDir
	}
	keys, err := hostKeys(g.set, dir, g.log)
	if err != nil {
		return err
	}
	// Before the jail, because it fails fast and has nothing to undo but a close.
	if g.listeners, err = listen(g.cfg.Listener, g.set); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			g.closeListeners()
		}
	}()
	if g.cfg.SSHD.Arch == config.ArchARM {
		if g.emulator, err = emulate.ARM64(emulate.Interpreter, g.log); err != nil && g.flags.Jailed {
			return err
		} else if err != nil {
			g.log.Warn("programs of the image cannot be run", "err", err)
		}
	}
	jc := jail.Config{Root: g.root, Level: jail.Plain, DKMS: g.cfg.SSHD.DKMS, Env: jobEnv(g.cfg.SSHD.Common), Log: g.log}
	if g.flags.Jailed {
		jc.Level = jail.Auto
	}
	if g.layered {
		if jc.Mount, err = layout.Mount(g.flags.Parent, g.root); err != nil {
			return fmt.Errorf("mount the layered image root: %w", err)
		}
		defer jc.Mount.Close()
		g.log.Info("image root mounted", "layout", layout.Layered)
	}
	if g.jail, err = jail.Start(ctx, jc); err != nil {
		return fmt.Errorf("start jail: %w", err)
	}
	if g.flags.Jailed {
		// The user may have mounted something over /tmp in there.
		g.flags.Extra = func(n signalfile.Name) bool {
			if n != signalfile.Complete && n != signalfile.Failed {
				return false
			}
			found, err := g.jail.Exists("/tmp/" + string(n))
			return err == nil && found
		}
	}
	if g.srv, err = newServer(g.set, g.jail, keys, config.Version, g.log); err != nil {
		g.jail.Stop(ctx, 0)
		return err
	}
	g.srv.recorder, g.srv.root = g.recorder, g.flags.Root
	if err := g.observe(); err != nil {
		g.jail.Stop(ctx, 0)
		return err
	}
	var addrs []string
	for _, l := range g.listeners {
		addrs = append(addrs, l.Addr().String())
		go g.srv.serve(l)
	}
	g.log.Info("listening", "addr", strings.Join(addrs, " "), "jailed", g.flags.Jailed, "keys", n)
	return nil
}

// ownRoot gives the parent and the image root to root, as a chroot needs it and as the
// legacy did.
func (g *gate) ownRoot() error {
	next := "check that the volume is mounted and that the container runs as root"
	if err := os.Chmod(g.flags.Parent, 0o755); err != nil {
		return fmt.Errorf("prepare the jail: %w: %s", err, next)
	}
	for _, dir := range []string{g.flags.Parent, g.root, g.flags.Root} {
		if err := os.Lchown(dir, 0, 0); err != nil {
			return fmt.Errorf("prepare the jail: %w: %s", err, next)
		}
	}
	return nil
}

// jobEnv is what playbooks read in every session.
func jobEnv(c config.Common) []string {
	dkms := "False" // as Python prints it, and the job template with it
	if c.DKMS {
		dkms = "True"
	}
	return []string{
		"IMS_JOB_ID=" + c.JobID,
		"IMS_ARCH=" + c.Arch,
		"IMS_DKMS_ENABLED=" + dkms,
		"REMOTE_BUILD_NODE=" + c.RemoteBuildNode,
	}
}

// listen opens the addresses of sshd_config: each ListenAddress without a port on each
// Port.
func listen(given net.Listener, set *sshdconf.Settings) (ls []net.Listener, err error) {
	if given != nil {
		return []net.Listener{given}, nil
	}
	ports := set.Ports
	if len(ports) == 0 {
		ports = []int{22}
	}
	hosts := set.ListenAddresses
	if len(hosts) == 0 {
		hosts = []string{""}
	}
	var addrs []string
	for _, h := range hosts {
		if _, _, err := net.SplitHostPort(h); err == nil && !slices.Contains(addrs, h) {
			addrs = append(addrs, h)
			continue
		}
		for _, p := range ports {
			if a := net.JoinHostPort(h, strconv.Itoa(p)); !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	network := map[string]string{"inet": "tcp4", "inet6": "tcp6"}[set.AddressFamily]
	if network == "" {
		network = "tcp"
	}
	for _, a := range addrs {
		l, err := net.Listen(network, a)
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return nil, fmt.Errorf("listen: %w: choose another Port in sshd_config or with -p", err)
		}
		ls = append(ls, l)
	}
	return ls, nil
}

func (g *gate) closeListeners() {
	for _, l := range g.listeners {
		l.Close()
	}
	for _, o := range g.observers {
		o.Close()
	}
}

// serve waits for the end of the job and sees it through.
func (g *gate) serve(ctx context.Context) error {
	script := startScript(g.cfg.SSHD.CustomizationScript, g.log)
	wait, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-g.jail.Done():
			cancel(fmt.Errorf("the jail ended: %w", g.jail.Err()))
		case <-wait.Done():
		}
	}()
	var abandon sync.WaitGroup
	if g.set.AbandonTimeout > 0 {
		abandon.Go(func() { g.abandon(wait, script) })
	}
	g.log.Info("waiting for the user", "success", g.flags.Path(signalfile.Complete), "failure", g.flags.Path(signalfile.Failed))
	flag, err := g.flags.Wait(wait, g.log, signalfile.Failed, signalfile.Complete)
	if err == nil {
		g.log.Info("flag found", "flag", flag)
		// What the script still does belongs to the image: the legacy looked for the flag only
		// after it, too.
		err = script.wait(wait)
	}
	if err != nil {
		g.shut("the build environment is being stopped", 0)
		_, stopErr := g.jail.Stop(context.WithoutCancel(ctx), killGrace)
		g.closeListeners()
		return errors.Join(fmt.Errorf("stopped before the job was marked complete or failed: %w", err), stopErr, script.stop())
	}
	cancel(nil)
	abandon.Wait() // a job that is complete is not abandoned meanwhile
	return g.finish(ctx, flag, script)
}

const (
	// busyGrace is how long commands may run on after the flag appeared: the one that made it
	// must end well, and so must what a playbook does right after it.
	busyGrace = 2 * time.Second
	// quietTime is how long after a session's end the same connection may bring another one
	// that belongs to it: Ansible's clean-up of a task follows the task this fast.
	quietTime = 700 * time.Millisecond
	// killGrace is what processes get between SIGTERM and SIGKILL.
	killGrace = 2 * time.Second
	// partingTime is how long we wait for clients to be told how their commands ended.
	partingTime = 500 * time.Millisecond
)

// finish ends every session and tells the sidecar. After the exiting flag nothing that was
// started here writes to the image root.
func (g *gate) finish(ctx context.Context, flag signalfile.Name, script *script) error {
	began := time.Now()
	why := map[signalfile.Name]string{
		signalfile.Complete: "The image is marked complete: the build environment is closing.",
		signalfile.Failed:   "The job is marked failed: the build environment is closing.",
	}[flag]
	g.shut(why, busyGrace)
	// A failed that appeared meanwhile wins; look before a tmpfs that holds it goes away.
	if failed, err := g.flags.Exists(signalfile.Failed); err == nil && failed {
		flag = signalfile.Failed
	}
	names, err := g.jail.Stop(context.WithoutCancel(ctx), killGrace)
	if err = errors.Join(err, script.stop()); err != nil {
		return fmt.Errorf("stop the jail: %w: the image root may still change, so the %s flag is not made", err, signalfile.Exiting)
	}
	if len(names) > 0 {
		g.log.Warn("processes had to be killed", "names", names)
	}
	g.srv.part(partingTime, why)
	g.flags.Extra = nil
	if err := g.flags.Remove(signalfile.Complete); err != nil {
		return err
	}
	if flag == signalfile.Failed {
		if there, err := g.flags.Exists(flag); err == nil && !there {
			if err := g.flags.Touch(flag); err != nil { // it lay on a mount of the jail
				return err
			}
		}
	}
	if err := g.flags.Touch(signalfile.Exiting); err != nil {
		return err
	}
	g.closeListeners()
	g.log.Info("exiting", "flag", flag, "ms", time.Since(began).Milliseconds())
	return nil
}

// shut refuses logins, lets busy sessions end within grace, then refuses sessions and hangs
// up the terminals.
func (g *gate) shut(why string, grace time.Duration) {
	s := g.srv
	s.mu.Lock()
	s.ending = why
	s.mu.Unlock()
	s.quiesce(grace)
	s.mu.Lock()
	s.ended = why
	s.mu.Unlock()
	s.hangUp(why)
}
