// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package xz

func (l *lzma) decode(dst []byte, out int, in []byte, pos int) (int, bool) {
	return l.decodeGo(dst, out, in, pos)
}
