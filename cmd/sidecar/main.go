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

	"golang.org/x/sys/unix"
)

func main() {
	// Packing a large tree keeps its names and little garbage: collecting that
	// sooner costs next to nothing and takes a third off the peak.
	debug.SetGCPercent(25)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	code := run(ctx, os.Args)
	stop()
	os.Exit(code)
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
