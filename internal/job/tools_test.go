// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// An image goes below a prefix with its labels, and what is there already stays as it is.
func TestUploadPlain(t *testing.T) {
	p := newPod(t)
	file := func(name, content string) string {
		path := filepath.Join(p.dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	req := UploadRequest{Rootfs: file("image", "image"), Kernel: file("kernel", "kernel"), Parameters: file("parameters", "quiet")}
	run := func(ctx context.Context) int {
		p.stdout.Reset()
		return UploadPlain(ctx, p.cfg, Deps{Stdout: &p.stdout, Log: slog.New(slog.NewTextHandler(&p.log, nil))}, "compute/debian/12", map[string]string{"tag": "größer"}, req)
	}
	stored := func() (keys []string) {
		all, err := p.store.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range all {
			keys = append(keys, o.Key)
		}
		return keys
	}
	req.Initrd = file("empty", "")
	if run(t.Context()) != exitFailure || len(stored()) != 0 || !strings.Contains(p.stdout.String(), "empty: not a regular file") {
		t.Errorf("an empty initrd: %v\n%s", stored(), p.stdout.String())
	}
	req.Initrd = ""
	if run(t.Context()) != exitOK {
		t.Fatal(p.log.String())
	}
	want := "compute/debian/12/boot_parameters compute/debian/12/kernel compute/debian/12/manifest.json compute/debian/12/rootfs"
	if got := strings.Join(stored(), " "); got != want {
		t.Errorf("stored %s", got)
	}
	var doc struct {
		Artifacts []upload.Entry
		Result    string
	}
	if err := json.Unmarshal(p.stdout.Bytes(), &doc); err != nil || doc.Result != "success" || len(doc.Artifacts) != 4 {
		t.Errorf("%v\n%s", err, p.stdout.String())
	}
	info, err := p.store.Head(t.Context(), "compute/debian/12/rootfs")
	if err != nil || info.Metadata["tag"] == "" || info.Metadata["md5sum"] != doc.Artifacts[0].MD5 {
		t.Errorf("%+v, %v", info, err)
	}
	for k := range info.Metadata {
		if strings.Contains(k, "ims") {
			t.Errorf("metadata %s", k)
		}
	}
	if run(t.Context()) != exitFailure || !strings.Contains(p.stdout.String(), "exists: choose another") || strings.Join(stored(), " ") != want {
		t.Errorf("again: %v\n%s", stored(), p.stdout.String())
	}
	if len(p.ims.calls) > 0 {
		t.Errorf("IMS was asked: %v", p.ims.calls)
	}
}
