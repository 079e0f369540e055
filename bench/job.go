// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// jobs times what a user waits for, from `touch complete` to the status success,
// and what the legacy containers do in that time: mksquashfs of the tree, its MD5
// sum, and the upload of everything to a server of the same kind. Beside what is
// sent to the store stands the least that could be: what is new in the root file
// system, and boot files that are new. The start is from the end of the download to
// the first login that works.
func jobs(ctx context.Context, bin, image, work, only string, w io.Writer) error {
	dir := filepath.Join(work, "jobs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "id")).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w\n%s", err, out)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "job, from complete to success\tours\tlegacy sequence\tfaster\tgoal\tfetched to login\tMiB sent\tfloor\tof\tshare\t\n")
	for _, c := range []struct {
		name, edit string
	}{
		{"nothing changed", "true"},
		{"three packages and an initrd", `export DEBIAN_FRONTEND=noninteractive
apt-get -qq update >/dev/null; apt-get -qq install -y --no-install-recommends jq tree bc >/dev/null 2>&1
update-initramfs -u -k "$(readlink /boot/vmlinuz | cut -d- -f2-)" >/dev/null 2>&1; rm -rf /var/lib/apt/lists/* /var/cache/apt/*`},
	} {
		if !strings.Contains(c.name, only) {
			continue
		}
		j := jobBench{bin: bin, image: image, dir: dir}
		start, ours, sent, err := j.run(ctx, c.edit)
		if err != nil {
			return fmt.Errorf("job with %s: %w", c.name, err)
		}
		theirs, err := j.legacy(ctx)
		if err != nil {
			return fmt.Errorf("legacy sequence: %w", err)
		}
		const mib = 1 << 20
		fmt.Fprintf(table, "%s\t%.2fs\t%.2fs\t%.1fx\t%.1fx\t%.2fs\t%.1f\t%.1f\t%.1f\t%.1f %%\t\n", c.name, ours.Seconds(), theirs.Seconds(),
			theirs.Seconds()/ours.Seconds(), 20.0, start.Seconds(), float64(sent.sent)/mib, float64(sent.floor)/mib, float64(sent.all)/mib, 100*float64(sent.sent)/float64(sent.all))
	}
	return table.Flush()
}

type jobBench struct{ bin, image, dir string }

var sshPort = regexp.MustCompile(`"status":"waiting_on_user".*"ssh_port":(\d+)`)

var (
	stored = regexp.MustCompile(`msg="object stored".* object=\S+/(\S+) bytes=(\d+) sent=(\d+)`)
	early  = regexp.MustCompile(`msg="sent before it is whole".* bytes=(\d+)`)
	reused = regexp.MustCompile(`msg="unchanged data was taken over.* new=(\d+)`)
)

// traffic is what a job had to do with the store, in bytes.
type traffic struct{ sent, floor, all int64 }

// trafficOf reads it from the log of the job's end.
func trafficOf(log string) (t traffic, err error) {
	number := func(s string) int64 {
		n, nerr := strconv.ParseInt(s, 10, 64)
		err = errors.Join(err, nerr)
		return n
	}
	for _, m := range stored.FindAllStringSubmatch(log, -1) {
		bytes, sent := number(m[2]), number(m[3])
		t.all, t.sent = t.all+bytes, t.sent+sent
		if m[1] == "rootfs" {
			if r := reused.FindStringSubmatch(log); r != nil {
				bytes = number(r[1])
			}
			t.floor += bytes
		} else if sent == bytes {
			t.floor += bytes
		}
	}
	if m := early.FindStringSubmatch(log); m != nil {
		t.sent += number(m[1])
	}
	if t.all == 0 {
		err = errors.Join(err, errors.New("the job's log does not say what it stored"))
	}
	return t, err
}

var (
	fetched  = regexp.MustCompile(`time=(\S+) .*msg="fetch image done"`)
	loggedIn = regexp.MustCompile(`time=(\S+) .*msg="a login works"`)
)

// startOf reads from the log how long the root took to be there.
func startOf(log string) (time.Duration, error) {
	var at [2]time.Time
	for i, line := range []*regexp.Regexp{fetched, loggedIn} {
		m := line.FindStringSubmatch(log)
		if m == nil {
			return 0, fmt.Errorf("the job's log has no line like %s", line)
		}
		var err error
		if at[i], err = time.Parse(time.RFC3339Nano, m[1]); err != nil {
			return 0, err
		}
	}
	return at[1].Sub(at[0]), nil
}

// run does one job and returns the times from the downloaded image to a login, and
// from the flag to the end.
func (j jobBench) run(ctx context.Context, edit string) (login, end time.Duration, sent traffic, err error) {
	events := filepath.Join(j.dir, "events")
	os.Remove(events)
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(j.bin, "imslocal"), "run", "--image", j.image, "--key", filepath.Join(j.dir, "id.pub"),
		"--jail", "--events", events, "--output", filepath.Join(j.dir, "new.sqsh"))
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		return 0, 0, traffic{}, err
	}
	defer func() {
		if err != nil { // otherwise it ends by itself
			cmd.Process.Signal(syscall.SIGTERM)
		}
		if werr := cmd.Wait(); err == nil {
			err = werr
		}
		if err == nil {
			text := log.String()
			if login, err = startOf(text); err != nil {
				return
			}
			sent, err = trafficOf(text[max(0, strings.LastIndex(text, "the shell is closed")):])
		}
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, log.Bytes())
		}
	}()
	m, err := awaitEvent(ctx, cmd, events, sshPort)
	if err != nil {
		return 0, 0, traffic{}, err
	}
	ssh := func(script string) error {
		c := exec.CommandContext(ctx, "ssh", "-F", "/dev/null", "-i", filepath.Join(j.dir, "id"), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no",
			"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-p", m[1], "root@127.0.0.1", script)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("ssh: %w\n%s", err, out)
		}
		return nil
	}
	if err := ssh("set -e\n" + edit); err != nil {
		return 0, 0, traffic{}, err
	}
	flag := time.Now()
	if err := ssh("touch /tmp/complete"); err != nil {
		return 0, 0, traffic{}, err
	}
	if _, err := awaitEvent(ctx, cmd, events, regexp.MustCompile(`"status":"success"`)); err != nil {
		return 0, 0, traffic{}, err
	}
	return 0, time.Since(flag), traffic{}, nil // the log, when it is whole, tells the rest
}

// awaitEvent waits until a line of the event file matches.
func awaitEvent(ctx context.Context, cmd *exec.Cmd, events string, want *regexp.Regexp) ([]string, error) {
	for {
		b, _ := os.ReadFile(events)
		if m := want.FindStringSubmatch(string(b)); m != nil {
			return m, nil
		}
		if strings.Contains(string(b), `"status":"error"`) || cmd.Process.Signal(syscall.Signal(0)) != nil {
			return nil, fmt.Errorf("the job ended without %s", want)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// sumAndPut is what the legacy containers do with legacy.sqsh and the boot files of the tree $1: the sums of all, then the
// upload of all, to the store at $2.
const sumAndPut = `md5sum legacy.sqsh "$1/boot/vmlinuz" "$1/boot/initrd" >/dev/null
put() { curl -fsS -T "$1" -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' --aws-sigv4 aws:amz:us-east-1:s3 -u "$S3_ACCESS_KEY:$S3_SECRET_KEY" "http://$2/boot-images/legacy/$3"; }
put legacy.sqsh "$2" rootfs; put "$1/boot/vmlinuz" "$2" kernel; put "$1/boot/initrd" "$2" initrd; rm legacy.sqsh`

// legacy does with the tree of the new image what the legacy containers do: pack, then make the sums, then upload.
func (j jobBench) legacy(ctx context.Context) (time.Duration, error) {
	tree, data := filepath.Join(j.dir, "tree"), filepath.Join(j.dir, "data")
	defer os.RemoveAll(tree)
	defer os.RemoveAll(data)
	if out, err := exec.CommandContext(ctx, filepath.Join(j.bin, "sidecar"), "unpack", filepath.Join(j.dir, "new.sqsh"), tree).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%w\n%s", err, out)
	}
	s, err := serveStore(ctx, j.bin, j.dir)
	if err != nil {
		return 0, err
	}
	defer s.stop()
	cmd := exec.CommandContext(ctx, "bash", "-euc", `cd "$0"; s=$(date +%s%N)
mksquashfs tree legacy.sqsh -noappend -no-progress -quiet
`+sumAndPut+`
echo $(($(date +%s%N) - s))`, j.dir, "tree", s.address)
	cmd.Env = s.environ()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%w\n%s", err, stderr.Bytes())
	}
	return time.ParseDuration(strings.TrimSpace(string(out)) + "ns")
}
