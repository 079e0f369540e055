// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxMetadata is S3's limit for the keys and values of one object's user
// metadata together; versitygw refuses more with a 400.
const maxMetadata = 2 << 10

// ImageMetadata is what IMS wants to read on an image's objects. name may be any
// text; jobID is "" when no job is involved.
func ImageMetadata(id, name, jobID string) map[string]string {
	meta := map[string]string{"x-shasta-ims-image-id": id}
	if name != "" {
		meta["x-shasta-ims-image-name"] = shortened(name)
	}
	if jobID != "" {
		meta["x-shasta-ims-job-id"] = jobID
	}
	return meta
}

// CheckMetadataKey refuses what is no header name to every store, and what Put
// itself writes.
func CheckMetadataKey(key string) error {
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789-"
	if strings.Trim(key, allowed) != "" || key == "" || key == "md5sum" {
		return fmt.Errorf("metadata key %q: must be of small letters, digits and dashes, and not md5sum", key)
	}
	return nil
}

// encodeMetadata makes metadata fit for HTTP headers and adds the digest.
func encodeMetadata(meta map[string]string, md5sum string) (map[string]string, error) {
	out := map[string]string{"md5sum": md5sum}
	total := len("md5sum") + len(md5sum)
	for k, v := range meta {
		v = encodeWord(v)
		out[k] = v
		total += len(k) + len(v)
	}
	if total > maxMetadata {
		return nil, fmt.Errorf("%d bytes of metadata, the store allows %d; use a shorter image name", total, maxMetadata)
	}
	return out, nil
}

// encodeWord returns plain text as it is and anything else as RFC 2047 encoded
// words, which is also how S3 itself returns such metadata. Signatures trim
// spaces and fold runs of them, so text with those is not plain either.
func encodeWord(s string) string {
	plain := strings.TrimSpace(s) == s && !strings.Contains(s, "  ") && !strings.Contains(s, "=?")
	for i := 0; plain && i < len(s); i++ {
		plain = s[i] >= ' ' && s[i] < 0x7f
	}
	if plain {
		return s
	}
	s = strings.ToValidUTF8(s, "�")
	const chunk = 45 // 60 characters of base64: an encoded word may have 75
	var words []string
	for len(s) > 0 {
		n := min(chunk, len(s))
		for n < len(s) && !utf8.RuneStart(s[n]) {
			n--
		}
		words = append(words, "=?UTF-8?B?"+base64.StdEncoding.EncodeToString([]byte(s[:n]))+"?=")
		s = s[n:]
	}
	return strings.Join(words, " ")
}

// shortened cuts a name so that its encoded form fits beside the other
// metadata of an artifact.
func shortened(name string) string {
	const room = maxMetadata - 512
	for len(encodeWord(name)) > room {
		_, n := utf8.DecodeLastRuneInString(name)
		name = name[:len(name)-n]
	}
	return name
}

// md5Of reads size bytes once and returns their digest in hex.
func md5Of(ctx context.Context, r io.ReaderAt, size int64) (string, error) {
	h := md5.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
		h.Write(buf[:n])
		off += int64(n)
		if err != nil && !(err == io.EOF && off == size) {
			if err == io.EOF {
				err = fmt.Errorf("%w at byte %d of %d: the file became shorter", io.ErrUnexpectedEOF, off, size)
			}
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
