// SPDX-License-Identifier: Apache-2.0

// Command sidecar is the init container `prepare` and the container
// `buildenv-sidecar` of an IMS job, and a set of tools for SquashFS images. It
// parses flags and the environment and makes one call; it refuses arguments it
// does not know with exit code 2. A job that fails exits with 1, a job its user
// gave up with 0.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	// Packing a large tree keeps its names and little garbage: collecting that
	// sooner costs next to nothing and takes a third off the peak.
	debug.SetGCPercent(25)
	giveUpImmunity("/proc/self/oom_score_adj")
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	code := run(ctx, os.Args)
	stop()
	os.Exit(code)
}

// giveUpImmunity makes the kernel free to end this program when memory ends, whatever it was started with: it packs, and
// what it shares a node with should not have to go instead (proc_pid_oom_score_adj(5)).
func giveUpImmunity(score string) {
	if b, err := os.ReadFile(score); err == nil && strings.HasPrefix(string(b), "-") {
		// Raising one's own score is always permitted.
		_ = os.WriteFile(score, []byte("0"), 0)
	}
}

func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(legacyArgs(args))
	err := root.ExecuteContext(ctx)
	var code exitCode
	var f failure
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &f):
		fmt.Fprintf(os.Stderr, "sidecar: %v\n", f.error)
		return exitFailure
	}
	fmt.Fprintf(os.Stderr, "sidecar: %v\nTry 'sidecar --help'.\n", err)
	return exitUsage
}
