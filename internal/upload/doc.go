// SPDX-License-Identifier: Apache-2.0

// Package upload brings an image's artifacts to an S3 store and takes them away
// again when something fails.
//
// [S3] is the store: Ceph RGW, versitygw or AWS behind the same few calls.
// [Publish] is the transaction on top of it: rootfs, kernel, initrd and boot
// parameters, then manifest.json, or nothing at all.
//
// # What is promised
//
// An object counts as uploaded when a HEAD after the transfer shows its size
// and its md5sum metadata. Content-MD5 goes with every body, so a store never
// keeps bytes that were damaged on the way. A CompleteMultipartUpload that fails
// or times out may have worked (Ceph answers 500 for an upload it has already
// completed), so the object is looked at before anything is repeated.
//
// Retries are bounded by time since the first failure of one request, with
// growing randomized pauses, and only for what can succeed again. There is no
// total timeout: an image may take hours. A transfer that moves no byte for
// S3Config.StallTimeout is cut and tried again.
//
// # What is not sent
//
// With a [Base], an object in the same bucket that has some of the same bytes,
// the store copies those (UploadPartCopy) in a few large ranges and only the
// rest travels. Nothing the store says of the base is relied on:
// the ETag of each part it makes must be the MD5 of the same range of the body.
// What cannot be copied, for whatever reason, is sent.
//
// # What is sent early
//
// A [Pending] artifact is still being made while the others are uploaded. Its
// digest is metadata that an upload begins with, and cannot be added later: Ceph
// releases exist that lose an object's data some hours after it was copied onto
// itself for new metadata (tracker.ceph.com/issues/70746). So its parts are sent
// as they are made to an object beside it, which becomes one more base; but only
// over a network so slow that this pays.
//
// # Dialect
//
// Path-style addresses; no SDK checksum headers or trailers unless the protocol
// requires one (old RGW answers 400); Content-MD5 instead; metadata keys with
// dashes only and at most 2 kB; text that is not plain ASCII is sent as RFC 2047
// encoded words; closed copy ranges; single-object deletes, since the batch call
// requires a checksum; no paging markers on multipart listings, which every
// store treats differently.
//
// # Refusals
//
// No anonymous access, no virtual-hosted buckets, no server-side encryption
// keys, no credentials from the environment or from instance metadata.
package upload
