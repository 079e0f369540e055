// SPDX-License-Identifier: Apache-2.0

package works

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

const ansibleRow = "ansible: facts, copy, template, apt, async, become, 50 forks"

// play is what only a jail can get wrong; the rest of Ansible is tried in
// internal/gateway.
const play = `
- hosts: all
  tasks:
    - assert: {that: ["ansible_env.IMS_JOB_ID == 'works'", "ansible_distribution == 'Debian'"]}
    - command: id -un
      become: true
      become_method: "{{ item }}"
      loop: [sudo, su]
      register: r
      failed_when: r.stdout != "root"
    - command: id -un
      become: true
      become_user: alice
      register: r
      failed_when: r.stdout != "alice"
- hosts: h0
  gather_facts: false
  tasks:
    - template: {src: template, dest: /etc/from-template, mode: "0640"}
    - copy: {content: "copied\n", dest: /etc/from-copy, owner: alice}
    - user: {name: bob, shell: /bin/bash}
    - apt: {name: works-deb, state: absent, purge: true}
    - apt: {name: works-deb, state: present}
    - package: {name: sudo, state: present}
    - systemd: {name: works.service, enabled: true, masked: false}
    - shell: sleep 1; id > /root/async
      async: 60
      poll: 0
      register: job
    - meta: reset_connection
    - async_status: {jid: "{{ job.ansible_job_id }}"}
      register: a
      until: a.finished
      delay: 1
      retries: 60
    - command: cat /etc/from-template /etc/from-copy /root/async
      register: r
      failed_when: not r.stdout.startswith("job works\ncopied\nuid=0")
`

// forks is how many connections Ansible has to the job at once. With IMS_BUILDENV_SOAK=1 each also copies a file, which
// takes as long again and more.
const forks = 50

const (
	forksPlay = `
- hosts: all
  gather_facts: false
  tasks:
    - ping:
      become: true
`
	forksCopy = `
    - copy: {content: "{{ inventory_hostname }}", dest: "/root/from-{{ inventory_hostname }}"}
      become: true
`
)

// ansible runs the play on one host and, if many is set, one of few words on fifty at once.
func (c *container) ansible(t *testing.T, pipelining string, many bool) {
	dir := filepath.Join(c.dir, "ansible")
	inventory := ""
	for i := range forks {
		inventory += fmt.Sprintf("h%d ansible_host=job ansible_ssh_common_args='-F %s/ssh_config -o ControlPath=%s/cp-%d'\n", i, c.dir, c.dir, i)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.Make(t, dir, "file template 0644 job {{ ansible_env.IMS_JOB_ID | default('works') }}\n", "dir home 0700")
	for name, text := range map[string]string{"hosts": inventory, "play.yml": play} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ansible := func(pipelining string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, args[0], append(args[1:], "-i", filepath.Join(dir, "hosts"))...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "HOME="+filepath.Join(dir, "home"), "ANSIBLE_HOST_KEY_CHECKING=False", "ANSIBLE_NOCOLOR=1", "LC_ALL=C.UTF-8",
			"ANSIBLE_PYTHON_INTERPRETER=/usr/bin/env python3", "ANSIBLE_PIPELINING="+pipelining)
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "UNREACHABLE") {
			t.Errorf("%q, pipelining %s: %v\n%s", args, pipelining, err, out)
		}
		return string(out)
	}
	// One transport per level: the levels differ in nothing that Ansible's transports could notice.
	ansible(pipelining, "ansible-playbook", "-l", "h0", "play.yml")
	if !many {
		return
	}
	soak := os.Getenv("IMS_BUILDENV_SOAK") == "1"
	few, want := forksPlay, "ok=1    changed=0    unreachable=0    failed=0"
	if soak {
		few, want = few+forksCopy, "ok=2    changed=1    unreachable=0    failed=0"
	}
	if err := os.WriteFile(filepath.Join(dir, "forks.yml"), []byte(few), 0o644); err != nil {
		t.Fatal(err)
	}
	out := ansible("True", "ansible-playbook", "-f", fmt.Sprint(forks), "forks.yml")
	if n := strings.Count(out, want); n != forks {
		t.Errorf("%d of %d forks have done their work\n%s", n, forks, out)
	}
	for i := range forks {
		name := fmt.Sprintf("h%d", i)
		if got, err := os.ReadFile(filepath.Join(c.dir, "job/image-root/root/from-"+name)); soak && (err != nil || string(got) != name) {
			t.Errorf("what %s copied: %q, %v", name, got, err)
		}
	}
}
