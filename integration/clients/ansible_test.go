// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

const play = `
- hosts: all
  gather_facts: true
  gather_subset: ["!all", "!min", "env"]
  tasks:
    - ping:
    - assert: {that: ansible_env.IMS_ARCH == "x86_64"}
    - copy: {src: big, dest: "{{ there }}/big", mode: "4750", owner: "12", group: "34"}
    - template: {src: template.j2, dest: "{{ there }}/made"}
    - shell: cat
      args: {stdin: "{{ inventory_hostname }}"}
      register: r
    - assert: {that: r.stdout == inventory_hostname}
    - fetch: {src: "{{ there }}/big", dest: "fetched/{{ inventory_hostname }}", flat: true}
`

// One playbook over all levels at once, in which Ansible sends its modules by sftp.
func TestAnsible(t *testing.T) {
	testkit.NeedTool(t, "ansible-playbook")
	program(t)
	local := t.TempDir()
	inventory := ""
	data := noise(3 << 20)
	save(t, filepath.Join(local, "big"), data)
	save(t, filepath.Join(local, "template.j2"), []byte("on {{ inventory_hostname }}\n"))
	save(t, filepath.Join(local, "play.yml"), []byte(play))
	results := map[level]string{}
	for _, l := range []level{plain, chroot, namespaces} {
		g := common(t, l)
		here, there := g.space(t)
		results[l] = here
		inventory += fmt.Sprintf("%s ansible_host=job ansible_port=%s ansible_ssh_common_args='-F %s' there=%s\n", l, g.port, g.config, there)
	}
	save(t, filepath.Join(local, "hosts"), []byte(inventory+"[all:vars]\nansible_python_interpreter=/usr/bin/python3\n"))
	cmd := client("ansible-playbook", "-i", "hosts", "play.yml")
	cmd.Dir = local
	cmd.Env = append(cmd.Env, "HOME="+local, "ANSIBLE_NOCOLOR=1", "ANSIBLE_PIPELINING=False",
		"ANSIBLE_SSH_CONTROL_PATH_DIR="+filepath.Join(local, "cp"))
	out, errs, code := run(t, cmd)
	if code != 0 || strings.Count(out, "unreachable=0    failed=0") != len(results) {
		t.Fatalf("ansible-playbook: %d\n%s%s", code, out, errs)
	}
	for l, here := range results {
		same(t, filepath.Join(here, "big"), data)
		same(t, filepath.Join(here, "made"), []byte("on "+string(l)+"\n"))
		same(t, filepath.Join(local, "fetched", string(l)), data)
		if st, err := os.Stat(filepath.Join(here, "big")); err != nil || st.Mode() != 0o750|os.ModeSetuid {
			t.Errorf("big: %v, %v", st, err)
		}
	}
}
