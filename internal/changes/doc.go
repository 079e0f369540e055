// SPDX-License-Identifier: Apache-2.0

// Package changes says what one SquashFS image changed against another: files,
// what about them, packages, and where the bytes went. A [Report] is written as
// text, as JSON (its fields are the schema, docs/changes.md) or as one HTML page.
//
// Two files are the same only if their bytes were compared; size, times and place
// in the image prove nothing. Packages are read from the databases of dpkg
// (status, status.d) and rpm (SQLite, NDB and Berkeley DB hashes) inside the
// images, with readers of our own: a database is as hostile as the image it lies
// in, and the library there is for rpm's parses in goroutines of its own, where a
// panic cannot be caught, follows pages in circles, and takes lengths on trust.
//
// The package refuses:
//
//   - Directories: pack them first. Their files could change meanwhile.
//   - To guess package changes from file names, or to run dpkg or rpm.
//   - rpm databases larger than 1 GiB, the write-ahead log of a SQLite database
//     that was not closed, and packages that a database holds in pieces that do
//     not fit together. A note in the report names what was left out.
//   - To look into files: a modified file is one line, whatever changed in it.
package changes
