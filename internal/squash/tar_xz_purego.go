// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package squash

import (
	"io"

	"github.com/ulikunitz/xz"
)

// newXZReader decodes a whole .xz file, checking its check sums.
func newXZReader(r io.Reader) (io.ReadCloser, error) {
	x, err := xz.NewReader(r)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(x), nil
}
