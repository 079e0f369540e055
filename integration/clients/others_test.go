// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit/tree"
)

func TestDropbear(t *testing.T) {
	testkit.NeedTool(t, "dbclient", "dropbearconvert")
	each(t, func(t *testing.T, g *gateway) {
		key := filepath.Join(t.TempDir(), "id_dropbear")
		must(t, client("dropbearconvert", "openssh", "dropbear", g.identity, key))
		dbclient := func(options ...string) func(string) *exec.Cmd {
			return func(command string) *exec.Cmd {
				// -y -y: it would want to keep the host key in a home.
				return client("dbclient", append(options, "-y", "-y", "-i", key, "-p", g.port, "root@127.0.0.1", command)...)
			}
		}
		checkExecs(t, dbclient())
		// dbclient 2022.83 with a pipe for its input does not notice the end of its session once in some
		// hundreds, whether OpenSSH's sshd serves it or ours (2 of 400, 4 of 1,500).
		checkCat(t, dbclient(), 4)
		p := onTerminal(t, dbclient("-t")("[ -t 0 ] && stty size"))
		if code := p.end(); code != 0 || !strings.Contains(p.text(), "24 80\r\n") {
			t.Errorf("on a terminal: %d, %q", code, p.text())
		}
		// Its own -L, to the gateway itself: what answers there is an SSH server.
		shared.mu.Lock()
		nextPort++
		local := fmt.Sprintf("127.0.0.1:%d", nextPort)
		shared.mu.Unlock()
		tunnel := client("dbclient", "-N", "-y", "-y", "-i", key, "-p", g.port, "-L", local+":127.0.0.1:"+g.port, "root@127.0.0.1")
		if err := tunnel.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			tunnel.Process.Kill()
			tunnel.Wait()
		}()
		eventually(t, "the server's version through the tunnel", func() bool {
			nc, err := net.Dial("tcp", local)
			if err != nil {
				return false
			}
			defer nc.Close()
			line, _ := bufio.NewReader(nc).ReadString('\n')
			return strings.HasPrefix(line, "SSH-2.0-")
		})
	})
}

func TestPuTTY(t *testing.T) {
	testkit.NeedTool(t, "puttygen", "plink", "psftp", "pscp")
	each(t, func(t *testing.T, g *gateway) {
		local := t.TempDir()
		key := filepath.Join(local, "key.ppk")
		must(t, client("puttygen", g.identity, "-O", "private", "-o", key))
		fingerprint := strings.Fields(must(t, client("ssh-keygen", "-lf", filepath.Join(g.dir, "host.pub"))))[1]
		knowing := func(host, name string, args ...string) *exec.Cmd {
			cmd := client(name, append([]string{"-batch", "-P", g.port, "-i", key, "-hostkey", host}, args...)...)
			cmd.Env = append(cmd.Env, "HOME="+local)
			return cmd
		}
		putty := func(name string, args ...string) *exec.Cmd { return knowing(fingerprint, name, args...) }
		plink := func(command string) *exec.Cmd { return putty("plink", "root@127.0.0.1", command) }
		checkExecs(t, plink)
		checkCat(t, plink, 1)
		if out := must(t, putty("plink", "-t", "root@127.0.0.1", "[ -t 0 ] && stty -opost && echo terminal")); out != "terminal\n" {
			t.Errorf("on a terminal: %q", out)
		}
		// The judge can say no.
		if _, errs, code := run(t, knowing("SHA256:"+strings.Repeat("A", 43), "plink", "root@127.0.0.1", "true")); code == 0 {
			t.Errorf("another host key: %d, %q", code, errs)
		}

		here, there := g.space(t)
		data := noise(1<<20 + 3)
		from := filepath.Join(local, "from")
		save(t, from, data)
		batch := filepath.Join(local, "batch")
		save(t, batch, fmt.Appendf(nil, "mkdir %[1]s/d\nput %[2]s %[1]s/d/a\nmv %[1]s/d/a %[1]s/d/b\nchmod 4750 %[1]s/d/b\nget %[1]s/d/b %[2]s.back\nls %[1]s/d\nrm %[1]s/d/b\nrmdir %[1]s/d\nput %[2]s %[1]s/left\n", there, from))
		if out := must(t, putty("psftp", "-b", batch, "root@127.0.0.1")); !strings.Contains(out, "-rwsr-x---") {
			t.Errorf("psftp: %s", out)
		}
		same(t, from+".back", data)
		same(t, filepath.Join(here, "left"), data)
		for _, protocol := range []string{"-sftp", "-scp"} {
			must(t, putty("pscp", protocol, "-p", from, "root@127.0.0.1:"+there+"/to"+protocol))
			must(t, putty("pscp", protocol, "-p", "root@127.0.0.1:"+there+"/to"+protocol, from+protocol))
			same(t, filepath.Join(here, "to"+protocol), data)
			same(t, from+protocol, data)
		}
	})
}

// curl is libssh2 with options.
func TestLibssh2(t *testing.T) {
	testkit.NeedTool(t, "curl")
	if out := must(t, client("curl", "-V")); !strings.Contains(out, "libssh2/") || !strings.Contains(out, "sftp") {
		t.Fatalf("this curl has no libssh2: %s", out)
	}
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		data := noise(3<<20 + 9)
		local := t.TempDir()
		from, back := filepath.Join(local, "from"), filepath.Join(local, "back")
		save(t, from, data)
		host := strings.Fields(must(t, client("ssh-keygen", "-lf", filepath.Join(g.dir, "host.pub"))))[1]
		curl := func(args ...string) string {
			t.Helper()
			return must(t, client("curl", append([]string{"-sS", "--user", "root:", "--key", g.identity, "--pubkey", g.identity + ".pub",
				"--hostpubsha256", strings.TrimPrefix(host, "SHA256:")}, args...)...))
		}
		sftp := "sftp://127.0.0.1:" + g.port + there
		scp := "scp://127.0.0.1:" + g.port + there
		curl("-T", from, sftp+"/up")
		same(t, filepath.Join(here, "up"), data)
		curl("-o", back, sftp+"/up")
		same(t, back, data)
		curl("-T", from, scp+"/scp-up")
		same(t, filepath.Join(here, "scp-up"), data)
		curl("-o", back, scp+"/scp-up")
		same(t, back, data)

		// Transfers that were broken off go on where they were, in both directions.
		save(t, filepath.Join(here, "part"), data[:1<<20])
		curl("-C", "-", "-T", from, sftp+"/part")
		same(t, filepath.Join(here, "part"), data)
		save(t, back, data[:2<<20])
		curl("-C", "-", "-o", back, sftp+"/part")
		same(t, back, data)
		if out := curl("-r", "10-19", sftp+"/up"); out != string(data[10:20]) {
			t.Errorf("a range: %q", out)
		}
		curl("-T", from, "--ftp-create-dirs", sftp+"/new/dir/file")
		same(t, filepath.Join(here, "new/dir/file"), data)
		out := curl(
			"-Q", "mkdir "+there+"/made", "-Q", "rename "+there+"/up "+there+"/made/moved",
			"-Q", "chown 1 "+there+"/made/moved", "-Q", "chgrp 2 "+there+"/made/moved", "-Q", "chmod 4711 "+there+"/made/moved", "-Q", "ln moved "+there+"/made/link", "-Q", "rm "+there+"/scp-up", sftp+"/made/")
		if !strings.Contains(out, "-rws--x--x") || !strings.Contains(out, "link -> moved") {
			t.Errorf("the directory:\n%s", out)
		}
		snap, err := tree.Take(here)
		if err != nil {
			t.Fatal(err)
		}
		if e := snap["made/moved"]; e.Mode&0o7777 != 0o4711 || e.UID != 1 || e.GID != 2 || e.Size != int64(len(data)) {
			t.Errorf("made/moved: %+v", e)
		}
		if e := snap["made/link"]; e.Target != "moved" {
			t.Errorf("made/link: %+v", e)
		}
		if _, there := snap["scp-up"]; there {
			t.Error("scp-up was not removed")
		}
	})
}

func TestLFTP(t *testing.T) {
	testkit.NeedTool(t, "lftp")
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		local := t.TempDir()
		tree.Make(t, local, "data from/big 0640 1500000 random:2", "file from/d/e/f 0755 text", "symlink from/link d/e/f", "dir from/empty")
		cmd := client("lftp", "-c", fmt.Sprintf(`set sftp:connect-program "ssh -a -x -F %[1]s"; set cmd:fail-exit yes; set net:max-retries 1
open sftp://root:@job; mirror -R %[2]s/from %[3]s/to; mirror %[3]s/to %[2]s/back; mv %[3]s/to/d %[3]s/to/moved; cls -l %[3]s/to`, g.config, local, there))
		cmd.Env = append(cmd.Env, "HOME="+local)
		must(t, cmd)
		tree.Equal(t, filepath.Join(local, "from"), filepath.Join(local, "back"), tree.NoMtime)
		if err := os.Rename(filepath.Join(here, "to/moved"), filepath.Join(here, "to/d")); err != nil {
			t.Error(err)
		}
		tree.Equal(t, filepath.Join(local, "from"), filepath.Join(here, "to"), tree.NoMtime)
	})
}

func TestGit(t *testing.T) {
	testkit.NeedTool(t, "git")
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		local := t.TempDir()
		git := func(args ...string) string {
			t.Helper()
			cmd := client("git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"}, args...)...)
			cmd.Env = append(cmd.Env, "GIT_SSH_COMMAND=ssh -F "+g.config, "GIT_CONFIG_GLOBAL=/dev/null")
			cmd.Dir = local
			return must(t, cmd)
		}
		git("init", "-q", "--bare", filepath.Join(here, "repository"))
		git("init", "-q", "work")
		tree.Make(t, local, "data work/big 0644 2000000 random:3", "file work/text 0644 text")
		git("-C", "work", "add", ".")
		git("-C", "work", "commit", "-qm", "first")
		git("-C", "work", "push", "-q", "job:"+there+"/repository", "main")
		git("clone", "-q", "job:"+there+"/repository", "clone")
		if a, b := git("-C", "work", "rev-parse", "HEAD"), git("-C", "clone", "rev-parse", "HEAD"); a != b {
			t.Errorf("pushed %s, cloned %s", a, b)
		}
	})
}

// A file system over sftp, used as one.
func TestSSHFS(t *testing.T) {
	testkit.NeedTool(t, "sshfs", "fusermount3", "mountpoint", "bash")
	if _, err := os.Stat("/dev/fuse"); err != nil && !testkit.InCI() {
		t.Skip("needs /dev/fuse")
	}
	each(t, func(t *testing.T, g *gateway) {
		here, there := g.space(t)
		local := t.TempDir()
		mnt := filepath.Join(local, "mnt")
		if err := os.Mkdir(mnt, 0o755); err != nil {
			t.Fatal(err)
		}
		must(t, g.tool(t, "sshfs", "job:"+there, mnt))
		mounted := true
		t.Cleanup(func() {
			if mounted {
				run(t, client("fusermount3", "-uz", mnt))
			}
		})
		data := noise(16<<20 + 11)
		save(t, filepath.Join(local, "big"), data)
		cmd := client("bash", "-c", `set -e; cp ../big big; cmp ../big big; mv big moved; mkdir -p d/e; echo text > d/e/f; echo more >> d/e/f
mv d/e/f moved2; mv moved2 moved3; ln -s moved link; cmp ../big link; chmod 4755 moved; dd if=../big of=moved bs=1000 seek=5 skip=5 count=3 conv=notrunc status=none
truncate -s 7 moved3; rm link; ! rmdir d 2>/dev/null; rmdir d/e; for i in $(seq 100); do echo $i > n$i; done; ls | wc -l; sync -f .; df . >/dev/null`)
		cmd.Dir = mnt
		if out := must(t, cmd); out != "103\n" {
			t.Errorf("%s names", out)
		}
		same(t, filepath.Join(here, "moved"), data)
		same(t, filepath.Join(here, "moved3"), []byte("text\nmo"))
		must(t, client("fusermount3", "-u", mnt))
		mounted = false
	})
}
