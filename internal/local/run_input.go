// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/squash"
	"github.com/ims-buildenv/ims-buildenv/internal/upload"
)

// runInput is what a run works on, checked before anything is started.
type runInput struct {
	key       string // one authorized_keys line
	artifacts []upload.Artifact
	closers   []io.Closer
}

func (in *runInput) close() {
	for _, c := range in.closers {
		c.Close()
	}
}

// check opens the inputs of a run and refuses what would fail later.
func (c RunConfig) check() (_ *runInput, err error) {
	in := &runInput{}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	if in.key, err = readKey(c.KeyFile); err != nil {
		return nil, err
	}
	if err = in.openImage(c); err != nil {
		return nil, err
	}
	if c.Port != 0 {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(c.Port))
		if err != nil {
			return nil, fmt.Errorf("--port: %w; give another port, or none for a free one", err)
		}
		l.Close()
	}
	if c.Output != "" {
		if st, err := os.Stat(filepath.Dir(c.Output)); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("--output %s: its directory does not exist", c.Output)
		}
	}
	return in, nil
}

// readKey reads a file with one public key.
func readKey(name string) (string, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return "", fmt.Errorf("--key: %w; make a key with ssh-keygen", err)
	}
	if bytes.Contains(b, []byte("PRIVATE KEY-----")) {
		return "", fmt.Errorf("--key %s: is a private key; give the public one, usually %s.pub", name, name)
	}
	key, _, _, rest, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return "", fmt.Errorf("--key %s: not an SSH public key (one line such as \"ssh-ed25519 AAAA... name\")", name)
	}
	if _, _, _, _, err := ssh.ParseAuthorizedKey(rest); err == nil {
		return "", fmt.Errorf("--key %s: holds more than one key; the service takes one per job", name)
	}
	// the line as it stands keeps options and comment
	fields := strings.Fields(string(ssh.MarshalAuthorizedKey(key)))
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, fields[1]) {
			return strings.TrimSpace(line) + "\n", nil
		}
	}
	return string(ssh.MarshalAuthorizedKey(key)), nil
}

// openImage opens the base image and the boot files inside it.
func (in *runInput) openImage(c RunConfig) error {
	f, err := os.Open(c.Image)
	if err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	in.closers = append(in.closers, f)
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("--image %s: not a regular file", c.Image)
	}
	image, err := squash.Open(f, st.Size())
	if err != nil {
		return fmt.Errorf("--image %s: not a SquashFS image: %w", c.Image, err)
	}
	in.artifacts = []upload.Artifact{{Kind: upload.Rootfs, Body: f, Size: st.Size()}}
	for _, boot := range []struct {
		kind upload.Kind
		name string
		flag string
	}{{upload.Kernel, c.KernelFileName, "--kernel-file-name"}, {upload.Initrd, c.InitrdFileName, "--initrd-file-name"}} {
		file, size, err := openBoot(image, boot.name)
		if err != nil {
			return fmt.Errorf("--image %s: %w; name the %s with %s, or make the link in the image", c.Image, err, boot.kind, boot.flag)
		}
		in.closers = append(in.closers, file)
		in.artifacts = append(in.artifacts, upload.Artifact{Kind: boot.kind, Body: file.(io.ReaderAt), Size: size})
	}
	return nil
}

// openBoot opens a file of the image's /boot; links are followed inside the
// image. Its error lists what is there.
func openBoot(image *squash.Image, name string) (fs.File, int64, error) {
	full := path.Join("boot", name)
	if !fs.ValidPath(name) || name == "." {
		return nil, 0, fmt.Errorf("%q is not the name of a file inside /boot", name)
	}
	file, err := image.Open(full)
	if err == nil {
		var st fs.FileInfo
		st, err = file.Stat()
		if err == nil && (!st.Mode().IsRegular() || st.Size() == 0) {
			err = errors.New("not a file with content")
		}
		if err == nil {
			return file, st.Size(), nil
		}
		file.Close()
	}
	reason := "is not a file with content"
	if errors.Is(err, fs.ErrNotExist) {
		reason = "does not exist"
	}
	var names []string
	entries, lerr := image.ReadDir("boot")
	for _, e := range entries {
		if !e.IsDir() && len(names) < 20 {
			names = append(names, e.Name())
		}
	}
	if lerr != nil {
		return nil, 0, fmt.Errorf("/%s %s: the image has no /boot", full, reason)
	}
	return nil, 0, fmt.Errorf("/%s %s; /boot holds: %s", full, reason, strings.Join(names, ", "))
}
