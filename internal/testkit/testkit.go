// SPDX-License-Identifier: Apache-2.0

// Package testkit says what a test needs of the machine it runs on: root, or
// a tool. A machine without it skips the test by name; in CI (environment
// variable IMS_BUILDENV_CI=1) nothing may be skipped, so there the test fails.
//
// It refuses to install, emulate or guess anything: a missing tool is a reason
// to skip, never to fall back on our own code as the judge.
package testkit

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// InCI reports whether a missing requirement must fail the test.
func InCI() bool { return os.Getenv("IMS_BUILDENV_CI") == "1" }

// NeedRoot skips t (fails it in CI) unless the test runs as uid 0.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "needs root")
	}
}

// NeedTool skips t (fails it in CI) unless every named program is in PATH.
func NeedTool(t testing.TB, names ...string) {
	t.Helper()
	var absent []string
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			absent = append(absent, name)
		}
	}
	if len(absent) > 0 {
		missing(t, "needs the tool(s) "+strings.Join(absent, ", "))
	}
}

func missing(t testing.TB, reason string) {
	t.Helper()
	if InCI() {
		t.Fatalf("%s, and IMS_BUILDENV_CI=1 allows no skipping", reason)
	}
	t.Skip(reason)
}
