// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

const usage = `SSH server of an IMS customize job: root's shell, sftp and commands in the job's image.

Usage:
  sshd [-f sshd_config] [-E logfile] [-p port] [-D] [-e] [-o Key=Value]... [IMAGE_ROOT_PARENT]
  sshd status [--json] [--close ID]                      what the running gateway's users do

It waits for IMAGE_ROOT_PARENT/ready, serves until the user creates the flag file complete
or failed, ends all sessions and creates IMAGE_ROOT_PARENT/exiting. The flags lie in
IMAGE_ROOT_PARENT, or with SSH_JAIL=True in the image's own /tmp. IMAGE_ROOT_PARENT is the
argument, else the environment variable of that name, else /mnt/image.

Options:
%s
SSHD_OPTIONS in the environment holds more options; those of the command line win. The
options of OpenSSH's sshd that have no meaning here are accepted.

Examples:
  sshd                                         in the pod, all from the environment
  sshd -f /etc/cray/ims/sshd_config -E /etc/cray/ims/sshd.log /mnt/image
  SSH_JAIL=True sshd -f my_sshd_config -p 2022 -o LogLevel=DEBUG /srv/job
  sshd -t -f my_sshd_config                    check the configuration and the keys
  ssh -p 2022 root@localhost touch /tmp/complete

Exit status: 0 when the job was marked complete or failed and all is over, 1 on failure or
when a signal ended it before that, 2 for a wrong command line.
`

// flags is a parsed command line.
type flags struct {
	set      *pflag.FlagSet
	config   string
	logFile  string
	options  []string
	hostKeys []string
	ports    []int
	grace    string
	v4, v6   bool
	debug    int
	test     bool
}

func newFlags() *flags {
	f := &flags{set: pflag.NewFlagSet("sshd", pflag.ContinueOnError)}
	s := f.set
	s.SortFlags = false
	s.SetOutput(io.Discard)
	s.StringVarP(&f.config, "config", "f", "", "sshd_config to read")
	s.StringVarP(&f.logFile, "log", "E", "", "append the log to this file, too; at 64 MiB it becomes FILE.1")
	s.IntSliceVarP(&f.ports, "port", "p", nil, "port to listen on; wins over sshd_config (default 22)")
	s.StringArrayVarP(&f.options, "option", "o", nil, "an sshd_config line as Key=Value; wins over the file")
	s.StringArrayVarP(&f.hostKeys, "host-key", "h", nil, "host key file, as HostKey")
	s.StringVarP(&f.grace, "login-grace-time", "g", "", "as LoginGraceTime")
	s.BoolVarP(&f.v4, "ipv4", "4", false, "listen on IPv4 only")
	s.BoolVarP(&f.v6, "ipv6", "6", false, "listen on IPv6 only")
	s.CountVarP(&f.debug, "debug", "d", "log in detail")
	s.BoolVarP(&f.test, "test", "t", false, "check sshd_config, authorized_keys and host keys, then exit")
	s.BoolP("foreground", "D", true, "stay in the foreground, as it always does")
	s.BoolP("stderr", "e", true, "log to standard error, as it always does")
	for _, n := range []string{"q", "i", "r"} {
		s.BoolP("ignored-"+n, n, false, "")
	}
	for _, n := range []string{"u", "c", "C"} {
		s.StringP("ignored-"+n, n, "", "")
	}
	for _, n := range []string{"q", "i", "r", "u", "c", "C"} {
		s.MarkHidden("ignored-" + n)
	}
	return f
}

// keyValues are the options as sshd_config lines.
func (f *flags) keyValues() []string {
	var kv []string
	for _, p := range f.ports {
		kv = append(kv, "Port="+strconv.Itoa(p))
	}
	for _, k := range f.hostKeys {
		kv = append(kv, fmt.Sprintf("HostKey=%q", k))
	}
	if f.grace != "" {
		kv = append(kv, "LoginGraceTime="+f.grace)
	}
	if f.v4 {
		kv = append(kv, "AddressFamily=inet")
	}
	if f.v6 {
		kv = append(kv, "AddressFamily=inet6")
	}
	return append(kv, f.options...)
}

// gcPercent is for a heap of a few megabytes through which a transfer drives gigabytes, a packet of 32 KiB each: at the
// usual 100 the collector runs every hundred packets.
const gcPercent = 400

// Main runs the command line args of `sshd` and returns the exit status.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "status" {
		return statusMain(args[1:], DefaultRunDir, stdout, stderr)
	}
	debug.SetGCPercent(gcPercent)
	f := newFlags()
	if err := f.set.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Fprintf(stdout, usage, f.set.FlagUsagesWrapped(90))
			return 0
		}
		return fail(stderr, 2, fmt.Errorf("%w; see sshd --help", err))
	}
	if f.set.NArg() > 1 {
		return fail(stderr, 2, fmt.Errorf("one IMAGE_ROOT_PARENT, not %q; see sshd --help", f.set.Args()))
	}
	env, err := config.LoadSSHD(f.set.Args()...)
	if err != nil {
		return fail(stderr, 1, err)
	}
	more := newFlags()
	if err := more.set.Parse(env.Options); err != nil || more.set.NArg() > 0 {
		return fail(stderr, 2, fmt.Errorf("SSHD_OPTIONS %q: %w; it takes the options of sshd --help", env.Options, errors.Join(err, extra(more.set))))
	}
	if len(f.ports) > 0 {
		more.ports = nil
	}
	level := &slog.LevelVar{}
	level.Set(env.LogLevel)
	if f.debug+more.debug > 0 {
		level.Set(slog.LevelDebug)
	}
	out := stderr
	if path := first(f.logFile, more.logFile); path != "" {
		file, err := openLogFile(path, maxLogFile, config.NewLogger(stderr, env.LogFormat, slog.LevelError))
		if err != nil {
			return fail(stderr, 1, fmt.Errorf("log file: %w; choose another with -E", err))
		}
		defer file.Close()
		out = io.MultiWriter(file, stderr) // stderr may have nobody who reads it any more
	}
	log := slog.New(leveled{level, config.NewLogger(out, env.LogFormat, slog.LevelDebug).Handler()})
	if env.JobID != "" {
		log = log.With("job", env.JobID)
	}
	cfg := Config{
		SSHD:       env,
		ConfigFile: first(f.config, more.config, env.ConfigFile),
		Options:    append(f.keyValues(), more.keyValues()...),
		Level:      level,
		Log:        log,
	}
	run := Run
	if f.test || more.test {
		run = check
	} else if err := jail.Shield(); err != nil {
		log.Warn("root in a jail may be able to stop the gateway", "err", err)
	}
	if err := run(ctx, cfg); err != nil {
		log.Error("sshd failed", "err", err)
		return 1
	}
	return 0
}

// check is test mode, -t: it changes nothing and listens nowhere.
func check(_ context.Context, cfg Config) error {
	set, err := LoadSettings(cfg)
	if err != nil {
		return err
	}
	given, err := givenHostKeys(set)
	if err != nil {
		return err
	}
	for _, f := range set.HostCertificates {
		if _, err := certify(f, given); err != nil {
			return err
		}
	}
	n, err := checkKeys(set, cfg.Log.Warn)
	if err == nil {
		cfg.Log.Info("configuration is usable", "keys", n)
	}
	return err
}

func extra(s *pflag.FlagSet) error {
	if s.NArg() == 0 {
		return nil
	}
	return fmt.Errorf("unexpected argument %q", s.Arg(0))
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func fail(stderr io.Writer, code int, err error) int {
	fmt.Fprintf(stderr, "sshd: %s\n", strings.TrimSpace(err.Error()))
	return code
}

// leveled lets LogLevel in sshd_config change the level of a logger that exists already.
type leveled struct {
	level *slog.LevelVar
	slog.Handler
}

// Enabled asks the variable.
func (l leveled) Enabled(_ context.Context, at slog.Level) bool { return at >= l.level.Level() }

// WithAttrs keeps the variable.
func (l leveled) WithAttrs(a []slog.Attr) slog.Handler {
	return leveled{l.level, l.Handler.WithAttrs(a)}
}

// WithGroup keeps the variable.
func (l leveled) WithGroup(n string) slog.Handler { return leveled{l.level, l.Handler.WithGroup(n)} }
