// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/job"
	"github.com/ims-buildenv/ims-buildenv/internal/prepare"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// packageCommand is the legacy script package_and_upload.sh, which no user
// types.
const packageCommand = "package-and-upload"

func deps(cfg config.Sidecar) job.Deps {
	log := config.NewLogger(stderr, cfg.LogFormat, cfg.LogLevel)
	if cfg.JobID != "" {
		log = log.With("job", cfg.JobID)
	}
	return job.Deps{Stdout: os.Stdout, Stderr: stderr, Log: log}
}

func newPrepare() *cobra.Command {
	return &cobra.Command{
		Use:   "prepare IMAGE_ROOT_PARENT URL",
		Short: "Fetch the image at URL and unpack it to IMAGE_ROOT_PARENT/image-root",
		Long: `prepare is the init container of a job. It downloads the image, resuming when
the connection breaks, checks it against DOWNLOAD_MD5SUM, and unpacks it. A
failure sets the job's status to error.`,
		Example: `  IMS_JOB_ID=… DOWNLOAD_MD5SUM=… sidecar prepare /mnt/image "$download_url"`,
		Args:    exactly("IMAGE_ROOT_PARENT", "URL"),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			cfg, err := config.LoadPrepare(args[0])
			d := deps(cfg)
			if err != nil {
				return ended(job.Refuse(cmd.Context(), cfg, d, err))
			}
			client, err := job.NewIMS(cfg, d.Log)
			if err != nil {
				return err
			}
			tuneUnpacking()
			if err := prepare.Run(cmd.Context(), cfg, args[1], prepare.Deps{Status: client, Log: d.Log}); err != nil {
				d.Log.Error("the image could not be prepared", "error", err)
				return exitCode(exitFailure)
			}
			return nil
		}),
	}
}

func newRun() *cobra.Command {
	return &cobra.Command{
		Use:   "run [IMAGE_ROOT_PARENT]",
		Short: "Run the job: open the shell, wait, package, upload, register",
		Long: `run is the container buildenv-sidecar. It prepares the image root, lets sshd
start, reports waiting_on_user once a login has worked, and when the user has
touched complete packs and publishes the image. The result goes to stdout as
JSON, the log to stderr.

Exit codes: 0 the image is registered, or the user touched failed; 1 the job
failed and has status error in IMS; 2 wrong usage.`,
		Example: `  IMS_JOB_ID=… IMS_ACTION=customize IMAGE_ROOT_ARCHIVE_NAME=my-image S3_ENDPOINT=… \
      sidecar run /mnt/image`,
		Args: cobra.MaximumNArgs(1),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			return ended(job.Supervise(cmd.Context(), args, os.Stdout, stderr, func() (config.Sidecar, job.Deps, error) {
				cfg, err := config.LoadSidecar(args...)
				return cfg, deps(cfg), err
			}))
		}),
	}
}

// newRunChild is the process that Supervise watches over.
func newRunChild() *cobra.Command {
	return &cobra.Command{
		Use: job.ChildArg + " [IMAGE_ROOT_PARENT]", Hidden: true, Args: cobra.MaximumNArgs(1),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			cfg, err := config.LoadSidecar(args...)
			if err != nil {
				return ended(job.Refuse(cmd.Context(), cfg, deps(cfg), err))
			}
			return ended(job.Run(cmd.Context(), cfg, deps(cfg)))
		}),
	}
}

func newPackage() *cobra.Command {
	return &cobra.Command{
		Use: packageCommand, Hidden: true, Args: cobra.NoArgs,
		Short: "Package and publish the image root without waiting (legacy package_and_upload.sh)",
		RunE: work(func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadPackage()
			if err != nil {
				return ended(job.Refuse(cmd.Context(), cfg, deps(cfg), err))
			}
			return ended(job.Package(cmd.Context(), cfg, deps(cfg)))
		}),
	}
}

func newUpload() *cobra.Command {
	var req job.UploadRequest
	var prefix string
	var labels map[string]string
	c := &cobra.Command{
		Use:   "upload {--name NAME | --prefix PREFIX} --rootfs FILE",
		Short: "Upload and register an image that exists already",
		Long: `upload creates an IMS image record, uploads the files and a manifest to S3, and
links them. It prints the result as JSON. On failure neither objects nor record
are left. It needs the S3_… variables and, for IMS, IMS_URL and OAUTH_CONFIG_DIR.

With --prefix it has nothing to do with IMS, for boot services that take images
from a place in S3: the objects become PREFIX/rootfs, PREFIX/kernel,
PREFIX/initrd, PREFIX/boot_parameters and PREFIX/manifest.json, and each --label
metadata (x-amz-meta-KEY) of the artifacts. Nothing may exist below PREFIX.`,
		Example: `  sidecar upload --name debian-12 --rootfs image.sqsh --kernel vmlinuz --initrd initrd.img
  sidecar upload --prefix compute/debian/12.11 --label tag=12.11 --rootfs image.sqsh --kernel vmlinuz --initrd initrd.img`,
		Args: cobra.NoArgs,
		PreRunE: func(c *cobra.Command, _ []string) error {
			if (req.Name == "") == (prefix == "") || req.Rootfs == "" {
				return errors.New("upload: --rootfs and either --name or --prefix must be given")
			}
			if prefix == "" && len(labels) > 0 || prefix != "" && (c.Flags().Changed("job") || c.Flags().Changed("arch")) {
				return errors.New("upload: --label goes with --prefix, and --job and --arch with --name")
			}
			if prefix != "" {
				if err := upload.CheckPrefix(prefix); err != nil {
					return fmt.Errorf("upload: %w", err)
				}
			}
			for key := range labels {
				if err := upload.CheckMetadataKey(key); err != nil {
					return fmt.Errorf("upload: --label: %w", err)
				}
			}
			if req.Arch != config.ArchX86 && req.Arch != config.ArchARM {
				return fmt.Errorf("upload: --arch %q: must be %s or %s", req.Arch, config.ArchX86, config.ArchARM)
			}
			return nil
		},
		RunE: work(func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.LoadUpload()
			if err != nil {
				return err
			}
			if prefix != "" {
				return ended(job.UploadPlain(cmd.Context(), cfg, deps(cfg), prefix, labels, req))
			}
			return ended(job.Upload(cmd.Context(), cfg, deps(cfg), req))
		}),
	}
	f := c.Flags()
	f.StringVar(&req.Name, "name", "", "name of the new image")
	f.StringVar(&prefix, "prefix", "", "where in the bucket the objects go, without IMS")
	f.StringToStringVar(&labels, "label", nil, "KEY=VALUE, metadata of the objects; may be repeated")
	f.StringVar(&req.JobID, "job", "", "job to tell the image's id")
	f.StringVar(&req.Rootfs, "rootfs", "", "SquashFS image")
	f.StringVar(&req.Kernel, "kernel", "", "kernel")
	f.StringVar(&req.Initrd, "initrd", "", "initial RAM disk")
	f.StringVar(&req.Parameters, "parameters", "", "file with kernel parameters")
	f.StringVar(&req.Arch, "arch", config.ArchX86, "architecture: x86_64 or aarch64")
	return c
}

func newStatus() *cobra.Command {
	return &cobra.Command{
		Use:   "status JOB_ID STATUS",
		Short: "Set a job's status in IMS",
		Long: `status sets a job's status and prints the job record as JSON. IMS deletes the
Service and the volume of a job whose status becomes success or error.`,
		Example: `  sidecar status 221ce1dc-1886-460d-86d1-53ecd2260b73 error`,
		Args:    exactly("JOB_ID", "STATUS"),
		PreRunE: func(_ *cobra.Command, args []string) error {
			if uuid.Validate(args[0]) != nil {
				return fmt.Errorf("status: job id %q is not a UUID", args[0])
			}
			_, err := ims.ParseStatus(args[1])
			return err
		},
		RunE: work(func(cmd *cobra.Command, args []string) error {
			cfg, err := config.LoadStatus()
			if err != nil {
				return err
			}
			status, _ := ims.ParseStatus(args[1]) // PreRunE has checked it
			return ended(job.SetStatus(cmd.Context(), cfg, deps(cfg), args[0], status))
		}),
	}
}
