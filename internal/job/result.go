// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"encoding/json"
	"io"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// published is an image that IMS knows.
type published struct {
	image     ims.Image
	job       *ims.Job // nil when no job was involved
	artifacts []upload.Entry
}

// document is the result in the legacy helper's form: keys sorted, four spaces,
// the service's records as it sent them.
func (p published) document() ([]byte, error) {
	doc := map[string]any{
		"ims_image_artifacts": p.artifacts,
		"ims_image_record":    generic(p.image.Raw),
		"result":              "success",
	}
	if p.job != nil {
		doc["ims_job_record"] = generic(p.job.Raw)
	}
	return encode(doc)
}

// generic decodes a record so that encoding sorts its keys too.
func generic(raw json.RawMessage) any {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if d.Decode(&v) != nil {
		return nil // the client has decoded it once already
	}
	return v
}

func encode(doc map[string]any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	err := e.Encode(doc)
	return b.Bytes(), err
}

// printFailure prints the document of a handled failure.
func printFailure(w io.Writer, cause error) {
	b, err := encode(map[string]any{"error": cause.Error(), "result": "failure"})
	if err == nil {
		w.Write(b) // the exit code and the log say it too
	}
}
