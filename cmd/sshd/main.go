// SPDX-License-Identifier: Apache-2.0

// Command sshd is the SSH server of an IMS customize job: container `sshd` of the pod. It
// parses nothing itself; see package gateway.
package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

func main() {
	jail.ChildMain() // does not return in a child mode of this binary

	// A handler instead of "ignore": a log pipe that closes must not end the daemon, and
	// children must not inherit an ignored SIGPIPE.
	// And OpenSSH's sshd reads its configuration again on SIGHUP: nobody means to end the job by it.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE, unix.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	code := gateway.Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
