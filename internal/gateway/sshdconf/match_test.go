// SPDX-License-Identifier: Apache-2.0

package sshdconf

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// matchCriteria are the blocks of one file; each adds a name to AcceptEnv.
var matchCriteria = []string{
	"Address 10.0.0.1", "Address 10.0.0.0/24", "Address 192.0.2.0/24,10.0.0.1,2001:db8::/32", "Address *,!10.0.0.0/24",
	"Address !10.0.0.1", "Address 10.0.?.1", "Address 2001:db8::5", "Address 2001:db8:*",
	"LocalAddress 127.0.0.1,::1", "LocalPort 2222", "LocalPort ssh", "LocalPort 2222 Address 10.0.0.0/8",
	"User root Address 10.0.0.1", "User bob Address 10.0.0.1", "Group=root,wheel localport=22", "all",
}

// criteria is a file of all of them.
func criteria() string {
	var b strings.Builder
	for i, c := range matchCriteria {
		fmt.Fprintf(&b, "Match %s\nAcceptEnv CASE%d\n", c, i)
	}
	return b.String()
}

// matchCases are files whose blocks hold for some peers.
var matchCases = []struct{ name, text string }{
	{"criteria", criteria()},
	{"first wins", "Banner /global\nMatch Address 10.0.0.1\nBanner /first\nMatch Address 10.0.0.0/8\nBanner /second\nMaxSessions 3\nMatch all\nBanner /third"},
	{"lists", "AcceptEnv A\nMatch Address 10.0.0.1\nAcceptEnv B C\nMatch LocalPort 2222\nAcceptEnv D"},
	{"values", `Match Address 10.0.0.0/24
AllowTcpForwarding local
AllowAgentForwarding no
AllowStreamLocalForwarding remote
PermitOpen a:1 b:2
PermitListen 3
PermitTTY no
ForceCommand echo x  y
AuthorizedKeysFile /a /b
MaxSessions 7
MaxAuthTries 2
ClientAliveInterval 5
ClientAliveCountMax 9
SetEnv A=1 B=2
GatewayPorts clientspecified
PubkeyAuthentication no
PermitRootLogin forced-commands-only
DenyUsers root@10.0.0.1
StreamLocalBindUnlink yes
DisableForwarding yes
TrustedUserCAKeys /ca
RevokedKeys /revoked
AuthorizedPrincipalsFile /principals`},
}

var matchPeers = []Peer{
	{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("127.0.0.1"), 22},
	{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("127.0.0.2"), 2222},
	{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("127.0.0.1"), 2222},
	{netip.MustParseAddr("2001:db8::5"), netip.MustParseAddr("::1"), 22},
}

// dump words settings as sshd -T does, as far as matchCases set them.
func (s *Settings) dump() string {
	none := func(v string) string {
		if v == "" {
			return "none"
		}
		return v
	}
	yes := func(v bool) string { return map[bool]string{true: "yes", false: "no"}[v] }
	permissions := func(l Permissions) (text string) {
		if l == nil {
			return "any"
		}
		for _, p := range l {
			text += fmt.Sprintf(" %s:%d", p.Host, p.Port)
		}
		return strings.TrimPrefix(text, " ")
	}
	lines := []string{
		"banner " + none(s.Banner), "maxsessions " + fmt.Sprint(s.MaxSessions), "maxauthtries " + fmt.Sprint(s.MaxAuthTries),
		"allowtcpforwarding " + s.TCPForwarding, "allowagentforwarding " + yes(s.AgentForwarding), "allowstreamlocalforwarding " + s.StreamLocal,
		"permitopen " + permissions(s.PermitOpen), "permitlisten " + permissions(s.PermitListen), "permittty " + yes(s.PermitTTY),
		"forcecommand " + none(s.ForceCommand), "authorizedkeysfile " + strings.Join(s.AuthorizedKeysFiles, " "),
		fmt.Sprintf("clientaliveinterval %d", int(s.ClientAliveInterval.Seconds())), fmt.Sprintf("clientalivecountmax %d", s.ClientAliveCountMax),
		"gatewayports " + s.GatewayPorts, "pubkeyauthentication " + yes(s.PubkeyAuth), "streamlocalbindunlink " + yes(s.StreamLocalUnlink),
		"permitrootlogin " + map[RootLogin]string{RootYes: "yes", RootForcedCommandsOnly: "forced-commands-only", RootNo: "no"}[s.PermitRootLogin],
		"disableforwarding " + yes(s.DisableForwarding), "trustedusercakeys " + none(s.TrustedUserCAKeys), "revokedkeys " + none(s.RevokedKeys),
		"authorizedprincipalsfile " + none(s.PrincipalsFile),
	}
	for _, e := range s.AcceptEnv {
		lines = append(lines, "acceptenv "+e)
	}
	for _, e := range s.SetEnv {
		lines = append(lines, "setenv "+e)
	}
	for _, e := range s.DenyUsers {
		lines = append(lines, "denyusers "+e)
	}
	return strings.Join(lines, "\n") + "\n"
}

// TestMatchPeers: the settings for each peer are those of OpenSSH's sshd -T -C.
func TestMatchPeers(t *testing.T) {
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "sshd", "ssh-keygen")
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	if os.Mkdir("/run/sshd", 0o755) == nil { // it does not start without
		t.Cleanup(func() { os.Remove("/run/sshd") })
	}
	dir := t.TempDir()
	hostKey, file := filepath.Join(dir, "key"), filepath.Join(dir, "sshd_config")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hostKey).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	for _, tt := range matchCases {
		// The global part makes one of what differs by default.
		text := "MaxSessions 1000\nAuthorizedKeysFile /keys\nPermitRootLogin yes\n" + tt.text + "\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		set, err := Load(file, nil)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		for _, p := range matchPeers {
			out, err := exec.Command(sshd, "-T", "-f", file, "-h", hostKey, "-C",
				fmt.Sprintf("user=root,host=x,addr=%s,laddr=%s,lport=%d", p.Addr, p.Local, p.LocalPort)).Output()
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			got := set.For(p).dump()
			for line := range strings.Lines(got) {
				if !strings.Contains("\n"+string(out), "\n"+line) {
					keyword, _, _ := strings.Cut(line, " ")
					_, theirs, _ := strings.Cut("\n"+string(out), "\n"+keyword)
					theirs, _, _ = strings.Cut(theirs, "\n")
					t.Errorf("%s, %v: %s, sshd has%s", tt.name, p, strings.TrimSpace(line), theirs)
				}
			}
			for _, list := range []string{"acceptenv ", "setenv ", "denyusers "} {
				if ours, theirs := strings.Count("\n"+got, "\n"+list), strings.Count("\n"+string(out), "\n"+list); ours != theirs {
					t.Errorf("%s, %v: %d of %s, sshd has %d", tt.name, p, ours, list, theirs)
				}
			}
		}
	}
}

// TestMatchVariants: without a peer no conditional block holds, and each has a variant of its own.
func TestMatchVariants(t *testing.T) {
	dir := t.TempDir()
	included := filepath.Join(dir, "more")
	if err := os.WriteFile(included, []byte("MaxAuthTries 3\nMatch LocalPort 2222\nMaxAuthTries 4\nMatch all\nPermitTTY no\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Parse("f", []byte("Match Address 10.0.0.0/8\nForceCommand a\nInclude "+included+"\nMaxSessions 2\nMatch User bob\nInclude "+included+"\nMatch invalid-user\nMaxSessions 9\n"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range append(s.Variants(), s.For(matchPeers[0]), s.For(matchPeers[1]), s.For(matchPeers[2])) {
		got = append(got, fmt.Sprint(v.ForceCommand, v.MaxAuthTries, v.MaxSessions, v.PermitTTY))
	}
	// The base, the block, the two in the included file; then peers in 10.0.0.0/8 on port 22, and 2222, and one elsewhere.
	want := []string{"6 1000 true", "a3 2 true", "4 1000 true", "6 1000 false", "a3 2 false", "a3 2 false", "6 1000 true"}
	for i := range want {
		want[i] = strings.TrimSpace(want[i])
	}
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
