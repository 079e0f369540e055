// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Sizes of what is moved and listed.
const (
	payloadBytes  = 256 << 20
	listedEntries = 50_000
)

// sshBench compares the gateway with OpenSSH's sshd: same client, same key, loopback, each server's and the client's
// default choice of algorithms.
type sshBench struct {
	ctx     context.Context
	sshd    string // our program
	dir     string // keys and configurations; its parents belong to root, as ChrootDirectory demands
	job     string // in it: IMAGE_ROOT_PARENT
	work    string // a tmpfs for what is moved
	daemons []*daemon
}

// ssh compares the servers, each plain and in the tree of image.
func ssh(ctx context.Context, bin, image, work string) ([]comparison, func(), error) {
	b, err := newSSHBench(ctx, bin, work)
	if err != nil {
		return nil, nil, err
	}
	list, err := b.prepare(bin, image)
	if err != nil {
		b.close()
		return nil, nil, err
	}
	return list, b.close, nil
}

// newSSHBench makes the keys and the directory of a job.
func newSSHBench(ctx context.Context, bin, work string) (*sshBench, error) {
	b := &sshBench{ctx: ctx, sshd: filepath.Join(bin, "sshd"), work: filepath.Join(work, "ssh")}
	var err error
	if b.dir, err = os.MkdirTemp("/var/lib", "ims-buildenv-bench"); err != nil {
		return nil, err
	}
	b.job = filepath.Join(b.dir, "job")
	err = b.commands([][]string{
		{"chmod", "755", b.dir},
		{"mkdir", "-p", filepath.Join(b.job, "image-root"), "/run/sshd"},
		{"touch", filepath.Join(b.job, "ready")},
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(b.dir, "id")},
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(b.dir, "host")},
		{"cp", filepath.Join(b.dir, "id.pub"), filepath.Join(b.dir, "authorized_keys")},
	})
	if err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *sshBench) commands(list [][]string) error {
	for _, argv := range list {
		if out, err := exec.CommandContext(b.ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", argv, err, out)
		}
	}
	return nil
}

func (b *sshBench) close() {
	for _, d := range b.daemons {
		d.stop()
	}
	unix.Unmount(b.work, unix.MNT_DETACH)
	os.RemoveAll(b.dir)
}

func (b *sshBench) prepare(bin, image string) ([]comparison, error) {
	if err := os.Mkdir(b.work, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("none", b.work, "tmpfs", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs for what is moved (needs root): %w", err)
	}
	root := filepath.Join(b.job, "image-root")
	err := b.commands([][]string{
		{"rmdir", root},
		{filepath.Join(bin, "sidecar"), "unpack", image, root},
		{"bash", "-euc", `cd "$0"; mkdir list; cd list; seq ` + strconv.Itoa(listedEntries) + ` | xargs touch
head -c ` + strconv.Itoa(payloadBytes) + ` /dev/urandom > ../payload`, b.work},
	})
	if err != nil {
		return nil, err
	}
	var plain, jailed [2]*daemon
	for _, s := range []struct {
		to      **daemon
		program string
		lines   string
		env     []string
	}{
		{&plain[0], b.sshd, "", jobEnv(b.job, "False")},
		{&plain[1], "/usr/sbin/sshd", "", nil},
		{&jailed[0], b.sshd, "", jobEnv(b.job, "True")},
		{&jailed[1], "/usr/sbin/sshd", "ChrootDirectory " + root, nil},
	} {
		if *s.to, err = b.start(s.program, s.lines, s.env, ""); err != nil {
			return nil, err
		}
		b.daemons = append(b.daemons, *s.to)
	}
	return b.comparisons(plain, jailed), nil
}

func jobEnv(job, jail string) []string {
	return []string{"IMS_JOB_ID=bench", "IMS_ACTION=customize", "SSH_JAIL=" + jail, "SSHD_OPTIONS=", "IMAGE_ROOT_PARENT=" + job}
}

// options are the client's, for a shell.
func (b *sshBench) options() string {
	return "-F /dev/null -i " + filepath.Join(b.dir, "id") +
		" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
}

func (b *sshBench) comparisons(plain, jailed [2]*daemon) []comparison {
	pair := func(name string, d [2]*daemon, atLeast float64, script string) comparison {
		shell := func(d *daemon) side {
			vars := fmt.Sprintf("cd %s; P=%d; O='%s'; run() { ssh $O -p $P root@127.0.0.1 \"$@\"; }; ftp() { sftp -q $O -P $P -b - root@127.0.0.1; }\n",
				b.work, d.port, b.options())
			return side{argv: []string{"bash", "-euc", vars + script}, server: d.cpu}
		}
		return comparison{name: name + ", vs OpenSSH", ours: shell(d[0]), theirs: shell(d[1]), goals: goals{speed: atLeast}}
	}
	const (
		connect  = `for i in $(seq 20); do run true; done`
		parallel = `for i in $(seq 50); do run true & done; wait`
		shared   = `S="-o ControlPath=$PWD/m$P"; ssh $O $S -p $P -M -N root@127.0.0.1 & M=$!
while [ ! -S m$P ]; do sleep 0.01; done
for i in $(seq 100); do run $S true; done
ssh $O $S -O exit root@127.0.0.1; wait $M || true`
	)
	self, _ := filepath.Abs(os.Args[0])
	// ssh takes longer to start than a server takes to run true: a client without that, too.
	goClient := self + " -execs 127.0.0.1:$P -key " + filepath.Join(b.dir, "id")
	return []comparison{
		pair("20 connections with one exec each", plain, 5, connect),
		pair("20 connections with one exec each, jailed", jailed, 4, connect),
		pair("50 connections at once", plain, 4, parallel),
		pair("100 execs on one connection", plain, 2, shared),
		pair("100 execs on one connection, jailed", jailed, 2, shared),
		pair("100 execs by Go's client", plain, 2, goClient),
		pair("100 execs by Go's client, jailed", jailed, 2, goClient),
		pair("sftp put 256 MiB", plain, 1.2, `rm -f put; echo "put payload $PWD/put" | ftp`),
		pair("sftp get 256 MiB", plain, 1.2, `rm -f got; echo "get $PWD/payload got" | ftp`),
		pair("ssh cat > of 256 MiB", plain, 1.2, `rm -f put; run "cat > $PWD/put" < payload`),
		pair("ssh cat of 256 MiB", plain, 1.2, `run "cat $PWD/payload" > /dev/null`),
		pair("sftp list of 50,000 entries", plain, 1, `echo "ls -l $PWD/list" | ftp > /dev/null`),
	}
}
