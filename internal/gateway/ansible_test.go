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

// A playbook whose last task creates the flag must end well on every host: with pipelining
// as on the site's systems, and with Ansible's defaults, where each task also sends files
// and cleans up after itself.
func TestAnsible(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	testkit.NeedTool(t, "ansible-playbook")
	const play = `
- hosts: all
  gather_facts: true
  tasks:
    - assert: {that: ansible_env.IMS_JOB_ID == "11111111-2222-3333-4444-555555555555"}
    - raw: echo raw
    - shell: exit 3
      register: r
      failed_when: r.rc != 3
    - copy: {content: "some text\n", dest: "{{ parent }}/image-root/file-{{ inventory_hostname }}"}
    - fetch: {src: "{{ parent }}/image-root/file-{{ inventory_hostname }}", dest: "{{ local }}/"}
    - shell: sleep 2; touch {{ parent }}/image-root/async-{{ inventory_hostname }}
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
		"defaults":   "ANSIBLE_PIPELINING=False",
		"scp":        "ANSIBLE_SSH_TRANSFER_METHOD=scp",
	} {
		t.Run(name, func(t *testing.T) {
			j := start(t, options{})
			dir := t.TempDir()
			_, port, _ := net.SplitHostPort(j.addr)
			const hosts = 5
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

// The site's orchestrator, in Python: a throw-away ECDSA key, a command whose end it does
// not wait for, and the connection closed at once.
func TestParamiko(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	const python = "/usr/bin/python3"
	testkit.NeedTool(t, python)
	if out, err := exec.Command(python, "-c", "import paramiko; print(paramiko.__version__)").CombinedOutput(); err != nil {
		if testkit.InCI() {
			t.Fatalf("needs paramiko: %s", out)
		}
		t.Skip("needs paramiko")
	}
	const script = `
import sys, paramiko
host, port, keyfile, target, loops = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
key = paramiko.ECDSAKey.from_private_key_file(keyfile)
def connect():
    c = paramiko.SSHClient()
    c.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    c.connect(host, port, username="root", pkey=key, allow_agent=False, look_for_keys=False)
    return c
c = connect()
stdin, out, err = c.exec_command("echo ~root && sleep 0")
assert out.read() == b"/root\n" and out.channel.recv_exit_status() == 0
stdin, out, err = c.exec_command("cat; echo err >&2; exit 42")
stdin.write("input"); stdin.channel.shutdown_write()
assert out.read() == b"input" and err.read() == b"err\n" and out.channel.recv_exit_status() == 42
c.open_sftp().putfo(open(keyfile, "rb"), target + "/uploaded")
c.close()
for i in range(loops):
    c = connect()
    c.exec_command("touch %s/%d" % (target, i))
    c.close()
`
	dir, target := t.TempDir(), t.TempDir()
	keyFile := filepath.Join(dir, "ecdsa")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-m", "PEM", "-f", keyFile).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	public, err := os.ReadFile(keyFile + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	j := start(t, options{keys: string(public)})
	const loops = 200
	ip, port, _ := net.SplitHostPort(j.addr)
	if out, err := exec.Command(python, "-c", script, ip, port, keyFile, target, fmt.Sprint(loops)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "all commands have run", func() bool {
		found, _ := os.ReadDir(target)
		return len(found) == loops+1
	})
}
