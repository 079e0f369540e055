// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// A playbook whose last task creates the flag must end well on every host: with pipelining as on the site's systems, and
// without, where each task also sends files and cleans up after itself. integration/clients has Ansible's modules.
func TestAnsible(t *testing.T) {
	testkit.NeedTool(t, "ansible-playbook")
	const play = `
- hosts: all
  gather_facts: true
  gather_subset: ["!all", "!min", "env"]
  tasks:
    - assert: {that: ansible_env.IMS_JOB_ID == "11111111-2222-3333-4444-555555555555"}
    - raw: echo raw
    - shell: exit 3
      register: r
      failed_when: r.rc != 3
    - copy: {content: "some text\n", dest: "{{ parent }}/image-root/file-{{ inventory_hostname }}"}
    - fetch: {src: "{{ parent }}/image-root/file-{{ inventory_hostname }}", dest: "{{ local }}/"}
    - shell: sleep 1; touch {{ parent }}/image-root/async-{{ inventory_hostname }}
      async: 60
      poll: 0
      register: job
    - async_status: {jid: "{{ job.ansible_job_id }}"}
      register: a
      until: a.finished
      delay: 1
      retries: 30
    - copy: {content: "", dest: "{{ parent }}/complete"}
      run_once: true
`
	for name, env := range map[string]string{
		"pipelining": "ANSIBLE_PIPELINING=True",
		"scp":        "ANSIBLE_SSH_TRANSFER_METHOD=scp",
	} {
		t.Run(name, func(t *testing.T) {
			j := start(t, options{})
			dir := t.TempDir()
			_, port, _ := net.SplitHostPort(j.addr)
			const hosts = 3
			inventory := ""
			for i := range hosts {
				inventory += fmt.Sprintf("h%d ansible_host=127.0.0.1 ansible_port=%s\n", i, port)
			}
			inventory += fmt.Sprintf(`[all:vars]
ansible_user=root
ansible_ssh_private_key_file=%s
ansible_python_interpreter=/usr/bin/python3
ansible_ssh_common_args="-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentityAgent=none"
parent=%s
local=%s
`, j.key.path, j.parent, dir)
			j.write(filepath.Join(dir, "hosts"), inventory)
			j.write(filepath.Join(dir, "play.yml"), play)
			cmd := exec.Command("ansible-playbook", "-f", fmt.Sprint(hosts), "-i", filepath.Join(dir, "hosts"), filepath.Join(dir, "play.yml"))
			cmd.Env = append(os.Environ(), "HOME="+dir, "ANSIBLE_HOST_KEY_CHECKING=False", "ANSIBLE_NOCOLOR=1", "LC_ALL=C.UTF-8", env,
				"ANSIBLE_SSH_CONTROL_PATH_DIR="+filepath.Join(dir, "cp"), "ANSIBLE_SCP_EXTRA_ARGS=-O")
			out, errs, code := run(t, cmd)
			if code != 0 || strings.Count(out, "unreachable=0    failed=0") != hosts || strings.Contains(out+errs, "transfer mechanism") {
				t.Fatalf("ansible-playbook: %d\n%s%s", code, out, errs)
			}
			if err := j.await(); err != nil || j.flags() != "ready exiting" {
				t.Errorf("%v, flags %q", err, j.flags())
			}
			for i := range hosts {
				if _, err := os.Stat(filepath.Join(j.parent, "image-root", fmt.Sprintf("async-h%d", i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
