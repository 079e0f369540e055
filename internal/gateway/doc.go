// SPDX-License-Identifier: Apache-2.0

// Package gateway is the SSH server of a customize job: it lets the owner of the job's
// keys in as root, runs what they ask for in the jail (package jail), and ends everything
// when the flag files say so.
//
// gliderlabs/ssh carries connections, authentication and global requests; the session
// channel is this package's own, because exit codes, signals, terminals and the order of
// the last messages must be what OpenSSH's are.
//
// Rules that hold everywhere here:
//
//   - Who somebody is comes only from the Permissions of the key that was proven, never
//     from a key that was offered or from a connection's context.
//   - The daemon never opens a path inside the image root; the jail's children do.
//   - A command without a terminal is not tied to its connection: when the client goes
//     away its pipes close and it runs on. A terminal is hung up.
//   - The end of a session on the wire is: all output, exit-status or exit-signal, EOF,
//     close. When a background process keeps the output open, exit-status goes out as
//     soon as what the command itself wrote has been sent, and the channel stays open.
//   - Payloads, environments and keystrokes are never logged.
//
// Forwarding permits what OpenSSH's sshd permits. TCP is the gateway's own, in the pod's
// network, which the sessions share; Unix sockets are made and connected by the jail.
//
// Refused: passwords, users other than root, X11, tunnels, certificates and keys that
// demand that the authenticator verified its user (the SSH library does not tell).
package gateway
