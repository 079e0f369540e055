// SPDX-License-Identifier: Apache-2.0

package local

import (
	"io"
	"log/slog"
	"os"
	"testing"
)

// TestMain lets the test binary be its own child, as imslocal is.
func TestMain(m *testing.M) {
	ChildMain()
	os.Exit(m.Run())
}

// testLog logs into the test's output.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(io.Writer(t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
}
