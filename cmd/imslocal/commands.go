// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/local"
)

// usageError is a command line that cannot be understood.
type usageError struct{ error }

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "imslocal",
		Short: "An IMS installation for customize jobs on this machine",
		Long: "imslocal runs what surrounds an IMS customize job: the IMS REST API, an S3 server,\n" +
			"and the job's containers, each in namespaces of its own. It needs root.",
		SilenceUsage: true, SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              noArgs,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(newServe(), newRun())
	return root
}

func logger(level slog.Level, debug bool) *slog.Logger {
	if debug {
		level = slog.LevelDebug
	}
	return config.NewLogger(os.Stderr, config.LogText, level)
}

// noArgs refuses arguments that no flag takes.
func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}

func newServe() *cobra.Command {
	var c local.Config
	var debug bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the API, the S3 server and the jobs that clients create, until interrupted",
		Long: "serve keeps records, objects and jobs in the data directory. There, s3-credentials holds the\n" +
			"keys of the S3 server, and cluster-secrets the OAuth2 client for the token endpoint\n" +
			"(" + local.TokenPath + "),\n" +
			"which callers from other machines need. A job that runs when serve ends is marked error.",
		Example: "  imslocal serve\n" +
			"  imslocal serve --listen 127.0.0.1:9100 --s3-listen 127.0.0.1:7070 --data /srv/imslocal\n" +
			"  curl http://127.0.0.1:9100/v3/jobs",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Log, c.Out = logger(slog.LevelInfo, debug), os.Stdout
			return local.Serve(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Listen, "listen", "127.0.0.1:9100", "address of the API; beyond this machine, requests need a token")
	f.StringVar(&c.S3Listen, "s3-listen", "127.0.0.1:0", "address of the S3 server, port 0 for a free one")
	f.StringVar(&c.Data, "data", "imslocal-data", "directory for records, objects and jobs")
	f.StringVar(&c.Runner, "runner", "process", "how jobs are run: process (here), none (you start the pods, see images/pod.yaml)")
	f.BoolVar(&debug, "debug", false, "log every step and request")
	return cmd
}

func newRun() *cobra.Command {
	var c local.RunConfig
	var debug bool
	cmd := &cobra.Command{
		Use:   "run --image IMAGE --key PUBKEY",
		Short: "Take one image through a customize job",
		Long: "run registers a SquashFS image and a public key, starts a customize job, prints how to log\n" +
			"in, follows the job, and reads the new image back. With the exit code 0 the new image is\n" +
			"whole; 1 means the job failed, 130 that it was interrupted. Nothing is left running.",
		Example: "  imslocal run --image base.squashfs --key ~/.ssh/id_ed25519.pub --jail --output new.squashfs\n" +
			"  imslocal run --image base.squashfs --key id.pub --kernel-file-name vmlinuz-6.1.0 --initrd-file-name initrd.img-6.1.0",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Image == "" || c.KeyFile == "" {
				return usageError{errors.New("run needs --image and --key; imslocal run --help has examples")}
			}
			if c.Name == "" {
				base := filepath.Base(c.Image)
				c.Name = strings.TrimSuffix(base, filepath.Ext(base)) + "-customized"
			}
			c.Log, c.Out = logger(slog.LevelWarn, debug), os.Stdout
			return local.Run(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Image, "image", "", "base image, a SquashFS file")
	f.StringVar(&c.KeyFile, "key", "", "SSH public key that may log in")
	f.StringVar(&c.Name, "name", "", "name of the new image (default: that of the base image, -customized)")
	f.BoolVar(&c.Jail, "jail", false, "jail shells in the image")
	f.IntVar(&c.Port, "port", 0, "SSH port (default: a free one)")
	f.StringVar(&c.KernelFileName, "kernel-file-name", "vmlinuz", "the kernel in the image's /boot")
	f.StringVar(&c.InitrdFileName, "initrd-file-name", "initrd", "the initrd in the image's /boot")
	f.StringVar(&c.Data, "data", "", "keep records, objects and logs in this directory")
	f.StringVar(&c.Output, "output", "", "write the new root file system to this file")
	f.StringVar(&c.Events, "events", "", "write the job's statuses to this file, a JSON object per line")
	f.BoolVar(&debug, "debug", false, "log every step and request")
	return cmd
}
