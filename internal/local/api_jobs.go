// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

var (
	jobTypes = []string{"create", "customize"}
	statuses = []string{"creating", "fetching_image", "fetching_recipe", "waiting_for_repos", "building_image",
		"packaging_artifacts", "waiting_on_user", "error", "success"}
)

// The service uses the text of build_env_size for job_mem_size, too.
const msgSize = "build_env_size must be greater than or equal to 1"

var (
	jobFields = []field{
		{name: "artifact_id", required: true, check: checkUUID},
		{name: "public_key_id", required: true, check: checkUUID},
		{name: "job_type", required: true, check: oneOf("Job type must be one of: ", jobTypes...)},
		{name: "image_root_archive_name", required: true, check: nonBlank("image_root_archive_name field must not be blank")},
		{name: "enable_debug", check: checkBool},
		{name: "build_env_size", check: positive(msgSize)},
		{name: "kernel_file_name", check: checkString},
		{name: "initrd_file_name", check: nonBlank("initrd_file_name field must not be blank")},
		{name: "kernel_parameters_file_name", check: nonBlank("kernel_parameters_file_name field must not be blank")},
		{name: "ssh_containers", null: true, check: listOf([]field{
			{name: "name", check: checkString},
			{name: "jail", check: checkBool},
		})},
		{name: "require_dkms", check: checkBool},
		{name: "job_mem_size", check: positive(msgSize)},
	}
	jobPatchFields = []field{
		{name: "status", check: oneOf("Job state must be one of: ", statuses...)},
		{name: "resultant_image_id", check: checkUUID},
	}
)

func (a *api) listJobs(c *call) { a.reply(c, a.state.jobs.all()) }

func (a *api) getJob(c *call) {
	if job, ok := a.state.jobs.get(c.id); ok {
		a.reply(c, job)
		return
	}
	a.notFound(c)
}

// orElse is the member of that name, or def when it was not given.
func orElse[T any](in map[string]any, name string, def T) T {
	if v, ok := in[name].(T); ok {
		return v
	}
	return def
}

// newJob fills a record with what the request says and the service's defaults.
func newJob(in map[string]any) (Job, error) {
	id := uuid.NewString()
	job := Job{
		ArtifactID:          in["artifact_id"].(string),
		PublicKeyID:         in["public_key_id"].(string),
		JobType:             in["job_type"].(string),
		ArchiveName:         in["image_root_archive_name"].(string),
		EnableDebug:         orElse(in, "enable_debug", false),
		BuildEnvSize:        orElse(in, "build_env_size", 60),
		KernelFileName:      orElse(in, "kernel_file_name", ""),
		InitrdFileName:      orElse(in, "initrd_file_name", "initrd"),
		ParametersFileName:  orElse(in, "kernel_parameters_file_name", "kernel-parameters"),
		RequireDKMS:         orElse(in, "require_dkms", true),
		JobMemSize:          orElse(in, "job_mem_size", 8),
		ID:                  id,
		Created:             now(),
		Status:              "creating",
		KubernetesJob:       "cray-ims-" + id + "-" + in["job_type"].(string),
		KubernetesService:   "cray-ims-" + id + "-service",
		KubernetesConfigmap: "cray-ims-" + id + "-configmap",
		KubernetesPVC:       "cray-ims-" + id + "-job-claim",
		KubernetesNamespace: "ims",
	}
	given := orElse(in, "ssh_containers", []map[string]any(nil))
	if job.JobType == "create" && len(given) > 0 {
		return Job{}, refusal{http.StatusBadRequest, "User defined ssh containers during image create are not currently supported. " + rerun}
	}
	if len(given) > 1 {
		return Job{}, refusal{http.StatusBadRequest, "Only one SSH container is currently supported. Please remove additional containers, determine the specific information that is missing or invalid and then re-run the request with valid information."}
	}
	container := SSHContainer{Name: "customize", Status: "pending"}
	if len(given) == 1 {
		container.Name = orElse(given[0], "name", "customize")
		container.Jail = orElse(given[0], "jail", false)
	}
	job.SSHContainers = []SSHContainer{container}
	return job, nil
}

// errUnrenderable: the service writes user text into a YAML template without
// quotes, and fails on text that breaks it. So do we, lest a name works here
// and nowhere else.
var errUnrenderable = errors.New("text breaks the service's YAML job template; use letters, digits, '.', '_', '-' and blanks")

// renderable tells whether text is taken by the template as it stands.
func renderable(text string) bool {
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return false
	}
	return !strings.Contains(text, ": ") && !strings.HasSuffix(text, ":") && !strings.ContainsRune("[]{},&*!|>'\"%@`#", rune(text[0]))
}

func (a *api) createJob(c *call) {
	in, ok := a.validated(c, jobFields)
	if !ok {
		return
	}
	job, err := newJob(in)
	if err != nil {
		a.refuse(c, err)
		return
	}
	input, err := a.resolve(c, &job)
	if err != nil {
		a.refuse(c, err)
		return
	}
	a.jobOps.Lock()
	defer a.jobOps.Unlock()
	if job.SSHContainers[0].ConnectionInfo, err = a.runner.Reserve(job); err != nil {
		a.log.Error("job cannot be run", "job_id", job.ID, "error", err)
		a.problem(c, http.StatusInternalServerError, "An error was encountered creating the kubernetes configmap resources for your IMS job. Review the errors, take any corrective action and then re-run the request with valid information.", nil)
		return
	}
	if err := a.state.jobs.put(job); err != nil {
		a.internal(c, errors.Join(err, a.runner.Remove(job.ID)))
		return
	}
	if err := a.runner.Start(job, input); err != nil {
		a.log.Error("job cannot be run", "job_id", job.ID, "error", err)
		if err := errors.Join(a.runner.Remove(job.ID), a.state.jobs.remove(job.ID)); err != nil {
			a.log.Error("clean up after a job that did not start", "job_id", job.ID, "error", err)
		}
		a.problem(c, http.StatusInternalServerError, "An error was encountered creating the kubernetes job resources for your IMS job. Review the errors, take any corrective action and then re-run the request with valid information.", nil)
		return
	}
	a.log.Info("job created", "job_id", job.ID, "ssh_port", job.SSHContainers[0].ConnectionInfo.CustomerAccess.Port)
	a.answer(c.w, http.StatusCreated, job)
}

// resolve finds what the job works on and completes the record from it.
func (a *api) resolve(c *call, job *Job) (PodInput, error) {
	bad := func(text string) error { return refusal{http.StatusBadRequest, text} }
	if job.JobType == "create" {
		return PodInput{}, bad("Invalid artifact_id value in job request. No IMS recipe record found matching id=" + job.ArtifactID + ". " + rerun)
	}
	image, ok := a.state.images.get(job.ArtifactID)
	if !ok {
		return PodInput{}, bad("Invalid artifact_id value in job request. No IMS image record found matching id=" + job.ArtifactID + ". " + rerun)
	}
	if image.Link == nil {
		return PodInput{}, bad("The IMS image does not have an artifact_link for image_id=" + image.ID + ". " + pleaseRerun)
	}
	rootfs, md5, err := a.rootfsOf(c.ctx(), image)
	if err != nil {
		return PodInput{}, err
	}
	key, ok := a.state.keys.get(job.PublicKeyID)
	if !ok {
		return PodInput{}, bad("Invalid public_key_id value in job request. No IMS public-key record found matching id=" + job.PublicKeyID)
	}
	job.Arch = image.Arch
	if job.KernelFileName == "" {
		job.KernelFileName = map[string]string{"x86_64": "vmlinuz", "aarch64": "Image"}[job.Arch]
	}
	authorized := strings.TrimRight(key.PublicKey, "\n")
	for _, text := range []string{job.ArchiveName, job.KernelFileName, job.InitrdFileName, job.ParametersFileName} {
		if !renderable(text) {
			return PodInput{}, fmt.Errorf("%q: %w", text, errUnrenderable)
		}
	}
	if strings.Contains(authorized, "\n") {
		return PodInput{}, fmt.Errorf("public key of several lines: %w", errUnrenderable)
	}
	bucket, name, err := splitS3(rootfs.Path)
	if err != nil {
		return PodInput{}, err
	}
	url, err := a.objects.presign(c.ctx(), bucket, name)
	if err != nil {
		return PodInput{}, err
	}
	return PodInput{PublicKey: authorized + "\n", DownloadURL: url, DownloadMD5: md5}, nil
}

func (a *api) patchJob(c *call) {
	if _, ok := a.state.jobs.get(c.id); !ok {
		a.notFound(c)
		return
	}
	in, ok := a.validated(c, jobPatchFields)
	if !ok {
		return
	}
	a.jobOps.Lock() // not while the body is read: that may take as long as the client likes
	defer a.jobOps.Unlock()
	// the image first: it stays when the status cannot be changed
	if image, ok := in["resultant_image_id"].(string); ok {
		if _, _, err := a.state.jobs.change(c.id, func(j *Job) { j.ResultantImageID = &image }); err != nil {
			a.internal(c, err)
			return
		}
	}
	if status, ok := in["status"].(string); ok {
		if err := a.setStatus(c.id, status); err != nil {
			a.log.Error("job keeps its status", "job_id", c.id, "status", status, "error", err)
			a.problem(c, http.StatusInternalServerError, "Errors were encountered cleaning up kubernetes service IP for IMS job_id="+c.id+". Review the errors, take any corrective action and then re-run the request with valid information.", []string{err.Error()})
			return
		}
	}
	job, ok := a.state.jobs.get(c.id)
	if !ok { // deleted meanwhile
		a.notFound(c)
		return
	}
	a.reply(c, job)
}

// setStatus changes a job's status; on the way to success or error the service
// and the volume of the job go first. jobOps is held.
func (a *api) setStatus(id, status string) error {
	if status == "success" || status == "error" {
		if err := a.runner.Release(id); err != nil {
			return err
		}
	}
	job, ok, err := a.state.jobs.change(id, func(j *Job) { j.Status = status })
	if err != nil {
		return err
	}
	if ok {
		a.log.Info("job status", "job_id", job.ID, "status", status)
		if a.changed != nil {
			a.changed(job)
		}
	}
	return nil
}

// endJob marks a job as failed unless it has ended; the runner says so when a
// container is gone that should not be.
func (a *api) endJob(id, reason string) {
	a.jobOps.Lock()
	defer a.jobOps.Unlock()
	job, ok := a.state.jobs.get(id)
	if !ok || job.Terminal() {
		return
	}
	a.log.Error("job ended without a result", "job_id", id, "status", job.Status, "reason", reason)
	if err := a.setStatus(id, "error"); err != nil {
		a.log.Error("job keeps its status", "job_id", id, "error", err)
	}
}

func (a *api) deleteJob(c *call) {
	a.jobOps.Lock()
	defer a.jobOps.Unlock()
	if _, ok := a.state.jobs.get(c.id); !ok {
		a.notFound(c)
		return
	}
	if err := a.runner.Remove(c.id); err != nil {
		a.log.Error("job cannot be deleted", "job_id", c.id, "error", err)
		a.problem(c, http.StatusInternalServerError, "Errors were encountered deleting the kubernetes resources for IMS job_id="+c.id+". Review the errors, take any corrective action and then re-run the request with valid information.", []string{err.Error()})
		return
	}
	a.finish(c, a.state.jobs.remove(c.id))
}

// sinceAge is the time an age filter such as 1w2d3h means; what does not match
// a unit counts as nothing, as in the service.
func sinceAge(age string, at time.Time) time.Time {
	units := []struct {
		letter string
		length time.Duration
	}{{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}}
	for _, u := range units {
		m := regexp.MustCompile(`(?i)(\d+)\w*` + u.letter).FindStringSubmatch(age)
		if m == nil {
			continue
		}
		// more than ten years is as good as ten years
		n, err := strconv.Atoi(m[1])
		if limit := int(87600 * time.Hour / u.length); err != nil || n > limit {
			n = limit
		}
		at = at.Add(-time.Duration(n) * u.length)
	}
	return at
}

func (a *api) deleteJobs(c *call) {
	query := c.r.URL.Query()
	unsupported := func(name, value string) {
		// the service puts this sentence where the title belongs
		a.sendProblem(c, problem{Status: http.StatusBadRequest, Title: "Unsupported " + name + " " + value + " in query parameters. " + rerun})
	}
	var wanted []string
	for _, s := range query["status"] {
		s = strings.ToLower(s)
		if !slices.Contains(statuses, s) {
			unsupported("status", s)
			return
		}
		wanted = append(wanted, s)
	}
	kind := query.Get("job_type")
	if kind != "" && !slices.Contains(jobTypes, kind) {
		unsupported("job_type", kind)
		return
	}
	before := ""
	if query.Has("age") {
		before = sinceAge(query.Get("age"), time.Now()).Format(timestamp)
	}
	a.jobOps.Lock()
	defer a.jobOps.Unlock()
	var errs []string
	for _, job := range a.state.jobs.all() {
		// record times compare as strings
		if len(wanted) > 0 && !slices.Contains(wanted, job.Status) || kind != "" && job.JobType != kind || before != "" && job.Created >= before {
			continue
		}
		err := a.runner.Remove(job.ID)
		if err == nil {
			err = a.state.jobs.remove(job.ID)
		}
		if err != nil {
			a.log.Error("job cannot be deleted", "job_id", job.ID, "error", err)
			errs = append(errs, err.Error())
		}
	}
	if len(errs) > 0 {
		a.problem(c, http.StatusInternalServerError, "Errors were encountered deleting the kubernetes resources for one or more IMS jobs. Review the errors, take any corrective action and then re-run the request with valid information.", errs)
		return
	}
	a.noContent(c)
}
