// SPDX-License-Identifier: Apache-2.0

package job

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
)

// modes are the ways a shell can be confined.
var modes = []struct {
	name string
	order
	level string // that the jail proves, "" for none
}{
	{"jailed privileged", order{jail: true, dkms: true}, "namespaces"},
	{"jailed", order{jail: true}, "chroot"},
	{"plain privileged", order{dkms: true}, ""},
	{"plain", order{}, ""},
}

// The ways a user says that the work is done. None is told by its exit code:
// the sessions may end with the command.
var flagMakers = map[string]func(j *job){
	"touch": func(j *job) { j.ssh("touch " + j.flag("complete")) },
	// what Ansible's copy module does: a temporary name, then a rename
	"rename by sftp": func(j *job) {
		file := filepath.Join(j.t.TempDir(), "flag")
		if err := os.WriteFile(file, []byte("done"), 0o600); err != nil {
			j.t.Fatal(err)
		}
		j.sftp("put "+file+" "+j.flag(".flag-in-the-making"), "rename "+j.flag(".flag-in-the-making")+" "+j.flag("complete"))
	},
	// what CFS does: the connection is cut once the command runs
	"client gone": func(j *job) {
		cmd := exec.Command("ssh", append(j.user.options(j.port), "root@127.0.0.1", "echo started; cat; touch "+j.flag("complete"))...)
		hold, err := cmd.StdinPipe()
		if err != nil {
			j.t.Fatal(err)
		}
		defer hold.Close()
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			j.t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 8)); err != nil {
			j.t.Errorf("before the cut: %v", err)
		}
		cmd.Process.Kill()
		cmd.Wait()
	},
}

// TestCustomize changes an image in every mode and finds exactly the changes
// in the new one.
func TestCustomize(t *testing.T) {
	s := need(t)
	for i, m := range modes {
		ways := slices.Sorted(maps.Keys(flagMakers))
		way := ways[i%len(ways)]
		t.Run(m.name+" by "+way, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, m.order)
			quiet := j.knock()
			j.wait(ims.WaitingOnUser)
			if log := j.log("prepare"); strings.Contains(log, "layout=layered") != m.dkms || !strings.Contains(log, " why=") {
				t.Errorf("the root is to be layered where sshd may mount, and the log to say why:\n%s", log)
			}
			proven := regexp.MustCompile(`msg="jail proven".* level=(\w+)`).FindStringSubmatch(j.log("sshd"))
			if m.level == "" && proven != nil || m.level != "" && (proven == nil || proven[1] != m.level) {
				t.Errorf("sshd says %q, want a jail of level %q", proven, m.level)
			}
			if out := j.ssh("echo ~root $IMS_JOB_ID $IMS_ARCH"); m.jail && out != fmt.Sprintf("/root %s x86_64\n", j.ID) {
				t.Errorf("the shell says %q", out)
			}
			if out, err := j.client("", "ssh", "root@127.0.0.1", "exit 7"); err == nil || err.(*exec.ExitError).ExitCode() != 7 {
				t.Errorf("exit 7: %v %s", err, out)
			}
			file := filepath.Join(t.TempDir(), "upload")
			if err := os.WriteFile(file, []byte(strings.Repeat("sent\x00", 50000)), 0o640); err != nil {
				t.Fatal(err)
			}
			j.scp(file, "remote:"+j.inside("/var/by-scp"))
			j.scp("remote:"+j.inside("/var/by-scp"), file+".back")
			if readFile(t, file) != readFile(t, file+".back") {
				t.Error("scp there and back changed the file")
			}
			j.sftp("put "+file+" "+j.inside("/var/by-sftp"), "ls "+j.inside("/boot"))
			j.ssh(fmt.Sprintf("cd %s/ && rm var/empty && echo appended >> etc/os-release && ln usr/lib/text var/third-name && "+
				"chmod 0700 var/lonely && ln -s /etc/shadow var/link", strings.TrimSuffix(j.inside("/"), "/")))
			quiet()
			flagMakers[way](j)
			j.wait(ims.Success)
			if codes := j.ends(); codes["prepare"] != 0 || codes["buildenv-sidecar"] != 0 || codes["sshd"] != 0 {
				t.Errorf("exit codes %v", codes)
			}
			if got, want := j.statuses(), []string{"fetching_image", "waiting_on_user", "packaging_artifacts", "success"}; !slices.Equal(got, want) {
				t.Errorf("statuses %q, want %q", got, want)
			}
			img := j.result(kernelText, initrdText)
			checkTree(t, s.base.file, img.file, append(traces(m.jail),
				"var/by-scp: only in the second tree", "var/by-sftp: only in the second tree",
				"var/empty: only in the first tree", "etc/os-release: size", "etc/os-release: sha256", "etc/os-release: mtime",
				"var/third-name: only in the second tree", "usr/lib/text: hard links", "usr/lib/text-again: hard links",
				"var/lonely: mode", "var/link: only in the second tree", "var: mtime")...)
			checkDocument(t, resultIn(t, j.log("buildenv-sidecar")))
			j.checkNothingLeft()
			if o := s.orphans(t); len(o) > 0 {
				t.Errorf("left in S3: %q", o)
			}
		})
	}
}

// traces are what every first customization leaves in an image: the cluster's
// authorities and a root-only /image. In a jailed one the user's flag was in /tmp.
func traces(jail bool) []string {
	all := []string{
		"etc: mtime", "etc/cray: only in the second tree", "etc/cray/ca: only in the second tree",
		"etc/cray/ca/certificate_authority.crt: only in the second tree",
		"image: mode", "image/config.xml: mode", "image/setup.sh: mode",
	}
	if jail {
		all = append(all, "tmp: mtime")
	}
	return all
}

// TestNothingDone hands a shell back as it was. A second time there is no
// difference at all.
func TestNothingDone(t *testing.T) {
	s := need(t)
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, m.order)
			j.wait(ims.WaitingOnUser)
			j.ssh("touch " + j.flag("complete"))
			j.wait(ims.Success)
			first := j.result(kernelText, initrdText)
			checkTree(t, s.base.file, first.file, traces(m.jail)...)
			m.image = first.id
			again := s.create(t, m.order)
			again.wait(ims.WaitingOnUser)
			again.ssh("touch " + again.flag("complete"))
			again.wait(ims.Success)
			// The flag was in /tmp, whose times are alike only when both jobs took less than a second.
			got := slices.DeleteFunc(differences(t, first.file, again.result(kernelText, initrdText).file),
				func(d string) bool { return m.jail && d == "tmp: mtime" })
			if len(got) > 0 {
				t.Errorf("the second image differs from the first in:\n%s", list(got))
			}
		})
	}
}

// resultIn finds the result document in a container's log.
func resultIn(t *testing.T, log string) string {
	t.Helper()
	start := strings.Index(log, "\n{\n")
	end := strings.LastIndex(log, "\n}\n")
	if start < 0 || end < start {
		t.Fatalf("no JSON document in:\n%s", log)
	}
	return log[start+1 : end+3]
}

// The documents' structure: names to kinds of values, lists by their members.
const artifactShape = `{"link": {"etag": "s", "path": "s", "type": "s"}, "md5": "s", "type": "s"}`

var successShape = `{
	"ims_image_artifacts": [` + strings.Repeat(artifactShape+",", 3) + artifactShape + `],
	"ims_image_record": {"arch": "s", "created": "s", "id": "s", "link": {"etag": "s", "path": "s", "type": "s"}, "metadata": {}, "name": "s"},
	"ims_job_record": {
		"arch": "s", "artifact_id": "s", "build_env_size": "n", "created": "s", "enable_debug": "b", "id": "s", "image_root_archive_name": "s",
		"initrd_file_name": "s", "job_mem_size": "n", "job_type": "s", "kernel_file_name": "s", "kernel_parameters_file_name": "s",
		"kubernetes_configmap": "s", "kubernetes_job": "s", "kubernetes_namespace": "s", "kubernetes_pvc": "s", "kubernetes_secret": "0",
		"kubernetes_service": "s", "public_key_id": "s", "remote_build_node": "s", "require_dkms": "b", "resultant_image_id": "s",
		"ssh_containers": [{"connection_info": {"cluster.local": {"host": "s", "port": "n"}, "customer_access": {"host": "s", "port": "n"}},
			"jail": "b", "name": "s", "status": "s"}],
		"status": "s"},
	"result": "s"}`

// shape replaces values by their kinds.
func shape(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := map[string]any{}
		for k, e := range v {
			m[k] = shape(e)
		}
		return m
	case []any:
		var l []any
		for _, e := range v {
			l = append(l, shape(e))
		}
		return l
	case string:
		return "s"
	case float64:
		return "n"
	case bool:
		return "b"
	}
	return "0"
}

// checkDocument compares the result of a successful job with the legacy's.
func checkDocument(t *testing.T, text string) {
	t.Helper()
	var got, want any
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("result: %v\n%s", err, text)
	}
	if err := json.Unmarshal([]byte(successShape), &want); err != nil {
		t.Fatal(err)
	}
	a, _ := json.MarshalIndent(shape(got), "", " ")
	b, _ := json.MarshalIndent(want, "", " ")
	if string(a) != string(b) {
		t.Errorf("the result has the structure\n%s\nwant\n%s", a, b)
	}
	sorted, _ := json.MarshalIndent(got, "", "    ")
	if strings.TrimSpace(text) != string(sorted) {
		t.Errorf("keys not sorted or not four spaces:\n%s", text)
	}
	var doc struct {
		Result string
		Image  struct{ Name string } `json:"ims_image_record"`
		Job    struct {
			Image string `json:"resultant_image_id"`
		} `json:"ims_job_record"`
	}
	if err := json.Unmarshal([]byte(text), &doc); err != nil || doc.Result != "success" || doc.Job.Image == "" {
		t.Errorf("%v: %s", err, text)
	}
}
