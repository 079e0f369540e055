// SPDX-License-Identifier: Apache-2.0

// Package job is the sidecar's state machine: it opens the shell, waits for its
// end, packs the image root, publishes the image and tells IMS.
//
// # Sequence
//
//	customize:  CA, resolv.conf, sshd_config, authorized_keys
//	            ready ─▶ proven login ─▶ waiting_on_user ─▶ exiting seen
//	            resolv.conf restored; flag failed? ─▶ error, exit 0
//	            packaging_artifacts ─▶ boot files, store, space checked
//	            pack ─▶ image record ─▶ objects, manifest ─▶ link
//	            resultant_image_id ─▶ result on stdout ─▶ success, exit 0
//	create:     build_failed? ─▶ shell if ENABLE_DEBUG ─▶ error, exit 1
//	            else CA, then from packaging_artifacts on as above
//
// Every way out ends in a terminal status, and that PATCH is the last act: IMS
// deletes the job's Service and volume when it sees it. So the result is
// printed before it, as the legacy helper did, and the job record in it still
// says packaging_artifacts. Stdout holds exactly one JSON document for a job
// that packaged or failed. When only the last PATCH fails, that document says
// success, since the image is published and registered; the exit code is 1 and
// the log says what is missing.
//
// # Failure
//
// A failure takes back what was published: multipart uploads, objects, the
// image record. Signals and panics are failures. [Supervise] covers what a
// process cannot report of itself (the OOM killer, a runtime abort): it runs
// the job in a child and finishes for it.
//
// # Restart
//
// A state file beside the image root names the phase and the image record. A
// run that finds one of its own job goes on from there: it waits again, or
// takes the half-published image back and packs again, or only reports the
// result. The file is authenticated with the S3 secret, because a plain-mode
// user can write to the volume and it decides which objects are deleted.
//
// # Refusals
//
// Remote builds (REMOTE_BUILD_NODE) are refused at once: serving the empty
// local root instead would look like success. So is an image root that is a
// symbolic link: in plain mode its owner could point it at this container.
package job
