// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// buildAttacker compiles the hostile program into the image root.
func buildAttacker(t *testing.T, root string) {
	t.Helper()
	testkit.BuildAttacker(t, filepath.Join(root, "usr/bin/attacker"))
}

// plantCanary makes a file beside the image root that nobody inside may ever read.
func plantCanary(t *testing.T, root string) string {
	t.Helper()
	canary := filepath.Join(filepath.Dir(root), "canary")
	if err := os.WriteFile(canary, []byte("outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	return canary
}

// conceded are the attacks that a level does not stop; doc.go says why.
var conceded = map[Level][]string{Chroot: {"signal"}}

// TestAttacks promises that root inside the jail gets nowhere. ATTACK: a hostile program does everything it can think of.
func TestAttacks(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		buildAttacker(t, root)
		canary := plantCanary(t, root)
		j := startJail(t, Config{Root: root, Level: level})
		// The attacks are real ones: without a jail they work. Only those are shown that leave this machine alone.
		harmless := []string{"chroot", "chroot-held", "proc-links", "capabilities", "userns", "unshare", "handle"}
		if inPod() {
			harmless = harmless[:3]
		}
		worked := 0
		for line := range strings.Lines(output(t, j, rootPrefix(level, root)+"/usr/bin/attacker list")) {
			attack, _, _ := strings.Cut(line, "\t")
			if level == Plain && !slices.Contains(harmless, attack) {
				continue
			}
			stdout, stderr, exit := run(t, j, rootPrefix(level, root)+"/usr/bin/attacker "+attack+" "+canary+" "+strconv.Itoa(os.Getpid()))
			t.Logf("%s: %+v: %s%s", attack, exit, strings.TrimSpace(stdout), stderr)
			switch {
			case exit.Code == 0 && exit.Signal == 0:
				worked++
				if level != Plain && !slices.Contains(conceded[level], attack) {
					t.Errorf("attack %s worked: %s", attack, stdout)
				}
			case exit.Code != 1 || exit.Signal != 0:
				t.Errorf("attack %s ended with %+v: %s%s", attack, exit, stdout, stderr)
			}
		}
		if level == Plain && worked != len(harmless) {
			t.Errorf("%d of %v worked without a jail: they prove nothing", worked, harmless)
		}
	})
}

// rootPrefix is where the image root is seen in a session.
func rootPrefix(level Level, root string) string {
	if level == Plain {
		return root
	}
	return ""
}

// TestProofSees promises that the proof notices missing confinement: without any, nearly every attempt must succeed.
func TestProofSees(t *testing.T) {
	root := newRoot(t)
	// DKMS gives the sessions a mount namespace of their own: what the attempts do to mounts ends with it.
	j := startJail(t, Config{Root: root, Level: Plain, DKMS: true})
	results, err := j.probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	escaped := map[string]bool{}
	for _, r := range results {
		t.Log(r)
		escaped[r.Name] = r.Escaped
	}
	want := []string{"root directory", "/proc/*/root", "chroot and walk up", "chroot with a held directory"}
	if !inPod() {
		want = append(want, "mount", "pivot_root", "setns", "ptrace", "read foreign memory", "take a descriptor by pidfd",
			"open by file handle", "device node", "kernel controls", "writable /proc and /sys", "unshare mount namespace", "user namespace")
	}
	for _, name := range want {
		if !escaped[name] {
			t.Errorf("attempt %q did not notice that there is no jail", name)
		}
	}
	j.caps = 0
	if err := j.prove(t.Context()); !errors.Is(err, errBreakout) {
		t.Errorf("prove: %v, want %v", err, errBreakout)
	}
}
