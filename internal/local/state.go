// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// timestamp is the service's record time: local, microseconds, no zone.
const timestamp = "2006-01-02T15:04:05.000000"

func now() string { return time.Now().Format(timestamp) }

// PublicKey is an SSH key record. Member order is that of the answer to POST.
type PublicKey struct {
	Name      string `json:"name"`
	PublicKey string `json:"public_key"`
	ID        string `json:"id"`
	Created   string `json:"created"`
	Deleted   string `json:"deleted,omitempty"`
}

// Link points at an object in S3.
type Link struct {
	Path string `json:"path"` // s3://bucket/key
	Etag string `json:"etag"`
	Type string `json:"type"` // always "s3"
}

// Image is an image record; Link is the manifest, nil until it is patched in.
type Image struct {
	Name     string            `json:"name"`
	Link     *Link             `json:"link"`
	Arch     string            `json:"arch"` // x86_64 or aarch64
	Metadata map[string]string `json:"metadata"`
	ID       string            `json:"id"`
	Created  string            `json:"created"`
	Deleted  string            `json:"deleted,omitempty"`
}

// Endpoint is where an SSH container answers.
type Endpoint struct {
	Host string `json:"host"`
	Port int    `json:"port"`
}

// ConnectionInfo names the two ways to an SSH container.
type ConnectionInfo struct {
	CustomerAccess Endpoint `json:"customer_access"`
	ClusterLocal   Endpoint `json:"cluster.local"`
}

// SSHContainer is the one SSH container of a customize job.
type SSHContainer struct {
	Name           string         `json:"name"`
	Jail           bool           `json:"jail"`
	Status         string         `json:"status"`
	ConnectionInfo ConnectionInfo `json:"connection_info"`
}

// Job is a job record. Sizes are in GiB.
type Job struct {
	ArtifactID           string         `json:"artifact_id"`
	PublicKeyID          string         `json:"public_key_id"`
	JobType              string         `json:"job_type"`
	ArchiveName          string         `json:"image_root_archive_name"`
	EnableDebug          bool           `json:"enable_debug"`
	BuildEnvSize         int            `json:"build_env_size"`
	KernelFileName       string         `json:"kernel_file_name"`
	InitrdFileName       string         `json:"initrd_file_name"`
	ParametersFileName   string         `json:"kernel_parameters_file_name"`
	SSHContainers        []SSHContainer `json:"ssh_containers"`
	RequireDKMS          bool           `json:"require_dkms"`
	JobMemSize           int            `json:"job_mem_size"`
	ID                   string         `json:"id"`
	Created              string         `json:"created"`
	KubernetesJob        string         `json:"kubernetes_job"`
	KubernetesService    string         `json:"kubernetes_service"`
	KubernetesConfigmap  string         `json:"kubernetes_configmap"`
	KubernetesNamespace  string         `json:"kubernetes_namespace"`
	Status               string         `json:"status"`
	ResultantImageID     *string        `json:"resultant_image_id"`
	Arch                 string         `json:"arch"`
	KubernetesPVC        string         `json:"kubernetes_pvc"`
	RemoteBuildNode      string         `json:"remote_build_node"`
	KubernetesSecretName *string        `json:"kubernetes_secret"`
}

// Terminal tells whether the job has ended.
func (j Job) Terminal() bool { return j.Status == "success" || j.Status == "error" }

// table is one kind of record, kept in insertion order and written to its file
// as a whole, atomically, with every change.
type table[T any] struct {
	mu   sync.RWMutex
	path string
	id   func(T) string
	rows []T
}

func openTable[T any](path string, id func(T) string) (*table[T], error) {
	t := &table[T]{path: path, id: id}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &t.rows); err != nil {
		return nil, fmt.Errorf("read records %s: %w; repair the file or start with an empty data directory", path, err)
	}
	return t, nil
}

func (t *table[T]) all() []T {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return append([]T{}, t.rows...)
}

func (t *table[T]) get(id string) (T, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, r := range t.rows {
		if t.id(r) == id {
			return r, true
		}
	}
	var none T
	return none, false
}

// put adds rec, or replaces the record of the same id.
func (t *table[T]) put(rec T) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := make([]T, 0, len(t.rows)+1)
	replaced := false
	for _, r := range t.rows {
		if t.id(r) == t.id(rec) {
			r, replaced = rec, true
		}
		rows = append(rows, r)
	}
	if !replaced {
		rows = append(rows, rec)
	}
	return t.save(rows)
}

// change applies f to the record with that id; false when there is none.
func (t *table[T]) change(id string, f func(*T)) (T, bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := append([]T{}, t.rows...)
	for i := range rows {
		if t.id(rows[i]) == id {
			f(&rows[i])
			return rows[i], true, t.save(rows)
		}
	}
	var none T
	return none, false, nil
}

func (t *table[T]) remove(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := make([]T, 0, len(t.rows))
	for _, r := range t.rows {
		if t.id(r) != id {
			rows = append(rows, r)
		}
	}
	return t.save(rows)
}

// save writes rows and only then makes them the table's; the lock is held.
func (t *table[T]) save(rows []T) error {
	b, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(t.path, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("save records %s: %w; see that the disk is not full", t.path, err)
	}
	t.rows = rows
	return nil
}

// state is everything the API knows, under <data>/state.
type state struct {
	keys          *table[PublicKey]
	deletedKeys   *table[PublicKey]
	images        *table[Image]
	deletedImages *table[Image]
	jobs          *table[Job]
}

func openState(dir string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	keyID := func(k PublicKey) string { return k.ID }
	imageID := func(i Image) string { return i.ID }
	s := &state{}
	var errs [5]error
	s.keys, errs[0] = openTable(filepath.Join(dir, "public_keys.json"), keyID)
	s.deletedKeys, errs[1] = openTable(filepath.Join(dir, "deleted_public_keys.json"), keyID)
	s.images, errs[2] = openTable(filepath.Join(dir, "images.json"), imageID)
	s.deletedImages, errs[3] = openTable(filepath.Join(dir, "deleted_images.json"), imageID)
	s.jobs, errs[4] = openTable(filepath.Join(dir, "jobs.json"), func(j Job) string { return j.ID })
	return s, errors.Join(errs[:]...)
}

// lockData takes the data directory for this process. The lock ends with the
// file, that is also when the process is killed.
func lockData(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("data directory %s is in use by another imslocal; stop that one or give another --data", dir)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}
