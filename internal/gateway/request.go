// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// Limits of what a client may say before its command starts.
const (
	maxTerm     = 256 // bytes of TERM
	maxEnv      = 128 // env requests that are kept
	maxEnvBytes = 64 << 10
)

// windowSize is the tail of pty-req and the payload of window-change (RFC 4254, 6.2, 6.7).
type windowSize struct{ Cols, Rows, XPixel, YPixel uint32 }

// clamp limits the numbers to what a struct winsize holds.
func (w windowSize) clamp() windowSize {
	return windowSize{min(w.Cols, math.MaxUint16), min(w.Rows, math.MaxUint16), min(w.XPixel, math.MaxUint16), min(w.YPixel, math.MaxUint16)}
}

func parsePTY(payload []byte) (*jail.TTY, error) {
	var m struct {
		Term                       string
		Cols, Rows, XPixel, YPixel uint32
		Modes                      string
	}
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	if len(m.Term) > maxTerm || strings.IndexByte(m.Term, 0) >= 0 {
		return nil, errors.New("TERM is too long or holds a NUL byte")
	}
	w := windowSize{m.Cols, m.Rows, m.XPixel, m.YPixel}.clamp()
	return &jail.TTY{Term: m.Term, Cols: w.Cols, Rows: w.Rows, XPixel: w.XPixel, YPixel: w.YPixel, Modes: parseModes(m.Modes)}, nil
}

// parseModes decodes encoded terminal modes (RFC 4254, section 8): opcodes 1 to 159 have
// one uint32 argument; 0, or anything above, ends the list.
func parseModes(s string) map[uint8]uint32 {
	modes := map[uint8]uint32{}
	for len(s) >= 5 && s[0] >= 1 && s[0] < 160 {
		modes[s[0]] = binary.BigEndian.Uint32([]byte(s[1:5]))
		s = s[5:]
	}
	return modes
}

func parseWindow(payload []byte) (windowSize, error) {
	var w windowSize
	err := ssh.Unmarshal(payload, &w)
	return w.clamp(), err
}

// parseString reads the payload of exec, subsystem and signal.
func parseString(payload []byte) (string, error) {
	var m struct{ S string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", err
	}
	if strings.IndexByte(m.S, 0) >= 0 {
		return "", errors.New("NUL byte")
	}
	return m.S, nil
}

// defaultAcceptEnv holds while sshd_config has no AcceptEnv.
var defaultAcceptEnv = []string{"LANG", "LC_*"}

// neverEnv are variables a client cannot set whatever AcceptEnv says: they decide what is
// executed, or who the session is.
var neverEnv = []string{"LD_*", "PATH", "IMS_*", "REMOTE_BUILD_NODE", "SSH_*", "HOME", "USER", "LOGNAME", "SHELL", "MAIL", "TERM", "ENV", "BASH_ENV", "IFS"}

func parseEnv(payload []byte, accept []string) (string, error) {
	var m struct{ Name, Value string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", err
	}
	if m.Name == "" || strings.ContainsAny(m.Name, "=\x00") || strings.IndexByte(m.Value, 0) >= 0 {
		return "", errors.New("malformed name or value")
	}
	if len(accept) == 0 {
		accept = defaultAcceptEnv
	}
	match := func(pat string) bool { return sshdconf.MatchList(m.Name, pat) }
	if !slices.ContainsFunc(accept, match) || slices.ContainsFunc(neverEnv, match) {
		return "", fmt.Errorf("%s is not accepted from clients", quoteShort(m.Name))
	}
	return m.Name + "=" + m.Value, nil
}

// signals are the names RFC 4254, section 6.10, gives.
var signals = map[string]unix.Signal{
	"ABRT": unix.SIGABRT, "ALRM": unix.SIGALRM, "FPE": unix.SIGFPE, "HUP": unix.SIGHUP, "ILL": unix.SIGILL,
	"INT": unix.SIGINT, "KILL": unix.SIGKILL, "PIPE": unix.SIGPIPE, "QUIT": unix.SIGQUIT, "SEGV": unix.SIGSEGV,
	"TERM": unix.SIGTERM, "USR1": unix.SIGUSR1, "USR2": unix.SIGUSR2,
}

// signalName is the name to send for sig; one that the RFC does not have carries a domain,
// as section 6.10 asks.
func signalName(sig unix.Signal) string {
	name := strings.TrimPrefix(unix.SignalName(sig), "SIG")
	if name == "" {
		name = fmt.Sprint(int(sig))
	}
	if _, ok := signals[name]; !ok {
		name += "@openssh.com"
	}
	return name
}

// exitRequest is the last request on a session channel: its type and payload.
func exitRequest(e jail.Exit) (string, []byte) {
	if e.Signal != 0 {
		return "exit-signal", ssh.Marshal(struct {
			Signal  string
			Core    bool
			Message string
			Lang    string
		}{signalName(e.Signal), e.Core, "", ""})
	}
	return "exit-status", ssh.Marshal(struct{ Code uint32 }{uint32(e.Code) & 0xff})
}
