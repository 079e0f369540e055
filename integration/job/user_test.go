// SPDX-License-Identifier: Apache-2.0

package job

import (
	"bytes"
	"context"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// user is somebody with an SSH key that IMS knows.
type user struct {
	file  string // private key; file.pub beside it
	keyID string
}

func newUser(t *testing.T, w *world, file string) user {
	t.Helper()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "user", "-f", file).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	key, err := w.ims.CreatePublicKey(t.Context(), "user", readFile(t, file+".pub"))
	if err != nil {
		t.Fatal(err)
	}
	return user{file, key.ID}
}

// options are those of ssh, sftp and scp alike.
func (u user) options(port int) []string {
	args := []string{"-F", "/dev/null", "-i", u.file, "-o", "Port=" + strconv.Itoa(port)}
	for _, o := range []string{"IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR",
		"BatchMode=yes", "ConnectTimeout=30"} {
		args = append(args, "-o", o)
	}
	return args
}

// client runs one of OpenSSH's programs to its end.
func (j *job) client(stdin, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(j.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append(j.user.options(j.port), args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		return out.String() + errs.String(), err
	}
	return out.String(), nil
}

// ssh runs a command in the job's shell; it must succeed.
func (j *job) ssh(command string) string {
	j.t.Helper()
	out, err := j.client("", "ssh", "root@127.0.0.1", command)
	if err != nil {
		j.t.Fatalf("ssh %q: %v\n%s", command, err, out)
	}
	return out
}

// sftp runs a batch of commands; all must succeed.
func (j *job) sftp(batch ...string) string {
	j.t.Helper()
	out, err := j.client(strings.Join(batch, "\n")+"\n", "sftp", "-q", "-b", "-", "root@127.0.0.1")
	if err != nil {
		j.t.Fatalf("sftp %q: %v\n%s", batch, err, out)
	}
	return out
}

// scp copies; "remote:" stands for the job.
func (j *job) scp(args ...string) {
	j.t.Helper()
	for i, a := range args {
		if name, ok := strings.CutPrefix(a, "remote:"); ok {
			args[i] = "root@127.0.0.1:" + name
		}
	}
	if out, err := j.client("", "scp", append([]string{"-q"}, args...)...); err != nil {
		j.t.Fatalf("scp %q: %v\n%s", args, err, out)
	}
}
