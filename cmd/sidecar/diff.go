// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/ims-buildenv/ims-buildenv/internal/changes"
)

func newDiff() *cobra.Command {
	var asJSON bool
	var page string
	c := &cobra.Command{
		Use:   "diff [flags] OLD NEW",
		Short: "Show what one SquashFS image changed against another",
		Long: `diff compares two images: packages of dpkg and rpm, and every name with its
content, mode, owner, times, extended attributes and links. Files that are the
same are read in their compressed form where the images allow it.

Signs: + added, - removed, ~ modified, > renamed, ^ upgraded, v downgraded.
Text lists the heaviest changes; --json (docs/changes.md) and --html have all.
Directories are not compared: pack them first.`,
		Example: `  sidecar diff base.sqsh new.sqsh
  sidecar diff --json base.sqsh new.sqsh | jq .summary
  sidecar diff --html changes.html base.sqsh new.sqsh`,
		Args: exactly("OLD", "NEW"),
		RunE: work(func(cmd *cobra.Command, args []string) error {
			old, closeOld, err := openImage(args[0])
			if err != nil {
				return err
			}
			defer closeOld()
			next, closeNext, err := openImage(args[1])
			if err != nil {
				return err
			}
			defer closeNext()
			report, err := changes.Compare(cmd.Context(), changes.Side{Name: args[0], Image: old}, changes.Side{Name: args[1], Image: next}, changes.Options{})
			if err != nil {
				return err
			}
			if page != "" {
				if err := writePage(page, report); err != nil {
					return err
				}
			}
			switch {
			case asJSON:
				return report.WriteJSON(os.Stdout)
			case page == "":
				return report.WriteText(os.Stdout)
			}
			return nil
		}),
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	c.Flags().StringVar(&page, "html", "", "file to write a page for browsers to, instead of text")
	return c
}

func writePage(path string, report *changes.Report) error {
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if err := report.WriteHTML(f); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}
