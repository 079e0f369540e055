// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// Object is something to store.
type Object struct {
	Key      string
	Body     io.ReaderAt // read more than once; must not change
	Size     int64
	MD5      string            // hex digest of the whole body; "" lets Put compute it
	Metadata map[string]string // values may be any text; "md5sum" is added by Put
	Progress func(n int64)     // n more bytes are acknowledged; nil for none; calls may overlap
	Bases    []*Base           // what need not be sent

	// Confirm, if set, is called when all is sent, and before the object comes
	// into being; an error of it ends the upload.
	Confirm func(context.Context) error
}

// Base is an object in the same bucket that has some of the same bytes, which the
// store can copy itself. It is used only when it is found there with its size and
// MD5, and what is copied is compared with the body.
type Base struct {
	Key  string
	Size int64
	MD5  string  // "" for that of the object to store, whose content it has
	Same []Range // in ascending order of To, apart from each other and from those of other bases there

	ahead bool // sent for this object and by nobody else; it can as well be sent again
}

// Range is a range of the base's object that stands in the new one.
type Range struct {
	From, To int64 // offsets in the base and in the new object
	N        int64
}

// afterwards is the context for cleaning up after a failure: bounded, and
// shorter when the caller's is gone already, since then the process has been
// told to end and may not have long.
func afterwards(ctx context.Context) (context.Context, context.CancelFunc) {
	d := time.Minute
	if ctx.Err() != nil {
		d = 6 * time.Second
	}
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// Put stores an object and returns what HEAD says about it afterwards. On
// error no multipart upload of it is left behind; the object itself may exist
// when the store completed it without our learning so in time.
func (s *S3) Put(ctx context.Context, o Object) (Info, error) {
	if o.MD5 == "" {
		sum, err := md5Of(ctx, o.Body, o.Size)
		if err != nil {
			return Info{}, fmt.Errorf("read %s: %w", s.URL(o.Key), err)
		}
		o.MD5 = sum
	}
	meta, err := encodeMetadata(o.Metadata, o.MD5)
	if err != nil {
		return Info{}, fmt.Errorf("upload %s: %w", s.URL(o.Key), err)
	}
	if o.Progress == nil {
		o.Progress = func(int64) {}
	}
	if o.Confirm == nil {
		o.Confirm = func(context.Context) error { return nil }
	}
	began, sent := time.Now(), o.Size
	o.Bases = slices.DeleteFunc(slices.Clone(o.Bases), func(b *Base) bool { return !s.usable(ctx, o, b) })
	if o.Size <= s.partSize && len(o.Bases) == 0 {
		err = s.putSingle(ctx, o, meta)
	} else {
		sent, err = s.putParts(ctx, o, meta)
	}
	if err != nil {
		return Info{}, err
	}
	info, err := s.Head(ctx, o.Key)
	if err != nil {
		return Info{}, fmt.Errorf("verify the upload: %w", err)
	}
	if !matches(info, o) {
		return Info{}, fmt.Errorf("verify the upload: %s has %d bytes and md5sum %q, sent were %d bytes and %q; check that nothing else writes to bucket %s",
			s.URL(o.Key), info.Size, info.Metadata["md5sum"], o.Size, o.MD5, s.bucket)
	}
	s.log.Info("object stored", "object", s.URL(o.Key), "bytes", o.Size, "sent", sent, "ms", time.Since(began).Milliseconds())
	return info, nil
}

func matches(info Info, o Object) bool {
	return info.Size == o.Size && info.Metadata["md5sum"] == o.MD5
}

// landed reports whether a request whose answer was an error did its work.
func (s *S3) landed(ctx context.Context, o Object) bool {
	out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: &o.Key})
	return err == nil && matches(Info{Size: aws.ToInt64(out.ContentLength), Metadata: out.Metadata}, o)
}

func (s *S3) putSingle(ctx context.Context, o Object, meta map[string]string) error {
	sum, err := hex.DecodeString(o.MD5)
	if err != nil {
		return fmt.Errorf("upload %s: MD5 %q is not hexadecimal", s.URL(o.Key), o.MD5)
	}
	if err := o.Confirm(ctx); err != nil {
		return err
	}
	err = s.retry(ctx, "upload "+s.URL(o.Key), func(ctx context.Context) error {
		began := time.Now()
		_, err := s.client.PutObject(ctx, &s3.PutObjectInput{
			Bucket: &s.bucket, Key: &o.Key, Metadata: meta, ContentType: aws.String(contentType),
			ContentMD5: aws.String(base64.StdEncoding.EncodeToString(sum)), ContentLength: aws.Int64(o.Size),
			Body: bodyOf(o, 0, o.Size),
		})
		if err == nil {
			s.speed.note(o.Size, began)
		}
		return err
	})
	if err == nil {
		o.Progress(o.Size)
	}
	return err
}

// bodyOf is a part as a body the SDK can rewind. Empty bodies must be of a type
// net/http knows to be empty, or it would send them chunked.
func bodyOf(o Object, off, n int64) io.ReadSeeker {
	if n == 0 {
		return bytes.NewReader(nil)
	}
	return io.NewSectionReader(o.Body, off, n)
}

// partSizeFor grows the part size with the object so that 10,000 parts hold it.
func partSizeFor(size, smallest int64) (int64, error) {
	const step = 1 << 20
	need := (size + maxParts - 1) / maxParts
	need = (need + step - 1) / step * step
	if need > maxPartSize {
		return 0, fmt.Errorf("%d bytes is more than an S3 object can hold (10,000 parts of 5 GiB)", size)
	}
	return max(need, smallest), nil
}

// putParts uploads in parts and returns how many bytes it had to send.
func (s *S3) putParts(ctx context.Context, o Object, meta map[string]string) (sent int64, err error) {
	op := "upload " + s.URL(o.Key)
	size, err := partSizeFor(o.Size+o.Size/5, s.partSize) // ranges begin and end with short parts
	if err != nil {
		return 0, fmt.Errorf("%s: %w", op, err)
	}
	id, err := s.begin(ctx, o.Key, meta)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			s.abort(ctx, o.Key, id)
		}
	}()
	t := &transfer{s: s, o: o, id: id, part: size, parts: map[int32]sentPart{},
		slots: make(chan struct{}, s.parallel), copying: make(chan struct{}, copyRequests)}
	if err := t.run(ctx, cut(o.Size, size, o.Bases)); err != nil {
		return 0, err
	}
	if err := o.Confirm(ctx); err != nil {
		return 0, err
	}
	if err := t.complete(ctx); err != nil {
		return 0, err
	}
	for _, p := range t.parts {
		if p.base == nil {
			sent += p.n
		}
	}
	return sent, nil
}

// usable reports whether copying from a base can work and pays.
func (s *S3) usable(ctx context.Context, o Object, b *Base) bool {
	if b == nil || !slices.ContainsFunc(cut(o.Size, s.partSize, []*Base{b}), func(p piece) bool { return p.base == b }) {
		return false
	}
	if b.ahead {
		return true
	}
	info, err := s.Head(ctx, b.Key)
	switch {
	case err != nil:
	case info.Size != b.Size || info.Metadata["md5sum"] != cmp.Or(b.MD5, o.MD5):
		err = errors.New("it is another object by now")
	default:
		return true
	}
	s.log.Info("all of the object is sent: the store cannot copy from the old one", "object", s.URL(o.Key), "old", s.URL(b.Key), "why", err)
	return false
}

func (s *S3) begin(ctx context.Context, key string, meta map[string]string) (string, error) {
	var id string
	err := s.retry(ctx, "begin the upload of "+s.URL(key), func(ctx context.Context) error {
		out, err := s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
			Bucket: &s.bucket, Key: &key, Metadata: meta, ContentType: aws.String(contentType),
		})
		if err != nil {
			return err
		}
		id = aws.ToString(out.UploadId)
		return nil
	})
	if err == nil && id == "" {
		err = fmt.Errorf("begin the upload of %s: the store gave no upload id; check that S3_ENDPOINT is an S3 store", s.URL(key))
	}
	return id, err
}

// complete assembles the parts. Whatever the answer, the object decides.
func (s *S3) complete(ctx context.Context, o Object, id string, parts []types.CompletedPart) error {
	return s.retry(ctx, "complete the upload of "+s.URL(o.Key), func(ctx context.Context) error {
		_, err := s.client.CompleteMultipartUpload(withPatience(ctx, completePatience), &s3.CompleteMultipartUploadInput{
			Bucket: &s.bucket, Key: &o.Key, UploadId: &id,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
		})
		if err != nil && ctx.Err() == nil && code(err) != "InvalidPart" && s.landed(ctx, o) {
			s.log.Warn("the store reported an error for an upload it has completed", "object", s.URL(o.Key), "error", code(err))
			return nil
		}
		return err
	})
}

func (s *S3) storedParts(ctx context.Context, key, id string) (map[int32]string, error) {
	stored := map[int32]string{}
	var marker *string
	for {
		var out *s3.ListPartsOutput
		err := s.retry(ctx, "list the parts of "+s.URL(key), func(ctx context.Context) (err error) {
			out, err = s.client.ListParts(ctx, &s3.ListPartsInput{Bucket: &s.bucket, Key: &key, UploadId: &id, PartNumberMarker: marker})
			return err
		})
		if err != nil {
			return nil, err
		}
		for _, p := range out.Parts {
			stored[aws.ToInt32(p.PartNumber)] = unquote(aws.ToString(p.ETag))
		}
		if !aws.ToBool(out.IsTruncated) || out.NextPartNumberMarker == nil || aws.ToString(out.NextPartNumberMarker) == aws.ToString(marker) {
			return stored, nil
		}
		marker = out.NextPartNumberMarker
	}
}

// abort gives an upload's parts back, whatever happened to ctx.
func (s *S3) abort(ctx context.Context, key, id string) {
	ctx, cancel := afterwards(ctx)
	defer cancel()
	err := s.retry(ctx, "abort the upload of "+s.URL(key), func(ctx context.Context) error {
		_, err := s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: &key, UploadId: &id})
		if c := code(err); c == "NoSuchUpload" || c == "NoSuchKey" {
			return nil
		}
		return err
	})
	if err != nil {
		s.log.Error("a multipart upload could not be aborted and keeps its space in the store; abort it by hand",
			"object", s.URL(key), "upload", id, "error", err)
	}
}

// AbortUploads aborts every unfinished multipart upload below prefix. Stores
// disagree about paging markers, so it lists the first page again and again
// until that is empty or stops changing.
func (s *S3) AbortUploads(ctx context.Context, prefix string) error {
	seen := map[string]bool{}
	for {
		var page *s3.ListMultipartUploadsOutput
		err := s.retry(ctx, "list unfinished uploads below "+s.URL(prefix), func(ctx context.Context) (err error) {
			page, err = s.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: &s.bucket, Prefix: &prefix})
			return err
		})
		if err != nil {
			return err
		}
		fresh := 0
		for _, u := range page.Uploads {
			if id := aws.ToString(u.UploadId); !seen[id] {
				seen[id] = true
				fresh++
				s.log.Info("aborting an unfinished upload", "object", s.URL(aws.ToString(u.Key)))
				s.abort(ctx, aws.ToString(u.Key), id)
			}
		}
		if fresh == 0 {
			return nil
		}
	}
}

// copyParts copies an object too large for CopyObject, in closed ranges.
func (s *S3) copyParts(ctx context.Context, source, to string, info Info) (err error) {
	size, err := partSizeFor(info.Size, 1<<30)
	if err != nil {
		return fmt.Errorf("copy to %s: %w", s.URL(to), err)
	}
	id, err := s.begin(ctx, to, info.Metadata)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.abort(ctx, to, id)
		}
	}()
	t := &transfer{s: s, o: Object{Key: to, Size: info.Size, MD5: info.Metadata["md5sum"]}, id: id, parts: map[int32]sentPart{}}
	for off := int64(0); off < info.Size; off += size {
		p := piece{number: int32(len(t.parts) + 1), off: off, n: min(size, info.Size-off)}
		var etag string
		err := s.retry(ctx, fmt.Sprintf("copy part %d to %s", p.number, s.URL(to)), func(ctx context.Context) (err error) {
			etag, err = s.copyRange(ctx, source, to, id, p)
			return err
		})
		if err != nil {
			return err
		}
		t.parts[p.number] = sentPart{p, etag}
	}
	return s.complete(ctx, t.o, id, t.completed())
}
