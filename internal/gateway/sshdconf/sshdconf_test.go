// SPDX-License-Identifier: Apache-2.0

package sshdconf

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// legacy is what the legacy sidecar writes and the legacy entrypoint appends.
const legacy = `
Port 22
LogLevel INFO
PermitRootLogin yes
PubkeyAuthentication yes
AuthorizedKeysFile /etc/cray/ims/authorized_keys
PasswordAuthentication no
ChallengeResponseAuthentication no
Subsystem sftp internal-sftp
SetEnv IMS_JOB_ID=1-2 IMS_ARCH=x86_64 IMS_DKMS_ENABLED=False REMOTE_BUILD_NODE=
Match User root
ChrootDirectory /mnt/image/image-root
`

func TestLegacyFile(t *testing.T) {
	s, err := Parse("sshd_config", []byte(legacy))
	if err != nil {
		t.Fatal(err)
	}
	info := slog.LevelInfo
	want := defaults()
	want.Ports = []int{22}
	want.LogLevel = &info
	want.Subsystems = map[string]string{"sftp": "internal-sftp"}
	want.SetEnv = []string{"IMS_JOB_ID=1-2", "IMS_ARCH=x86_64", "IMS_DKMS_ENABLED=False", "REMOTE_BUILD_NODE="}
	want.ChrootDirectory = "/mnt/image/image-root"
	want.Ignored = []string{"PasswordAuthentication", "ChallengeResponseAuthentication"}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
}

// TestMissed: what asks for something that is not done is told apart from what asks for nothing.
func TestMissed(t *testing.T) {
	s, err := Parse("sshd_config", []byte("X11Forwarding yes\nPasswordAuthentication no\nAuthorizedKeysCommand none\nHostKeyAgent /agent\nUsePAM yes\nMatch all\nPermitTunnel point-to-point\n"))
	if err != nil || !slices.Equal(s.Missed, []string{"X11Forwarding", "HostKeyAgent", "PermitTunnel"}) || len(s.Ignored) != 3 {
		t.Errorf("missed %q, ignored %q, %v", s.Missed, s.Ignored, err)
	}
}

func TestSyntax(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		get        func(*Settings) any
		want       any
	}{
		{"keyword without case", "mAxSeSsIoNs 7", func(s *Settings) any { return s.MaxSessions }, 7},
		{"equals sign", "MaxSessions=7", func(s *Settings) any { return s.MaxSessions }, 7},
		{"spaces around equals", "MaxSessions = 7", func(s *Settings) any { return s.MaxSessions }, 7},
		{"tabs and CRLF", "\tMaxSessions\t7\r\n", func(s *Settings) any { return s.MaxSessions }, 7},
		{"quoted keyword", `"MaxSessions" 7`, func(s *Settings) any { return s.MaxSessions }, 7},
		{"first value wins", "MaxSessions 7\nMaxSessions 8", func(s *Settings) any { return s.MaxSessions }, 7},
		{"comment line", "# MaxSessions 7\n  # more\nMaxSessions 8", func(s *Settings) any { return s.MaxSessions }, 8},
		{"comment at end", "MaxSessions 7 # seven", func(s *Settings) any { return s.MaxSessions }, 7},
		{"no comment inside a word", "Banner /etc/a#b", func(s *Settings) any { return s.Banner }, "/etc/a#b"},
		{"double quotes", `Banner "/etc/a b"`, func(s *Settings) any { return s.Banner }, "/etc/a b"},
		{"single quotes", `Banner '/etc/a "b'`, func(s *Settings) any { return s.Banner }, `/etc/a "b`},
		{"escaped space", `Banner /etc/a\ b`, func(s *Settings) any { return s.Banner }, "/etc/a b"},
		{"backslash kept", `Banner C:\x`, func(s *Settings) any { return s.Banner }, `C:\x`},
		{"none", "Banner none", func(s *Settings) any { return s.Banner }, ""},
		{"ports add up", "Port 22\nPort 2022", func(s *Settings) any { return s.Ports }, []int{22, 2022}},
		{"time sum", "LoginGraceTime 1h30m5", func(s *Settings) any { return s.LoginGraceTime }, time.Hour + 30*time.Minute + 5*time.Second},
		{"rekey", "RekeyLimit 3m 1h", func(s *Settings) any { return s.RekeyBytes }, uint64(3 << 20)},
		{"rekey default", "RekeyLimit default none", func(s *Settings) any { return s.RekeyBytes }, uint64(0)},
		{"redact", "RecordRedact a+\nRecordRedact 'b c'\nRecordCommands yes", func(s *Settings) any { return fmt.Sprint(s.RecordRedact, s.RecordCommands) }, "[a+ b c] true"},
		{"startups", "MaxStartups 10:30:60", func(s *Settings) any { return s.MaxStartups }, 60},
		{"yes without case", "PermitTTY NO", func(s *Settings) any { return s.PermitTTY }, false},
		{"prohibit-password is yes here", "PermitRootLogin prohibit-password", func(s *Settings) any { return s.PermitRootLogin }, RootYes},
		{"forced only", "PermitRootLogin forced-commands-only", func(s *Settings) any { return s.PermitRootLogin }, RootForcedCommandsOnly},
		{"touch required", "PubkeyAuthOptions touch-required", func(s *Settings) any { return s.TouchRequired }, true},
		{"no CA", "TrustedUserCAKeys none", func(s *Settings) any { return s.TrustedUserCAKeys }, ""},
		{"several key files", "AuthorizedKeysFile a b", func(s *Settings) any { return s.AuthorizedKeysFiles }, []string{"a", "b"}},
		{"listen v6", "ListenAddress [::1]:2022", func(s *Settings) any { return s.ListenAddresses }, []string{"[::1]:2022"}},
		{"listen bare v6", "ListenAddress ::1", func(s *Settings) any { return s.ListenAddresses }, []string{"::1"}},
		{"listen host", "ListenAddress 127.0.0.1", func(s *Settings) any { return s.ListenAddresses }, []string{"127.0.0.1"}},
		{"setenv: first line wins", "SetEnv A=1 B=2\nSetEnv C=3", func(s *Settings) any { return s.SetEnv }, []string{"A=1", "B=2"}},
		{"subsystem with arguments", "Subsystem sftp /usr/lib/sftp-server -l INFO", func(s *Settings) any { return s.Subsystems["sftp"] }, "/usr/lib/sftp-server -l INFO"},
		{"match all", "MaxSessions 7\nMatch all\nMaxSessions 9", func(s *Settings) any { return s.MaxSessions }, 9},
		{"match overrides what stands above", "ForceCommand a\nMatch User root\nForceCommand b", func(s *Settings) any { return s.ForceCommand }, "b"},
		{"first matching block wins", "Match User root\nForceCommand a\nMatch User ro*\nForceCommand b", func(s *Settings) any { return s.ForceCommand }, "a"},
		{"other user", "ForceCommand a\nMatch User bob\nForceCommand b", func(s *Settings) any { return s.ForceCommand }, "a"},
		{"negated pattern", "Match User *,!root\nForceCommand b", func(s *Settings) any { return s.ForceCommand }, ""},
		{"a block ends with the next", "Match User bob\nForceCommand b\nMatch all\nMaxSessions 3", func(s *Settings) any { return s.MaxSessions }, 3},
		{"a forced command keeps its quotes", `ForceCommand sh -c "echo  'a b'"  `, func(s *Settings) any { return s.ForceCommand }, `sh -c "echo  'a b'"`},
		{"match with equals", "Match User=root\nForceCommand b", func(s *Settings) any { return s.ForceCommand }, "b"},
		{"match replaces a list", "AcceptEnv A\nMatch all\nAcceptEnv B C", func(s *Settings) any { return s.AcceptEnv }, []string{"B", "C"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Parse("f", []byte(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if got := tt.get(s); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %#v, want %#v", got, tt.want)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"\nNoSuchThing yes", `f line 2: bad configuration option "NoSuchThing"`},
		{"Port", `no argument after keyword "Port"`},
		{"Port # 22", `no argument after keyword "Port"`},
		{"Port 0", "Port"},
		{"Port 22 23", "extra arguments"},
		{"Port twentytwo", "not a number"},
		{`Banner "abc`, "unbalanced quotes"},
		{"PermitTTY maybe", "use one of yes, no"},
		{"LoginGraceTime 5x", "invalid time value"},
		{"LoginGraceTime 99999w", "invalid time value"},
		{"LogLevel LOUD", "unsupported log level"},
		{"MaxStartups 1:2", "MaxStartups"},
		{"MaxStartups 10:101:60", "RATE"},
		{"MaxStartups 60:30:10", "START"},
		{"AcceptEnv LANG A=B", "SetEnv"},
		{"RekeyLimit 15", "RekeyLimit"},
		{"RekeyLimit 1T", "RekeyLimit"},
		{"RecordRedact a b", "quotes"},
		{"RecordRedact (a", "re2"},
		{"RecordRedact a*", "nothing at all"},
		{"RekeyLimit 1MG", "RekeyLimit"},
		{"RekeyLimit 1G x", "RekeyLimit"},
		{"Subsystem sftp", "missing subsystem command"},
		{"SetEnv FOO", "invalid environment"},
		{"Match Host example.com", "criterion host is not supported"},
		{"Match RDomain x", "criterion rdomain is not supported"},
		{"Match Address example.com", "neither an address"},
		{"Match Address 10.0.0.0/33", "10.0.0.0/33"},
		{"Match Address 10.0.0.1/8", "host bits"},
		{"Match Address 10.0.0.1,", "neither an address"},
		{"Match LocalAddress !", "neither an address"},
		{"Match LocalPort 22,23", "localport"},
		{"Match LocalPort 0", "localport"},
		{"Match LocalPort", "missing value"},
		{"Match all=yes", "cannot be combined"},
		{"Match Address 10.0.0.1\nLogLevel DEBUG", "outside of Match"},
		{"Match User root LocalPort 22\nChrootDirectory /mnt", "outside of Match"},
		{"Match Planet earth", "unknown criterion"},
		{"Match User", "missing value"},
		{"Match all User root", "cannot be combined"},
		{"Match User bob\nPort 22", "not allowed within a Match block"},
		{"Match User bob\nForceCommand 'x", "unbalanced"},
		{"PubkeyAuthOptions touch-required,verify-required", "not supported by this server"},
		{"AuthorizedPrincipalsCommand /bin/who", "AuthorizedPrincipalsFile"},
		{"AuthenticationMethods password", "public key only"},
		{"Banner a\x00b", "NUL"},
	} {
		if _, err := Parse("f", []byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got error %v, want one with %q", tt.text, err, tt.want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	main := write("sshd_config", "Include conf.d/*.conf\nPort 22\nMaxSessions 5\nPermitTTY no\n")
	os.Mkdir(filepath.Join(dir, "conf.d"), 0o700)
	write("conf.d/a.conf", "MaxSessions 6\nMatch User bob\nForceCommand x\n")
	write("conf.d/b.conf", "MaxSessions 7\nMaxAuthTries 2\n")

	s, err := Load(main, []string{"Port=2022", "PermitTTY yes"})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(s.Ports, []int{2022}) || !s.PermitTTY {
		t.Errorf("the command line must win: ports %v, PermitTTY %v", s.Ports, s.PermitTTY)
	}
	if s.MaxSessions != 6 || s.MaxAuthTries != 2 || s.ForceCommand != "" {
		t.Errorf("Include: MaxSessions %d, MaxAuthTries %d, ForceCommand %q", s.MaxSessions, s.MaxAuthTries, s.ForceCommand)
	}

	missing := filepath.Join(dir, "nowhere")
	if _, err := Load(missing, nil); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load("", []string{"Prot=22"}); err == nil || !strings.Contains(err.Error(), "command line") {
		t.Errorf("bad -o: %v", err)
	}
	// A mounted ConfigMap, and how its files would be found by name.
	os.MkdirAll(filepath.Join(dir, "mount/..2026_01_01"), 0o700)
	write("mount/..2026_01_01/a.conf", "MaxSessions 8\n")
	write("mount/.b.conf", "MaxSessions 9\n")
	for name, to := range map[string]string{"..data": "..2026_01_01", "a.conf": "..data/a.conf"} {
		if err := os.Symlink(to, filepath.Join(dir, "mount", name)); err != nil {
			t.Fatal(err)
		}
	}
	for pattern, want := range map[string]int{"mount/*": 8, "mount/*/*": 1000, "mount/.b*": 9, "*/..data/*": 8, ".//mount/../mount/*": 8} {
		if s, err := Load(write("mounted", "Include "+pattern+"\n"), nil); err != nil || s.MaxSessions != want {
			t.Errorf("Include %s: %v, want MaxSessions %d: %+v", pattern, err, want, s)
		}
	}
	loop := write("loop", "Include loop\n")
	if _, err := Load(loop, nil); err == nil || !strings.Contains(err.Error(), "nested") {
		t.Errorf("endless Include: %v", err)
	}
}

// TestEveryKeyword: the machine's sshd tells its own settings, which is a file that sets each keyword.
func TestEveryKeyword(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "sshd", "ssh-keygen")
	sshd, err := exec.LookPath("sshd") // it demands to be called by an absolute path
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // what Debian's service makes
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "host")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	text, err := exec.Command(sshd, "-T", "-f", "/dev/null", "-h", key).Output()
	if err != nil {
		t.Fatalf("sshd -T: %v", err)
	}
	s, err := Parse("sshd -T", text)
	if err != nil {
		t.Fatal(err)
	}
	if s.MaxAuthTries != 6 || !slices.Contains(s.Ignored, "permittunnel") {
		t.Errorf("%d lines give %+v", strings.Count(string(text), "\n"), s)
	}
}

func TestMatchPattern(t *testing.T) {
	for _, tt := range []struct {
		s, p string
		want bool
	}{
		{"root", "root", true}, {"root", "r?ot", true}, {"root", "*", true}, {"root", "r*t", true}, {"root", "", false},
		{"", "*", true}, {"", "", true}, {"root", "root*", true}, {"root", "*x*", false}, {"rooot", "r*o*t", true}, {"Root", "root", false},
	} {
		if got := matchPattern(tt.s, tt.p); got != tt.want {
			t.Errorf("matchPattern(%q, %q) = %v", tt.s, tt.p, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(legacy))
	f.Add([]byte("Match User \"a b\",!root\nForceCommand 'x\\' y\nPort=22\nListenAddress [::1]:22"))
	f.Add([]byte("LoginGraceTime 1w2d3h4m5s\nMaxStartups 1:2:3\nSubsystem a b c # d\n\"Port\" 22\f"))
	f.Add([]byte("SetEnv A= B=\"x y\"\nAcceptEnv LC_* !LC_ALL\nCiphers +aes*"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if strings.Contains(strings.ToLower(string(text)), "include") {
			t.Skip("reads other files")
		}
		s, err := Parse("f", text)
		if err == nil && (s.MaxSessions < 0 || s.LoginGraceTime < 0 || s.MaxStartups < 1) {
			t.Fatalf("%q gives %+v", text, s)
		}
	})
}
