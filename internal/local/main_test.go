// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"
)

// modeTestParent makes the test binary a process that has a container in the
// scratch directory argv[2], for TestKilledParentLeavesNothing to kill.
const modeTestParent = "test-parent"

// TestMain lets the test binary be its own child, as imslocal is.
func TestMain(m *testing.M) {
	ChildMain()
	if len(os.Args) == 3 && os.Args[1] == modeTestParent {
		os.Exit(testParent(os.Args[2]))
	}
	os.Exit(m.Run())
}

// testLog logs into the test's output.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(io.Writer(t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func testParent(scratch string) int {
	c, err := startContainer("test", containerSetup{Hostname: "pod", Scratch: scratch, Env: []string{"PATH=/usr/bin:/bin"},
		Args: []string{"/bin/sh", "-c", "setsid sleep 1000 & setsid sleep 1000 & echo up; wait"}},
		os.Stdout, func(string) {})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	<-c.done
	return 0
}
