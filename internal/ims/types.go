// SPDX-License-Identifier: Apache-2.0

package ims

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Status is a job's state, from the service's fixed vocabulary.
type Status string

// The states a job can be in; the service refuses any other.
const (
	Creating           Status = "creating"
	FetchingImage      Status = "fetching_image"
	FetchingRecipe     Status = "fetching_recipe"
	WaitingForRepos    Status = "waiting_for_repos"
	BuildingImage      Status = "building_image"
	PackagingArtifacts Status = "packaging_artifacts"
	WaitingOnUser      Status = "waiting_on_user"
	Failed             Status = "error"
	Success            Status = "success"
)

// Statuses lists the whole vocabulary in the order the service names it.
var Statuses = []Status{Creating, FetchingImage, FetchingRecipe, WaitingForRepos, BuildingImage,
	PackagingArtifacts, WaitingOnUser, Failed, Success}

// ParseStatus accepts exactly the service's words.
func ParseStatus(s string) (Status, error) {
	names := make([]string, len(Statuses))
	for i, known := range Statuses {
		if s == string(known) {
			return known, nil
		}
		names[i] = string(known)
	}
	return "", fmt.Errorf("job status %q: must be one of %s", s, strings.Join(names, ", "))
}

// Link points from an image record to its manifest in S3.
type Link struct {
	ETag string `json:"etag"` // as HEAD returns it, without quotes
	Path string `json:"path"` // s3://bucket/key
	Type string `json:"type"` // "s3"
}

// Image is an image record. Raw is the record as the service sent it, for
// callers that report it onward without losing fields this client ignores.
type Image struct {
	ID      string          `json:"id"`
	Name    string          `json:"name"`
	Arch    string          `json:"arch"`
	Created string          `json:"created"` // local time of the service, no zone
	Link    *Link           `json:"link"`    // nil until artifacts are linked
	Raw     json.RawMessage `json:"-"`
}

// PublicKey is an SSH public key record.
type PublicKey struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	PublicKey string `json:"public_key"`
	Created   string `json:"created"`
}

// SSHContainer names the shell a job opens and says whether it is jailed.
// ConnectionInfo maps "customer_access" and "cluster.local" to an address.
type SSHContainer struct {
	Name           string                     `json:"name"`
	Jail           bool                       `json:"jail"`
	Status         string                     `json:"status,omitempty"`
	ConnectionInfo map[string]ConnectionPoint `json:"connection_info,omitempty"`
}

// ConnectionPoint is where a job's SSH container can be reached.
type ConnectionPoint struct {
	Host string `json:"host"`
	Port int    `json:"port"`
}

// Job is a job record. Raw is the record as the service sent it.
type Job struct {
	ID               string          `json:"id"`
	Type             string          `json:"job_type"`
	Status           Status          `json:"status"`
	Arch             string          `json:"arch"`
	ArtifactID       string          `json:"artifact_id"`
	ArchiveName      string          `json:"image_root_archive_name"`
	ResultantImageID string          `json:"resultant_image_id"` // "" for null
	SSHContainers    []SSHContainer  `json:"ssh_containers"`
	Raw              json.RawMessage `json:"-"`
}

// JobRequest describes a job to create. Fields left zero are not sent, and the
// service fills in its defaults.
type JobRequest struct {
	JobType              string         `json:"job_type"` // customize or create
	ArtifactID           string         `json:"artifact_id"`
	PublicKeyID          string         `json:"public_key_id"`
	ArchiveName          string         `json:"image_root_archive_name"`
	KernelFileName       string         `json:"kernel_file_name,omitempty"`
	InitrdFileName       string         `json:"initrd_file_name,omitempty"`
	KernelParametersName string         `json:"kernel_parameters_file_name,omitempty"`
	EnableDebug          bool           `json:"enable_debug,omitempty"`
	RequireDKMS          *bool          `json:"require_dkms,omitempty"`   // nil: the service decides
	BuildEnvSize         int            `json:"build_env_size,omitempty"` // GiB
	JobMemSize           int            `json:"job_mem_size,omitempty"`   // GiB
	SSHContainers        []SSHContainer `json:"ssh_containers,omitempty"` // one at most
}
