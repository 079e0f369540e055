// SPDX-License-Identifier: Apache-2.0

package local

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"
)

var (
	linkFields = []field{
		{name: "path", required: true, check: nonBlank("name field must not be blank")},
		{name: "etag", check: checkString},
		{name: "type", required: true, check: oneOf("Type must be one of: ", "s3")},
	}
	archCheck   = oneOf("Must be one of: ", "aarch64", "x86_64")
	imageFields = []field{
		{name: "name", required: true, check: nonBlank("name field must not be blank")},
		{name: "link", null: true, check: nested(linkFields)},
		{name: "arch", check: archCheck},
		{name: "metadata", null: true, check: checkMetadata},
	}
	imagePatchFields = []field{
		{name: "link", check: nested(linkFields)},
		{name: "arch", check: archCheck},
		{name: "metadata", check: nested([]field{
			{name: "operation", required: true, check: oneOf("Must be one of: ", "set", "remove")},
			{name: "key", required: true, check: checkString},
			{name: "value", check: checkString},
		})},
	}
)

// checkMetadata takes a mapping of strings, or the service's second spelling of
// a mapping of one, {"key": …, "value": …}.
func checkMetadata(v any) (any, any) {
	o, ok := v.(*object)
	if !ok {
		return nil, map[string]any{"_schema": fail(msgInput)}
	}
	out := map[string]string{}
	errs := map[string]any{}
	for _, k := range o.keys {
		s, ok := o.vals[k].(string)
		if !ok {
			errs[k] = fail("Not a valid string.")
			continue
		}
		out[k] = s
	}
	if len(errs) > 0 {
		return nil, errs
	}
	key, hasKey := out["key"]
	value, hasValue := out["value"]
	if len(out) == 2 && hasKey && hasValue {
		out = map[string]string{key: value}
	}
	return out, nil
}

// toLink makes a Link of checked members.
func toLink(m map[string]any) Link {
	l := Link{Path: m["path"].(string), Type: m["type"].(string)}
	l.Etag, _ = m["etag"].(string)
	return l
}

// quoted is the link as the service prints it after loading it.
func (l Link) quoted() string {
	return pyRepr(&object{keys: []string{"path", "etag", "type"}, vals: map[string]any{"path": l.Path, "etag": l.Etag, "type": l.Type}})
}

func (a *api) listImages(c *call) { a.reply(c, a.state.images.all()) }

func (a *api) createImage(c *call) {
	in, ok := a.validated(c, imageFields)
	if !ok {
		return
	}
	image := Image{Name: in["name"].(string), Arch: "x86_64", Metadata: map[string]string{}, ID: uuid.NewString(), Created: now()}
	if arch, ok := in["arch"].(string); ok {
		image.Arch = arch
	}
	if meta, ok := in["metadata"].(map[string]string); ok {
		image.Metadata = meta
	}
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	if given, ok := in["link"].(map[string]any); ok {
		link := toLink(given)
		image.Link = &link
		if err := a.checkManifest(c, link, link.quoted()); err != nil {
			a.refuse(c, err)
			return
		}
	}
	if err := a.state.images.put(image); err != nil {
		a.internal(c, err)
		return
	}
	a.answer(c.w, http.StatusCreated, image)
}

func (a *api) getImage(c *call) {
	if image, ok := a.state.images.get(c.id); ok {
		a.reply(c, image)
		return
	}
	a.notFound(c)
}

func (a *api) patchImage(c *call) {
	if _, ok := a.state.images.get(c.id); !ok {
		a.notFound(c)
		return
	}
	in, ok := a.validated(c, imagePatchFields)
	if !ok {
		return
	}
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	image, ok := a.state.images.get(c.id)
	if !ok { // deleted meanwhile
		a.notFound(c)
		return
	}
	// member by member in the order of the request, as the service does it
	for _, key := range c.body.(*object).keys {
		switch value := in[key].(type) {
		case string: // arch
			image.Arch = value
		case map[string]any:
			if key == "metadata" {
				image.Metadata = patchedMetadata(image.Metadata, value)
				continue
			}
			link := toLink(value)
			if image.Link != nil && *image.Link == link {
				continue // the same again is success
			}
			if image.Link != nil {
				a.problem(c, http.StatusConflict, "Requested resource exists, but cannot be patched due to a patch conflict. Re-run request with valid input values.", nil)
				return
			}
			if err := a.checkManifest(c, link, pyRepr(c.body.(*object).vals[key])); err != nil {
				a.refuse(c, err)
				return
			}
			image.Link = &link
		}
	}
	if err := a.state.images.put(image); err != nil {
		a.internal(c, err)
		return
	}
	a.reply(c, image)
}

func patchedMetadata(old map[string]string, change map[string]any) map[string]string {
	out := map[string]string{}
	for k, v := range old {
		out[k] = v
	}
	key := change["key"].(string)
	if change["operation"] == "remove" {
		delete(out, key)
		return out
	}
	out[key], _ = change["value"].(string)
	return out
}

func (a *api) deleteImage(c *call) {
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	image, ok := a.state.images.get(c.id)
	if !ok {
		a.notFound(c)
		return
	}
	a.finish(c, a.dropImages(c, []Image{image}))
}

func (a *api) deleteImages(c *call) {
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	a.finish(c, a.dropImages(c, a.state.images.all()))
}

// dropImages deletes records. On v2 their objects go, too, unless the request
// says cascade=false; on v3 record and objects move aside.
func (a *api) dropImages(c *call, images []Image) error {
	cascade := c.r.URL.Query().Get("cascade")
	objectsToo := cascade == "" || slices.Contains([]string{"true", "yes", "t", "1"}, strings.ToLower(cascade))
	for _, image := range images {
		switch {
		case c.v3:
			if err := a.softDelete(c, image); err != nil {
				return err
			}
		case objectsToo && image.Link != nil:
			if err := a.deleteObjects(c, image.ID, *image.Link); err != nil {
				return err
			}
		}
		if err := a.state.images.remove(image.ID); err != nil {
			return err
		}
	}
	return nil
}

func (a *api) listDeletedImages(c *call) { a.reply(c, a.state.deletedImages.all()) }

func (a *api) getDeletedImage(c *call) {
	if image, ok := a.state.deletedImages.get(c.id); ok {
		a.reply(c, image)
		return
	}
	a.notFound(c)
}

// chosenImages is the deleted image of the path, or all on the collection.
func (a *api) chosenImages(c *call) ([]Image, bool) {
	if c.id == "" {
		return a.state.deletedImages.all(), true
	}
	image, ok := a.state.deletedImages.get(c.id)
	if !ok {
		a.notFound(c)
	}
	return []Image{image}, ok
}

func (a *api) undeleteImages(c *call) {
	if _, ok := a.chosenImages(c); !ok {
		return
	}
	if _, ok := a.validated(c, undeleteFields); !ok {
		return
	}
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	images, ok := a.chosenImages(c) // the other one may have been faster
	if !ok {
		return
	}
	for _, image := range images {
		if err := a.undelete(c, image); err != nil {
			a.refuse(c, err)
			return
		}
	}
	a.noContent(c)
}

func (a *api) purgeImages(c *call) {
	a.imageOps.Lock()
	defer a.imageOps.Unlock()
	images, ok := a.chosenImages(c)
	if !ok {
		return
	}
	for _, image := range images {
		if image.Link != nil {
			if err := a.deleteObjects(c, image.ID, *image.Link); err != nil {
				a.refuse(c, err)
				return
			}
		}
		if err := a.state.deletedImages.remove(image.ID); err != nil {
			a.internal(c, err)
			return
		}
	}
	a.noContent(c)
}
