// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"context"
	"io"
)

// Source is a tree to be packed: metadata, and where each file's bytes come
// from. It can be walked again. Contents are best opened in the order of the
// walk, and only one at a time.
type Source interface {
	// Walk calls fn for every name in the tree: the root first, each directory
	// before what is in it, the names of a directory in byte order. It ends
	// with the first error, its own or fn's. The entry is only valid during
	// the call; what its fields point to may be kept.
	Walk(ctx context.Context, fn func(*Entry) error) error
	// Close releases what the source holds. Contents cannot be opened after it.
	Close() error
}

// ContentKeeper is a Source that can bring a Content back from a few bytes. Of
// other sources the contents of all files are held in memory until they are read.
type ContentKeeper interface {
	// KeepContent appends what KeptContent needs.
	KeepContent(dst []byte, c Content) []byte
	// KeptContent takes from b what KeepContent appended for the file at path,
	// and returns the rest of b.
	KeptContent(path string, size int64, b []byte) (c Content, rest []byte)
}

// Entry is one name in a tree and the inode behind it.
type Entry struct {
	Path     string // slash-separated and relative to the root, which is "."
	Mode     uint32 // st_mode: type and permission bits
	UID, GID uint32
	Mtime    int64 // seconds since 1970, the precision the format has

	// Link is the same for all names of one inode. It is zero when the inode
	// has no other name.
	Link LinkID

	Size         int64   // regular files
	Holes        int64   // of Size, as far as it is known; only for guessing the image's length
	Content      Content // regular files
	Target       string  // symlinks
	Major, Minor uint32  // devices
	Xattrs       []Xattr // in any order

	// Note says what the user should know about how this entry was packed; it
	// ends up in Stats.Warnings.
	Note string
}

// LinkID identifies an inode within a source.
type LinkID struct{ Dev, Ino uint64 }

// Xattr is one extended attribute.
type Xattr struct {
	Name  string // with its prefix, such as "security.capability"
	Value []byte
}

// Content is where the bytes of one regular file come from.
type Content interface {
	// Open starts reading. It fails when the file is not any more what Walk saw.
	Open() (ContentReader, error)
}

// ContentReader reads a regular file. ReadAt and NextData are called for
// offsets within the entry's Size, ReadAt from several goroutines at a time.
type ContentReader interface {
	io.ReaderAt
	// NextData returns the first offset, from off on, that may hold anything
	// but zeroes. It returns the entry's Size when only zeroes follow.
	NextData(off int64) (int64, error)
	// Close ends reading. It fails when the file was changed meanwhile, in
	// which case nothing that was read may be used.
	Close() error
}
