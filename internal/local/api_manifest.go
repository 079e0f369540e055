// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"
	"time"
	"unicode/utf8"
)

// maxManifest is the service's limit: a manifest of this size is refused.
const maxManifest = 1 << 20

// rootfsType opens the type of a manifest's root file system artifact.
const rootfsType = "application/vnd.cray.image.rootfs.squashfs"

const rerun = "Determine the specific information that is missing or invalid and then re-run the request with valid information."
const pleaseRerun = "Please determine the specific information that is missing or invalid and then re-run the request with valid information."

var (
	errTooLarge = errors.New("object larger than the limit")
	// errUnreadable marks a manifest that is no UTF-8 or no JSON. v2 of the
	// service fails on it, v3 logs it and takes the link all the same.
	errUnreadable = errors.New("manifest cannot be read")
	// errBadPath marks a link whose path names no bucket; the service fails.
	errBadPath = errors.New("link path names no bucket")
)

// refusal is an error that is an answer.
type refusal struct {
	status int
	detail string
}

func (r refusal) Error() string { return r.detail }

func unprocessable(detail string) error { return refusal{http.StatusUnprocessableEntity, detail} }

// refuse answers with the refusal in err, or with 500.
func (a *api) refuse(c *call, err error) {
	var r refusal
	if errors.As(err, &r) {
		a.problem(c, r.status, r.detail, nil)
		return
	}
	a.internal(c, err)
}

// splitS3 takes an s3://bucket/key path apart.
func splitS3(p string) (bucket, key string, err error) {
	rest, ok := strings.CutPrefix(p, "s3://")
	bucket, key, _ = strings.Cut(rest, "/")
	key = strings.TrimLeft(key, "/")
	if !ok || bucket == "" || key == "" {
		return "", "", errBadPath
	}
	return bucket, key, nil
}

// headLink sees that the object of a link exists. quoted is the link as the
// caller wrote it, for the error text.
func (a *api) headLink(ctx context.Context, l Link, quoted string) (objectInfo, error) {
	bucket, key, err := splitS3(l.Path)
	if err != nil {
		return objectInfo{}, err
	}
	info, err := a.objects.head(ctx, bucket, key)
	if err != nil {
		a.log.Info("link cannot be validated", "path", l.Path, "error", err)
		return objectInfo{}, unprocessable("The s3 artifact " + quoted + " cannot be validated. " + pleaseRerun)
	}
	if l.Etag != "" && l.Etag != info.etag {
		a.log.Warn("object has another etag than its link", "path", l.Path, "etag", info.etag, "link_etag", l.Etag)
	}
	return info, nil
}

// manifest is a manifest.json taken apart only as far as the service does, so
// that it fails on the same things.
type manifest struct {
	members *object
}

func (a *api) readManifest(ctx context.Context, l Link, quoted string) (manifest, error) {
	bucket, key, err := splitS3(l.Path)
	if err != nil {
		return manifest{}, err
	}
	b, err := a.objects.get(ctx, bucket, key, maxManifest)
	if errors.Is(err, errTooLarge) {
		return manifest{}, refusal{http.StatusBadRequest, "Image manifest file is larger than the expected maximum size for the s3 artifact " + quoted + ". " + pleaseRerun}
	}
	if err != nil {
		return manifest{}, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	if !utf8.Valid(b) {
		return manifest{}, fmt.Errorf("%w: not UTF-8", errUnreadable)
	}
	v, err := decodeValue(b)
	if err != nil {
		return manifest{}, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	o, ok := v.(*object)
	if !ok && !empty(v) {
		return manifest{}, fmt.Errorf("%w: not a JSON object", errUnreadable)
	}
	return manifest{o}, nil
}

// checkManifest is what the service checks before an image gets its link.
func (a *api) checkManifest(c *call, l Link, quoted string) error {
	for _, other := range a.state.images.all() {
		if other.Link != nil && other.Link.Path == l.Path {
			return unprocessable(fmt.Sprintf("The link path %s matches the link path for the IMS image record %s. The link value must be unique and cannot be duplicated. %s", l.Path, other.ID, rerun))
		}
	}
	if _, err := a.headLink(c.ctx(), l, quoted); err != nil {
		return err
	}
	m, err := a.readManifest(c.ctx(), l, quoted)
	if errors.Is(err, errUnreadable) && c.v3 && c.r.Method == http.MethodPatch {
		a.log.Warn("manifest cannot be read; the link is taken all the same, as the v3 service does", "path", l.Path, "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	if m.members == nil || len(m.members.keys) == 0 {
		return nil // the service takes an empty manifest
	}
	version, ok := m.members.vals["version"]
	if !ok {
		return unprocessable("The image's manifest.json does not contain a version field.")
	}
	if version != "1.0" {
		return unprocessable("The image's manifest.json has a version that is not supported. Supported image manifest versions are: 1.0")
	}
	return a.checkArtifacts(c, m, quoted)
}

func malformed(text string) error {
	return unprocessable("The image's manifest.json is malformed. " + text)
}

func (a *api) checkArtifacts(c *call, m manifest, quoted string) error {
	raw, ok := m.members.vals["artifacts"]
	if !ok {
		return malformed("It does not contain an artifacts map.")
	}
	artifacts, ok := raw.([]any)
	if !ok {
		return malformed("The artifacts property is not a json list.")
	}
	rootfs, untyped := 0, false
	for _, e := range artifacts {
		artifact, ok := e.(*object)
		if !ok {
			return malformed("A listed artifact is not a json dictionary.")
		}
		l, err := artifactLink(artifact)
		if err != nil {
			return err
		}
		if _, err := a.headLink(c.ctx(), l, pyRepr(artifact.vals["link"])); err != nil {
			return err
		}
		kind, ok := artifact.vals["type"].(string)
		untyped = untyped || !ok
		if strings.HasPrefix(kind, rootfsType) {
			rootfs++
		}
	}
	switch {
	case untyped:
		return malformed("An artifact does not have a type field")
	case rootfs == 0:
		return refusal{http.StatusBadRequest, "Error reading the manifest.json for IMS " + quoted + ". The manifest does not include any rootfs artifacts. " + rerun}
	case rootfs > 1:
		return refusal{http.StatusBadRequest, "Error reading the manifest.json for " + quoted + ". The manifest includes multiple rootfs artifacts. " + rerun}
	}
	return nil
}

// artifactLink reads the link of a manifest's artifact.
func artifactLink(artifact *object) (Link, error) {
	raw, ok := artifact.vals["link"]
	if !ok {
		return Link{}, malformed("An artifact does not have a link value")
	}
	o, ok := raw.(*object)
	if !ok {
		return Link{}, fmt.Errorf("artifact link %s is no object", pyRepr(raw))
	}
	kind, ok := o.vals["type"]
	if !ok {
		return Link{}, malformed("An artifact does not have a link type field")
	}
	if kind != "s3" {
		return Link{}, malformed("An artifact link type '" + fmt.Sprint(kind) + "' not supported")
	}
	p, ok := o.vals["path"].(string)
	if !ok {
		return Link{}, malformed("An artifact does not have a link path field")
	}
	etag, _ := o.vals["etag"].(string)
	return Link{Path: p, Etag: etag, Type: "s3"}, nil
}

// artifactsOf lists the artifacts of a manifest that have a usable link; others
// are logged, as the service does when it deletes.
func (a *api) artifactsOf(m manifest, imageID string) []*object {
	var out []*object
	if m.members == nil {
		return nil
	}
	list, _ := m.members.vals["artifacts"].([]any)
	for _, e := range list {
		artifact, ok := e.(*object)
		if ok {
			_, err := artifactLink(artifact)
			ok = err == nil
		}
		if !ok {
			a.log.Warn("malformed artifact in manifest", "image_id", imageID, "artifact", pyRepr(e))
			continue
		}
		out = append(out, artifact)
	}
	return out
}

// deleteObjects removes the objects of a manifest and the manifest. Objects that
// cannot be removed are logged: the record goes in any case.
func (a *api) deleteObjects(c *call, imageID string, l Link) error {
	m, err := a.readManifest(c.ctx(), l, l.quoted())
	if errors.Is(err, errUnreadable) {
		a.log.Warn("manifest cannot be read; its objects stay", "image_id", imageID, "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	for _, artifact := range a.artifactsOf(m, imageID) {
		al, _ := artifactLink(artifact)
		a.removeObject(c.ctx(), al)
	}
	a.removeObject(c.ctx(), l)
	return nil
}

func (a *api) removeObject(ctx context.Context, l Link) {
	bucket, key, err := splitS3(l.Path)
	if err == nil {
		err = a.objects.remove(ctx, bucket, key)
	}
	if err != nil {
		a.log.Warn("object was not deleted", "path", l.Path, "error", err)
	}
}

// move renames an object within its bucket and returns the new link.
func (a *api) move(ctx context.Context, l Link, rename func(key string) string) (Link, error) {
	bucket, key, err := splitS3(l.Path)
	if err != nil {
		return Link{}, err
	}
	to := rename(key)
	etag, err := a.objects.copy(ctx, bucket, key, to)
	if err != nil {
		return Link{}, err
	}
	a.removeObject(ctx, l)
	return Link{Path: "s3://" + bucket + "/" + to, Etag: etag, Type: "s3"}, nil
}

// deletedManifest is deleted_manifest.json: where the objects of a soft-deleted
// image went. Member order as the service writes it.
type deletedManifest struct {
	Version   string            `json:"version"`
	Created   string            `json:"created"`
	Artifacts []deletedArtifact `json:"artifacts"`
}

type deletedArtifact struct {
	Type string      `json:"type"`
	MD5  string      `json:"md5,omitempty"`
	Link deletedLink `json:"link"`
}

// deletedLink is a Link with the members in the order of that file.
type deletedLink struct {
	Etag string `json:"etag"`
	Path string `json:"path"`
	Type string `json:"type"`
}

const originalManifest = "application/vnd.cray.image.manifest"

// softDelete moves the objects of an image below deleted/ and stores the record
// among the deleted ones.
func (a *api) softDelete(c *call, image Image) error {
	at := time.Now()
	image.Deleted = at.Format(timestamp)
	if image.Link != nil {
		m, err := a.readManifest(c.ctx(), *image.Link, image.Link.quoted())
		switch {
		case errors.Is(err, errUnreadable):
			a.log.Warn("manifest cannot be read; its objects stay", "image_id", image.ID, "error", err)
		case err != nil:
			return err
		default:
			link, err := a.setAside(c.ctx(), image, m, at)
			if err != nil {
				return err
			}
			image.Link = link
		}
	}
	return a.state.deletedImages.put(image)
}

func (a *api) setAside(ctx context.Context, image Image, m manifest, at time.Time) (*Link, error) {
	aside := func(key string) string { return path.Join("deleted", key) }
	record := deletedManifest{Version: "1.0", Created: at.Format(time.DateTime), Artifacts: []deletedArtifact{}}
	keep := func(kind, md5 string, l Link) {
		moved, err := a.move(ctx, l, aside)
		if err != nil {
			a.log.Warn("object was not moved", "image_id", image.ID, "path", l.Path, "error", err)
			return
		}
		record.Artifacts = append(record.Artifacts, deletedArtifact{kind, md5, deletedLink{moved.Etag, moved.Path, moved.Type}})
	}
	for _, artifact := range a.artifactsOf(m, image.ID) {
		l, _ := artifactLink(artifact)
		kind, _ := artifact.vals["type"].(string)
		md5, _ := artifact.vals["md5"].(string)
		keep(kind, md5, l)
	}
	keep(originalManifest, "", *image.Link)
	data, err := encode(record, false)
	if err != nil {
		return nil, err
	}
	key := path.Join("deleted", image.ID, "deleted_manifest.json")
	if err := a.objects.put(ctx, a.bucket, key, data); err != nil {
		return nil, err
	}
	return &Link{Path: "s3://" + a.bucket + "/" + key, Type: "s3"}, nil
}

// undelete moves the objects back and the record among the images.
func (a *api) undelete(c *call, image Image) error {
	if image.Link != nil {
		m, err := a.readManifest(c.ctx(), *image.Link, image.Link.quoted())
		if errors.Is(err, errUnreadable) {
			return unprocessable("Unable to read manifest file for the s3 artifact " + image.Link.quoted() + ". " + pleaseRerun)
		}
		if err != nil {
			return err
		}
		back := func(key string) string { return strings.TrimPrefix(key, "deleted/") }
		deleted := image.Link
		for _, artifact := range a.artifactsOf(m, image.ID) {
			l, _ := artifactLink(artifact)
			moved, err := a.move(c.ctx(), l, back)
			if err != nil {
				a.log.Warn("object was not moved back", "image_id", image.ID, "path", l.Path, "error", err)
				continue
			}
			if artifact.vals["type"] == originalManifest {
				image.Link = &moved
			}
		}
		if image.Link != deleted {
			a.removeObject(c.ctx(), *deleted)
		}
	}
	image.Deleted = ""
	if err := a.state.images.put(image); err != nil {
		return err
	}
	return a.state.deletedImages.remove(image.ID)
}

// rootfsOf finds the rootfs of an image's manifest for a job: its link and MD5.
func (a *api) rootfsOf(ctx context.Context, image Image) (l Link, md5 string, err error) {
	m, err := a.readManifest(ctx, *image.Link, image.Link.quoted())
	if err != nil {
		return Link{}, "", err
	}
	bad := func(text string) error { return refusal{http.StatusBadRequest, text} }
	if m.members == nil || m.members.vals["version"] != "1.0" {
		return Link{}, "", bad("The manifest.json file is corrupt or invalid for IMS image_id=" + image.ID + ". Could not determine the manifest version or manifest version is unsupported. " + rerun)
	}
	var found []*object
	for _, artifact := range a.artifactsOf(m, image.ID) {
		if kind, _ := artifact.vals["type"].(string); strings.HasPrefix(kind, rootfsType) {
			found = append(found, artifact)
		}
	}
	switch {
	case len(found) == 0:
		return Link{}, "", bad("Error reading the manifest.json for IMS image_id=" + image.ID + ". The manifest does not include any rootfs artifacts. " + rerun)
	case len(found) > 1:
		return Link{}, "", bad("Error reading the manifest.json for IMS image_id=" + image.ID + ". The manifest includes multiple rootfs artifacts. " + rerun)
	}
	l, _ = artifactLink(found[0])
	info, err := a.headLink(ctx, l, pyRepr(found[0].vals["link"]))
	if err != nil {
		return Link{}, "", err
	}
	// the object's own metadata wins over the manifest, as in the service
	if md5 = info.md5; md5 == "" {
		md5, _ = found[0].vals["md5"].(string)
	}
	return l, md5, nil
}
