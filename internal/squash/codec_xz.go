// SPDX-License-Identifier: Apache-2.0

package squash

import (
	"errors"

	"github.com/ims-buildenv/ims-buildenv/internal/squash/internal/xz"
)

// xzDecompressor reads xz blocks with a decoder of our own, which
// docs/squashfs.md compares with liblzma, and leaves the streams that one does
// not know, as those of mksquashfs -Xbcj, to the library.
type xzDecompressor struct {
	plain xz.Decoder
	other decompressor
}

func newXZDecompressor() (decompressor, error) {
	other, err := newXZLibrary()
	if err != nil {
		return nil, err
	}
	return &xzDecompressor{other: other}, nil
}

// Decompress checks the headers' and the content's check sums.
func (x *xzDecompressor) Decompress(dst, src []byte) (int, error) {
	n, err := x.plain.Decode(dst, src)
	switch {
	case errors.Is(err, xz.ErrUnsupported):
		return x.other.Decompress(dst, src)
	case err != nil:
		return 0, corruptf("xz block: %v", err)
	}
	return n, nil
}
