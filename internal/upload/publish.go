// SPDX-License-Identifier: Apache-2.0

package upload

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sync/errgroup"
)

// Store is what a transaction needs of a store.
//
// Put must leave no unfinished upload of its own on error; Delete and
// AbortUploads must succeed when there is nothing to do. List may be refused.
type Store interface {
	URL(key string) string
	Put(ctx context.Context, o Object) (Info, error)
	SendAhead(ctx context.Context, key string, body io.ReaderAt, p *Pending) *Base
	List(ctx context.Context, prefix string) ([]Info, error)
	Delete(ctx context.Context, keys ...string) error
	AbortUploads(ctx context.Context, prefix string) error
}

// Kind says which part of an image an artifact is; it is also its object's name.
type Kind string

// The parts of an image, in the order they are uploaded.
const (
	Rootfs         Kind = "rootfs"
	Kernel         Kind = "kernel"
	Initrd         Kind = "initrd"
	BootParameters Kind = "boot_parameters"
	manifest       Kind = "manifest.json"
	ahead          Kind = "rootfs.ahead" // what was sent of the rootfs before it was whole; deleted when that is stored
)

var order = []Kind{Rootfs, Kernel, Initrd, BootParameters}

// mediaTypes are the manifest's names for the kinds.
var mediaTypes = map[Kind]string{
	Rootfs:         "application/vnd.cray.image.rootfs.squashfs",
	Kernel:         "application/vnd.cray.image.kernel",
	Initrd:         "application/vnd.cray.image.initrd",
	BootParameters: "application/vnd.cray.image.parameters.boot",
	manifest:       "application/json",
}

// Artifact is one file of an image. Body is read more than once and must not
// change until Publish returns.
type Artifact struct {
	Kind    Kind
	Body    io.ReaderAt
	Size    int64
	Base    *Base    // nil: everything is sent
	Pending *Pending // nil: Body is whole; otherwise Size and Base come from it
}

// Request is an image to publish.
type Request struct {
	Prefix    string            // what the objects' keys begin with, without the slash behind it: "<image id>" for IMS
	Metadata  map[string]string // of each artifact's object, see Put
	Artifacts []Artifact
	Progress  func(kind Kind, done, total int64) // nil for none; not called concurrently
	Log       *slog.Logger                       // nil: silent
}

// Link points at an object, as IMS and the manifest spell it.
type Link struct {
	ETag string `json:"etag"`
	Path string `json:"path"`
	Type string `json:"type"`
}

// Entry is an artifact as the manifest lists it. Fields are in the order of
// their names, which the manifest's readers are used to.
type Entry struct {
	Link Link   `json:"link"`
	MD5  string `json:"md5"`
	Type string `json:"type"`
}

type manifestFile struct {
	Artifacts []Entry `json:"artifacts"`
	Created   string  `json:"created"`
	Version   string  `json:"version"`
}

// Result is a published image.
type Result struct {
	Artifacts []Entry // in upload order, the manifest last
	Manifest  Link
}

// Publish uploads an image's artifacts and then its manifest. On error nothing
// is left below the prefix, which therefore must be the image's own; what could
// not be removed is logged, and the returned error stays the original one.
func Publish(ctx context.Context, store Store, r Request) (res Result, err error) {
	if err := r.check(); err != nil {
		return Result{}, err
	}
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := afterwards(ctx)
		defer cancel()
		if rerr := Remove(ctx, store, r.Prefix); rerr != nil && r.Log != nil {
			r.Log.Error("objects of a failed upload could not be removed; delete them by hand", "below", store.URL(r.Prefix+"/"), "error", rerr)
		}
	}()
	if err := store.AbortUploads(ctx, r.Prefix+"/"); err != nil && !mayNotList(err) {
		return Result{}, err
	}
	artifacts := slices.Clone(r.Artifacts)
	slices.SortStableFunc(artifacts, func(a, b Artifact) int {
		return cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind))
	})
	if res.Artifacts, err = r.putAll(ctx, store, artifacts); err != nil {
		return Result{}, err
	}
	body, err := encodeManifest(res.Artifacts, time.Now())
	if err != nil {
		return Result{}, err
	}
	entry, err := r.put(ctx, store, Artifact{Kind: manifest, Body: bytes.NewReader(body), Size: int64(len(body))}, nil, new(sync.Mutex))
	if err != nil {
		return Result{}, err
	}
	res.Artifacts = append(res.Artifacts, entry)
	res.Manifest = entry.Link
	return res, nil
}

// maxPrefix leaves room in a key, which may have 1,024 bytes, for the names below it.
const maxPrefix = 1000

// CheckPrefix refuses prefixes of keys that some store, or a URL, would take for others.
func CheckPrefix(prefix string) error {
	if !fs.ValidPath(prefix) || prefix == "." || len(prefix) > maxPrefix || strings.ContainsFunc(prefix, unicode.IsControl) || strings.Contains(prefix, `\\`) {
		return fmt.Errorf("key prefix %q: must be names with slashes between them, not . or .., of %d bytes at most", prefix, maxPrefix)
	}
	return nil
}

func (r Request) check() error {
	if err := CheckPrefix(r.Prefix); err != nil {
		return err
	}
	rootfs := 0
	for _, a := range r.Artifacts {
		if !slices.Contains(order, a.Kind) {
			return fmt.Errorf("publish image %s: unknown artifact %q", r.Prefix, a.Kind)
		}
		if a.Kind == Rootfs {
			rootfs++
		}
	}
	if rootfs != 1 {
		return fmt.Errorf("publish image %s: %d root file systems, IMS wants exactly one", r.Prefix, rootfs)
	}
	return nil
}

// putAll uploads the small artifacts while the root file system is being made or
// on its way.
func (r Request) putAll(ctx context.Context, store Store, artifacts []Artifact) ([]Entry, error) {
	entries := make([]Entry, len(artifacts))
	var progress sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	put := func(ctx context.Context, i int) (err error) {
		entries[i], err = r.put(ctx, store, artifacts[i], r.Metadata, &progress)
		return err
	}
	g.Go(func() error { return guard(func() error { return put(ctx, 0) }) })
	g.Go(func() error {
		return guard(func() error {
			for i := range artifacts[1:] {
				if err := put(ctx, i+1); err != nil {
					return err
				}
			}
			return nil
		})
	})
	return entries, g.Wait()
}

// guard turns a panic into an error, so that what was uploaded is taken back.
func guard(do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v\n%s", p, debug.Stack())
		}
	}()
	return do()
}

func (r Request) put(ctx context.Context, store Store, a Artifact, meta map[string]string, progress *sync.Mutex) (Entry, error) {
	key := r.Prefix + "/" + string(a.Kind)
	o := Object{Key: key, Body: a.Body}
	sentAhead := func() *Base { return nil }
	if a.Pending != nil {
		sentAhead = r.sendAhead(ctx, store, a)
		defer sentAhead() // nothing of it is under way any more when the caller cleans up
		var err error
		if a.Size, a.Base, err = a.Pending.await(ctx); err != nil {
			return Entry{}, err
		}
		o.Confirm = a.Pending.confirmed
	}
	sum, err := md5Of(ctx, a.Body, a.Size)
	if err != nil {
		return Entry{}, fmt.Errorf("read the %s to upload: %w", a.Kind, err)
	}
	o.Size, o.MD5, o.Metadata = a.Size, sum, meta
	for _, b := range []*Base{a.Base, sentAhead()} {
		if b != nil {
			o.Bases = append(o.Bases, b)
		}
	}
	if r.Progress != nil {
		var done int64
		o.Progress = func(n int64) {
			progress.Lock()
			defer progress.Unlock()
			done += n
			r.Progress(a.Kind, done, a.Size)
		}
		o.Progress(0)
	}
	info, err := store.Put(ctx, o)
	if err != nil {
		return Entry{}, err
	}
	if b := sentAhead(); b != nil {
		if err := store.Delete(ctx, b.Key); err != nil && r.Log != nil {
			r.Log.Warn("what was sent of the image before it was whole could not be deleted; delete it by hand", "object", store.URL(b.Key), "error", err)
		}
	}
	return Entry{Link: Link{ETag: info.ETag, Path: store.URL(key), Type: "s3"}, MD5: sum, Type: mediaTypes[a.Kind]}, nil
}

// sendAhead begins to send a body that is being made, and returns what waits for
// the end of that.
func (r Request) sendAhead(ctx context.Context, store Store, a Artifact) (wait func() *Base) {
	ready := make(chan *Base, 1)
	go func() {
		var b *Base
		err := guard(func() error {
			b = store.SendAhead(ctx, r.Prefix+"/"+string(ahead), a.Body, a.Pending)
			return nil
		})
		if err != nil && r.Log != nil {
			r.Log.Error("nothing is sent before the image is whole", "error", err)
		}
		ready <- b
	}()
	return sync.OnceValue(func() *Base { return <-ready })
}

// encodeManifest writes the manifest as the legacy uploader does: keys sorted,
// four spaces, local time with microseconds and no zone.
func encodeManifest(entries []Entry, now time.Time) ([]byte, error) {
	return json.MarshalIndent(manifestFile{
		Artifacts: entries, Created: now.Format("2006-01-02 15:04:05.000000"), Version: "1.0",
	}, "", "    ")
}

// Remove takes everything of an image out of the store: unfinished uploads and
// objects. It goes on after errors and returns them all.
func Remove(ctx context.Context, store Store, prefix string) error {
	if err := CheckPrefix(prefix); err != nil {
		return fmt.Errorf("remove image objects: %w", err)
	}
	prefix += "/"
	var errs []error
	if err := store.AbortUploads(ctx, prefix); err != nil && !mayNotList(err) {
		errs = append(errs, err)
	}
	// The known names are deleted even when the store refuses to list.
	keys := map[string]bool{prefix + string(manifest): true, prefix + string(ahead): true}
	for _, k := range order {
		keys[prefix+string(k)] = true
	}
	found, err := store.List(ctx, prefix)
	switch {
	case err == nil:
		clear(keys)
	case !mayNotList(err):
		errs = append(errs, err)
	}
	for _, info := range found {
		keys[info.Key] = true
	}
	for key := range keys {
		errs = append(errs, store.Delete(ctx, key))
	}
	return errors.Join(errs...)
}

// mayNotList reports whether the keys are good for their objects only, or the store cannot list. What was written under a
// known name is then removed all the same, and each upload has aborted its own parts.
func mayNotList(err error) bool { return code(err) == "AccessDenied" || code(err) == "NotImplemented" }
