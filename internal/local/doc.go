// SPDX-License-Identifier: Apache-2.0

// Package local is what imslocal is made of: the world around an IMS customize
// job on one machine. It holds
//
//   - the IMS REST API (public keys, images, jobs; unversioned, /v2 and /v3) and
//     the OAuth2 token endpoint beside it (api*.go, state.go);
//   - a real S3 server, versitygw in a child process (s3server.go);
//   - the process runner, which runs the containers of a job's pod as processes
//     in namespaces of their own, with the environment and the mounts of the IMS
//     job template (runner*.go, pod.go, container*.go); or no runner, when
//     somebody else starts the pods;
//   - the two commands, Serve and Run.
//
// Answers of the API follow the real service as measured, its odd corners
// included (testdata/transcript.json), because what works against imslocal is
// meant to work in production.
//
// Not here: recipes and create jobs (no recipe record can exist, so a create job
// is always refused), remote build nodes (the list is empty), Kubernetes (the
// runner of that name is refused), more than one server on a data directory (a
// lock keeps the second one out), and any protection from a user who is root on
// this machine: the containers bound what a job can break by accident, and carry
// the capabilities the pod would have, but they share the host's network, users
// and kernel settings.
package local
