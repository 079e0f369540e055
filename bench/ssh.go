// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// ssh compares the gateway, plain, with OpenSSH's sshd: same client, same key, loopback.
func ssh(ctx context.Context, bin, _, work string) ([]comparison, func(), error) {
	key := filepath.Join(work, "id")
	for _, argv := range [][]string{
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key},
		{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(work, "host")},
		{"cp", key + ".pub", filepath.Join(work, "authorized_keys")},
		{"mkdir", "-p", filepath.Join(work, "job/image-root"), "/run/sshd"},
		{"touch", filepath.Join(work, "job/ready")},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, nil, fmt.Errorf("%v: %w\n%s", argv, err, out)
		}
	}
	var daemons []*exec.Cmd
	stop := func() {
		for _, d := range daemons {
			d.Process.Signal(syscall.SIGTERM)
			d.Wait()
		}
	}
	serve := func(name string, env []string) (int, error) {
		port, err := freePort()
		if err != nil {
			return 0, err
		}
		config := filepath.Join(work, filepath.Base(filepath.Dir(name))+".conf")
		text := fmt.Sprintf("Port %d\nListenAddress 127.0.0.1\nHostKey %s\nPermitRootLogin yes\nPubkeyAuthentication yes\n"+
			"AuthorizedKeysFile %s\nPasswordAuthentication no\nStrictModes no\nMaxStartups 200\nSubsystem sftp internal-sftp\n",
			port, filepath.Join(work, "host"), filepath.Join(work, "authorized_keys"))
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return 0, err
		}
		d := exec.CommandContext(ctx, name, "-D", "-e", "-f", config)
		d.Env = append(os.Environ(), env...)
		if err := d.Start(); err != nil {
			return 0, err
		}
		daemons = append(daemons, d)
		for range 100 {
			if c, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(port)); err == nil {
				return port, c.Close()
			}
			time.Sleep(50 * time.Millisecond)
		}
		return 0, fmt.Errorf("%s does not listen", name)
	}
	ours, err := serve(filepath.Join(bin, "sshd"), []string{
		"IMS_JOB_ID=bench", "IMS_ACTION=customize", "SSH_JAIL=False", "SSHD_OPTIONS=",
		"IMAGE_ROOT_PARENT=" + filepath.Join(work, "job")})
	if err == nil {
		var theirs int
		if theirs, err = serve("/usr/sbin/sshd", nil); err == nil {
			return sshComparisons(work, key, ours, theirs), stop, nil
		}
	}
	stop()
	return nil, nil, err
}

func sshComparisons(work, key string, ours, theirs int) []comparison {
	options := "-F /dev/null -i " + key + " -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
	payload := filepath.Join(work, "payload")
	pair := func(name, script string) comparison {
		shell := func(port int) side {
			return side{argv: []string{"bash", "-euc", "O='" + options + "'; P=" + strconv.Itoa(port) + "; W=" + work + "\n" + script}}
		}
		return comparison{name: name + ", vs OpenSSH", ours: shell(ours), theirs: shell(theirs)}
	}
	return []comparison{
		pair("20 connections with one exec each", `for i in $(seq 20); do ssh $O -p $P root@127.0.0.1 true; done`),
		pair("50 connections at once", `for i in $(seq 50); do ssh $O -p $P root@127.0.0.1 true & done; wait`),
		pair("100 execs on one connection", `ssh $O -p $P -o ControlMaster=yes -o ControlPath=$W/m$P -fN root@127.0.0.1
for i in $(seq 100); do ssh $O -p $P -o ControlPath=$W/m$P root@127.0.0.1 true; done; ssh $O -o ControlPath=$W/m$P -O exit root@127.0.0.1`),
		pair("sftp put 256 MiB", `[ -s `+payload+` ] || head -c 268435456 /dev/urandom > `+payload+`
echo "put `+payload+` `+payload+`.remote" | sftp -q $O -P $P -b - root@127.0.0.1`),
		pair("sftp get 256 MiB", `echo "get `+payload+` `+payload+`.local" | sftp -q $O -P $P -b - root@127.0.0.1`),
		pair("ssh cat of 256 MiB", `ssh $O -p $P root@127.0.0.1 "cat `+payload+`" > /dev/null`),
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
