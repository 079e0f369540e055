// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMatchConnections: one gateway, clients of several addresses, each with what the Match blocks give it.
func TestMatchConnections(t *testing.T) {
	k := newKey(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"banner": "for some\n", "keys": k.line("", "k")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The lines of the harness follow, in the last block.
	j := start(t, options{keys: "# none\n", config: `Match Address 127.0.0.2
ForceCommand echo "forced  here"
Match Address 127.0.0.3,127.0.0.4
Banner ` + dir + `/banner
SetEnv WHO=third
Match Address 127.0.0.4
PermitTTY no
MaxSessions 0
Match Address 127.0.0.5
PubkeyAcceptedAlgorithms ecdsa*
Match Address 127.0.0.6
PubkeyAuthentication no
Match LocalAddress 127.0.0.1
AuthorizedKeysFile ` + dir + `/keys
Match LocalAddress 192.0.2.1
PermitTTY no
Match all`})
	j.key = k
	for _, tt := range []struct {
		from, out, errs string
		code            int
	}{
		{"127.0.0.1", "ran \n", "", 0},
		{"127.0.0.2", "forced  here\n", "", 0},
		{"127.0.0.3", "ran third\n", "for some", 0},
		{"127.0.0.4", "", "MaxSessions", 255},
		{"127.0.0.5", "", "Permission denied", 255},
		{"127.0.0.6", "", "Permission denied", 255},
	} {
		out, errs, code := run(t, j.tool("ssh", "-b", tt.from, host, "echo ran $WHO"))
		if strings.ReplaceAll(out, "ran\n", "ran \n") != tt.out || !strings.Contains(errs, tt.errs) || (code == 255) != (tt.code == 255) {
			t.Errorf("%s: %q, %q, %d", tt.from, out, errs, code)
		}
	}
}

// TestMatchChecked: what is wrong in a block for some peers is told at the start, and so is a criterion nobody can judge.
func TestMatchChecked(t *testing.T) {
	for lines, want := range map[string]string{
		"Match Host *.example.com\nPermitTTY no":                            "criterion host is not supported",
		"Match Address 192.0.2.1\nDenyUsers root@10.0.0.0/33":               "10.0.0.0/33",
		"Match Address 192.0.2.1\nPubkeyAcceptedAlgorithms nonsense":        "leaves nothing",
		"Match Address 192.0.2.1\nForceCommand internal-sftp -x":            "ForceCommand",
		"Match Address 192.0.2.1\nRevokedKeys /no/such/list":                "/no/such/list",
		"Match Address 192.0.2.1\nLogLevel DEBUG":                           "outside of Match",
		"PubkeyAuthentication no\nMatch User bob\nPubkeyAuthentication yes": "nobody could log in",
	} {
		err := startError(t, options{config: lines + "\nMatch all"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", lines, err)
		}
	}
}
