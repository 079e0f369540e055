// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCatchLibcSignals promises that the signals that C libraries keep for themselves are survived, whichever code they
// meet. Without it they end this process.
func TestCatchLibcSignals(t *testing.T) {
	if err := catchLibcSignals(); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		for sig := unix.Signal(32); sig <= 34; sig++ {
			if err := unix.Kill(os.Getpid(), sig); err != nil {
				t.Fatal(err)
			}
		}
	}
}
