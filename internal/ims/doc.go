// SPDX-License-Identifier: Apache-2.0

// Package ims is the client of the Image Management Service's REST API: the
// few calls a build job needs, on the unversioned paths the service's own
// Python helper uses (https://github.com/Cray-HPE/ims, /images, /jobs,
// /public-keys), with OAuth2 client credentials when a token endpoint is
// configured.
//
// # Retries
//
// Every call has one budget, Config.Timeout, shared by all its attempts. Tried
// again, with growing randomized pauses, is only what can succeed again: a
// connection that broke, 429 and every 5xx. 500 is among them because the
// service answers it when deleting the Kubernetes objects of a finished job
// failed, and leaves the status unchanged. A 401 makes the client ask for a new
// token, once per call. Every other answer fails at once with the service's own
// explanation (problem+json, RFC 7807).
//
// GET, PATCH and DELETE are idempotent in this API: the same link, status or
// resulting image may be set again, and a DELETE that finds nothing has
// succeeded. POST is not. When the fate of a POST is unknown (the answer was
// lost, or a proxy gave up on it) the record may exist, and no list can tell
// ours from one that another job with the same image name has just made.
// Adopting a stranger's record would let two jobs upload over each other, so the
// client never does that: it repeats the POST, at most twice, and says in the
// log that an empty duplicate may be left.
//
// # Refusals
//
// No redirects (net/http would turn a PATCH into a GET), no answers above
// 16 MiB, no token, secret or URL query in an error or a log line.
package ims
