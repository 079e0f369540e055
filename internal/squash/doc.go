// SPDX-License-Identifier: Apache-2.0

// Package squash reads and writes SquashFS 4.0 images.
//
// It knows all fourteen inode kinds (seven basic, seven extended), hard links,
// sparse files, the user, trusted and security extended attributes with shared
// and out-of-line values, fragments, the export table, directory indexes, the
// id table, and block sizes from 4 KiB to 1 MiB. The layout is the one of the
// kernel's fs/squashfs/squashfs_fs.h; numbers without another source come from
// there.
//
// An image is input from strangers. Every length, offset and count in it is
// checked before it is used or allocated for; a directory reached twice, a
// name that could leave its directory, and a block that decompresses beyond
// its size are errors that unwrap to [ErrCorrupt].
//
// What the package refuses:
//
//   - SquashFS before 4.0, and big-endian images.
//   - Writing LZMA and LZO images. Builds without cgo do not read xz images
//     with filters beside LZMA2 (mksquashfs -Xbcj).
//   - Directories nested more than 4096 deep, a directory with two names, and an
//     inode with more names than a link count of one: such an image is no tree.
//   - Names longer than 256 bytes, symlink targets longer than 65,535 bytes,
//     more than 65,535 different user and group ids: the format cannot hold
//     them, so writing them is an error that names the path and the limit.
//   - A tree, or a tar archive, that changes while it is packed.
//   - Tar archives with entries that lead out of the tree, hard links to what
//     is not there, and entries an image has no place for.
//   - Appending to an image.
//
// Two losses are reported by path in [Stats], not refused, because roots in the
// field have them: modification times outside 1970..2106 are moved to the
// nearest end, and extended attributes outside user., trusted. and security.,
// such as POSIX ACLs, are left out.
//
// Compression is done by libdeflate, libzstd, liblzma and liblz4, linked
// statically by cgo, or by Go libraries in builds without it: each reads what
// the other writes, but packs the same tree to other bytes. [Implementations]
// tells which ones a binary has. What reads xz is internal/xz.
//
// The package knows nothing of where an image comes from or goes to.
package squash
