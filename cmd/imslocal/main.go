// SPDX-License-Identifier: Apache-2.0

// Command imslocal is the world around an IMS customize job on one machine: the
// IMS REST API, an S3 server, and a runner that runs the job's pod. It parses
// its command line and nothing else; see package local.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/ims-buildenv/ims-buildenv/internal/local"
)

// Exit codes beside 0 and 1.
const (
	exitUsage       = 2
	exitInterrupted = 128 + int(syscall.SIGINT)
)

func main() {
	local.ChildMain() // does not return in a child mode of this binary
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends us at once, and all children with us

	err := newCommand().ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, local.ErrInterrupted):
		return exitInterrupted
	case errors.As(err, &usage):
		fmt.Fprintln(os.Stderr, "imslocal:", err)
		return exitUsage
	}
	fmt.Fprintln(os.Stderr, "imslocal:", err)
	return 1
}
