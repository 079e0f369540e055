// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"github.com/google/uuid"
)

// Job fetches a job record.
func (c *Client) Job(ctx context.Context, id string) (Job, error) {
	return c.job(ctx, http.MethodGet, "/jobs/"+url.PathEscape(id), nil)
}

// SetStatus sets a job's state. For Success and Failed the service deletes the
// job's Service and volume claim before it answers, so this must be the last
// thing a job does.
func (c *Client) SetStatus(ctx context.Context, id string, s Status) (Job, error) {
	return c.job(ctx, http.MethodPatch, "/jobs/"+url.PathEscape(id), map[string]string{"status": string(s)})
}

// SetResultantImage records which image a job has made.
func (c *Client) SetResultantImage(ctx context.Context, id, imageID string) (Job, error) {
	return c.job(ctx, http.MethodPatch, "/jobs/"+url.PathEscape(id), map[string]string{"resultant_image_id": imageID})
}

// CreateJob starts a job.
func (c *Client) CreateJob(ctx context.Context, r JobRequest) (Job, error) {
	return c.job(ctx, http.MethodPost, "/jobs", r)
}

// DeleteJob removes a job record and what belongs to it.
func (c *Client) DeleteJob(ctx context.Context, id string) error {
	return c.do(ctx, call{method: http.MethodDelete, path: "/jobs/" + url.PathEscape(id)})
}

func (c *Client) job(ctx context.Context, method, path string, body any) (Job, error) {
	var j Job
	err := c.do(ctx, call{method: method, path: path, body: body, out: &j, raw: &j.Raw})
	return j, err
}

// Image fetches an image record.
func (c *Client) Image(ctx context.Context, id string) (Image, error) {
	return c.image(ctx, http.MethodGet, "/images/"+url.PathEscape(id), nil)
}

// Images lists all image records. Raw is not set on them.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	var all []Image
	err := c.do(ctx, call{method: http.MethodGet, path: "/images", out: &all})
	return all, err
}

// CreateImage makes an empty image record: no link yet. The id is checked to
// be a UUID, since objects are later deleted below it.
func (c *Client) CreateImage(ctx context.Context, name, arch string) (Image, error) {
	img, err := c.image(ctx, http.MethodPost, "/images", map[string]string{"name": name, "arch": arch})
	if err != nil {
		return Image{}, err
	}
	if uuid.Validate(img.ID) != nil {
		return Image{}, fmt.Errorf("POST /images: IMS sent the image id %q, which is not a UUID; check that IMS_URL is the IMS service", printable(img.ID))
	}
	return img, nil
}

// LinkImage points an image record at its manifest. The service then checks
// the manifest and every artifact in it.
func (c *Client) LinkImage(ctx context.Context, id string, link Link) (Image, error) {
	return c.image(ctx, http.MethodPatch, "/images/"+url.PathEscape(id), map[string]Link{"link": link})
}

// DeleteImage removes an image record but not its objects in S3: whoever
// uploaded them removes them.
func (c *Client) DeleteImage(ctx context.Context, id string) error {
	return c.do(ctx, call{method: http.MethodDelete, path: "/images/" + url.PathEscape(id), query: "cascade=false"})
}

func (c *Client) image(ctx context.Context, method, path string, body any) (Image, error) {
	var img Image
	err := c.do(ctx, call{method: method, path: path, body: body, out: &img, raw: &img.Raw})
	return img, err
}

// CreatePublicKey stores an SSH public key.
func (c *Client) CreatePublicKey(ctx context.Context, name, key string) (PublicKey, error) {
	var k PublicKey
	err := c.do(ctx, call{method: http.MethodPost, path: "/public-keys", body: map[string]string{"name": name, "public_key": key}, out: &k})
	return k, err
}

// DeletePublicKey removes a stored SSH public key.
func (c *Client) DeletePublicKey(ctx context.Context, id string) error {
	return c.do(ctx, call{method: http.MethodDelete, path: "/public-keys/" + url.PathEscape(id)})
}
