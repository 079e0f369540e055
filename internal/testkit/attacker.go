// SPDX-License-Identifier: Apache-2.0

package testkit

import (
	"os"
	"os/exec"
	"testing"
)

// BuildAttacker compiles internal/testkit/attacker, the hostile program of the jail's tests, to path. It is static: it
// runs in the emptiest of images.
func BuildAttacker(t testing.TB, path string) {
	t.Helper()
	NeedTool(t, "go")
	cmd := exec.Command("go", "build", "-o", path, "github.com/ims-buildenv/ims-buildenv/internal/testkit/attacker")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build attacker: %v\n%s", err, out)
	}
}
