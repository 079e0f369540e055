// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/job"
	"github.com/ims-buildenv/ims-buildenv/internal/squash"
)

// Exit codes beside those of package job.
const (
	exitFailure = 1
	exitUsage   = 2
)

// exitCode is how a command that reported for itself ends.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// failure is an error of the work, as opposed to one of the command line.
type failure struct{ error }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "sidecar",
		Short: "Prepare, package, upload and register IMS images; pack and read SquashFS",
		Long: `sidecar does the work of an IMS customize or create job around the shell: it
fetches the image root, opens the shell, waits for it, packs the root as
SquashFS, uploads it with kernel and initrd, and registers the image with IMS.

In a pod it takes its settings from the environment of the IMS job template
(docs/operations.md lists them). The commands below "Tools" need no job.`,
		Example: `  # what the job's two containers run
  sidecar prepare /mnt/image "$download_url"
  sidecar run /mnt/image

  # pack a directory reproducibly and look at the result
  sidecar pack --epoch 0 rootfs/ image.sqsh
  sidecar inspect image.sqsh && sidecar verify image.sqsh`,
		Version:           config.Version + " (" + codecs() + ")",
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return errors.New("a command is missing")
		},
	}
	root.SetVersionTemplate("sidecar {{.Version}}\n")
	root.AddGroup(&cobra.Group{ID: "job", Title: "Job:"}, &cobra.Group{ID: "tools", Title: "Tools:"})
	for _, c := range []*cobra.Command{newPrepare(), newRun(), newUpload(), newStatus()} {
		c.GroupID = "job"
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{newPack(), newUnpack(), newInspect(), newVerify(), newDiff()} {
		c.GroupID = "tools"
		root.AddCommand(c)
	}
	root.AddCommand(newRunChild(), newPackage())
	return root
}

// legacyNames are the scripts of the legacy container and the commands that
// behave as they did.
var legacyNames = map[string]string{
	"prep-env.sh":           "prepare",
	"buildenv-sidecar.sh":   "run",
	"package_and_upload.sh": packageCommand,
}

// legacyArgs turns a call by a script's name into one of a command.
func legacyArgs(args []string) []string {
	if len(args) == 0 {
		return nil
	}
	if len(args) > 1 && args[1] == job.ChildArg { // a process that run has started
		return args[1:]
	}
	if command, ok := legacyNames[filepath.Base(args[0])]; ok {
		return append([]string{command}, args[1:]...)
	}
	return args[1:]
}

// work marks a command's error as one of the work, not of the command line.
func work(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := f(cmd, args); err != nil {
			if _, ok := err.(exitCode); ok {
				return err
			}
			return failure{err}
		}
		return nil
	}
}

// ended turns an exit code into what work commands return.
func ended(code int) error {
	if code == 0 {
		return nil
	}
	return exitCode(code)
}

// exactly wants as many arguments as it is given names for.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return fmt.Errorf("%s needs %s, %d given", cmd.Name(), strings.Join(names, " and "), len(args))
		}
		return nil
	}
}

// codecs tells which libraries compress: builds without cgo have others.
func codecs() string {
	var list []string
	for method, library := range squash.Implementations() {
		list = append(list, fmt.Sprintf("%s: %s", method, library))
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

var stderr = os.Stderr
