// SPDX-License-Identifier: Apache-2.0

package works

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"text/tabwriter"
)

// row is one thing people do. It works if the command succeeds and what it
// prints matches.
type row struct {
	name    string
	tty     bool
	command string
	want    string // regular expression
	not     string // must not match
}

// A package's scripts must have done all they are there for.
const (
	rpmChecks = ` && stat -c '%U %a' /usr/lib/works/tool /var/lib/works | tr '\n' ' ' && cat /var/lib/works/trigger &&
		getcap /usr/lib/works/tool && stat -c %F /var/lib/works/node && systemctl is-enabled works.service && ls -d /run/works`
	rpmWant  = `works 4755 works 700 triggered\n.*cap_net_raw=ep\ncharacter special file\nenabled\n/run/works\n$`
	rpmErase = `rpm -e works-probe && userdel works && rm -rf /run/works && ! systemctl is-enabled works.service && `
	kernel   = `v=$(ls /lib/modules | head -n 1); `
)

var rows = []row{
	{name: "session: environment", command: "env", want: `(?m)^SYSTEMD_OFFLINE=1$`},
	{name: "session: ttyname", tty: true, command: "tty; ls -l $(tty); echo > /dev/tty", want: `^/dev/pts/\d+\ncrw--w---- \d+ root tty `},
	{name: "session: process substitution", command: "bash -c 'cat <(echo through a pipe)'", want: "^through a pipe\n$"},
	{name: "session: /proc", command: "grep -c MemTotal /proc/meminfo; readlink /proc/self/exe", want: `^1\n/usr/bin/readlink\n$`},

	{name: "apt: update, install", command: "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy works-deb && stat -c '%U %F' /usr/share/works/data /usr/share/works/node",
		want: `works-deb regular file\nroot character special file\n$`, not: `(?i)can't open|cannot open|error|warning: can`},
	{name: "apt: on a terminal", tty: true, command: "apt-get purge -y works-deb && apt-get install -y works-deb",
		want: `Setting up works-deb`, not: `Can not write log|can't|error|not known in advance`},
	{name: "rpm: install with scriptlets", command: "rpm -i --nodeps /srv/rpm/x86_64/*.rpm" + rpmChecks, want: rpmWant},
	{name: "dnf: install with scriptlets", command: rpmErase + "dnf -q -y --releasever=12 install works-probe" + rpmChecks, want: rpmWant},
	{name: "zypper: install with scriptlets", tty: true, command: rpmErase + "zypper -n --no-gpg-checks refresh && zypper -n --no-gpg-checks install works-probe" + rpmChecks, want: rpmWant},

	{name: "initramfs: update-initramfs", command: kernel + "rm /boot/initrd.img-$v && update-initramfs -c -k $v && lsinitramfs /boot/initrd.img-$v | grep -c -e bin/busybox -e /modules.dep$", want: `\n[12]\n$`, not: `(?i)cannot|fail`},
	{name: "initramfs: dracut", command: kernel + "dracut --no-hostonly --no-early-microcode --no-compress --force -m 'base kernel-modules' --drivers 'ext4 overlay squashfs' /tmp/initrd $v && lsinitrd /tmp/initrd | grep squashfs.ko", want: `squashfs\.ko`, not: `(?i)fail|cannot`},
	{name: "modules: depmod, modinfo", command: kernel + "depmod -a $v && modinfo -k $v -F license squashfs", want: "^GPL\n$"},
	{name: "modules: dkms", command: kernel + "dkms install works-module/1.0 -k $v && modinfo -k $v -F description works_module && dkms status", want: `built in a jail\nworks-module/1.0, .*: installed\n$`, not: `(?i)fail|error`},

	{name: "users: useradd, groupadd", command: "groupadd -g 7777 crew && useradd -m -u 7777 -g crew -s /bin/bash alice && id alice", want: `^uid=7777\(alice\) gid=7777\(crew\)`},
	{name: "users: passwd, chpasswd", command: `echo alice:secret1 | chpasswd && printf 'secret2\nsecret2\n' | passwd alice && getent shadow alice | cut -d: -f2 | cut -c 1-3`, want: `password updated successfully\n\$y\$\n$`},
	{name: "users: su, su -", command: "su alice -c 'id -un; pwd' && su - alice -c 'id -un; pwd; echo $HOME'", want: "^alice\n/root\nalice\n/home/alice\n/home/alice\n$"},
	{name: "users: su - on a terminal", tty: true, command: "su - alice -c 'tty; id -un'", want: `/dev/pts/\d+\nalice\n$`},
	{name: "users: sudo, sudo -i", command: "sudo id -u && sudo -i pwd && sudo -u alice id -un && sudo -iu alice pwd", want: "^0\n/root\nalice\n/home/alice\n$"},
	{name: "users: sudo with requiretty, use_pty", tty: true, command: "echo 'Defaults requiretty, use_pty' > /etc/sudoers.d/tty && chmod 440 /etc/sudoers.d/tty && sudo -u alice sh -c 'tty; id -un'; rm /etc/sudoers.d/tty", want: `^/dev/pts/\d+\nalice\n$`},

	{name: "systemctl: enable, mask, offline", command: "systemctl disable works.service && systemctl enable works.service && systemctl mask remote-fs.target && systemctl is-enabled works.service remote-fs.target; systemctl daemon-reload && systemctl restart works.service", want: "enabled\nmasked\n"},
	{name: "systemctl: set-default", command: "systemctl set-default multi-user.target && readlink -f /etc/systemd/system/default.target", want: "multi-user.target\n$"},

	{name: "terminals: tmux", command: "tmux new-session -d -s s 'tty > /tmp/tmux.out; sleep 60' && i=0; while [ ! -s /tmp/tmux.out ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; cat /tmp/tmux.out && tmux list-sessions && tmux kill-server", want: `^/dev/pts/\d+\ns: 1 windows`},
	{name: "terminals: tmux attached", tty: true, command: "tmux -f /dev/null new-session 'echo inside; sleep 0.5' ", want: "inside"},
	{name: "terminals: screen", command: "screen -dmS s sh -c 'tty > /tmp/screen.out'; i=0; while [ ! -s /tmp/screen.out ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; cat /tmp/screen.out", want: `^/dev/pts/\d+\n$`},
	{name: "terminals: script", command: "script -qec 'tty; echo typed' /tmp/typescript && grep -c typed /tmp/typescript", want: `/dev/pts/\d+\ntyped\n`},
	{name: "terminals: python pty", command: `python3 -c 'import os, pty; m, s = pty.openpty(); print(os.ttyname(s), os.isatty(s))'`, want: `^/dev/pts/\d+ True\n$`},
	{name: "terminals: vim", tty: true, command: "printf 'one\\n' > /tmp/v && vim.tiny -u NONE -c 's/one/two/' -c wq /tmp/v && cat /tmp/v", want: `two\n$`},
	{name: "terminals: less", tty: true, command: "echo shown | LESS=-FX less", want: "shown"},

	{name: "locales: localedef", command: "localedef -i de_DE -f ISO-8859-1 de_DE && update-locale LANG=de_DE && LC_ALL=de_DE locale decimal_point && cat /etc/default/locale", want: "^,\n(#.*\n)*LANG=de_DE\n$"},
	{name: "man-db: mandb", command: "mandb -q 2>&1; man -P cat -w apt-get", want: `apt-get`},
	{name: "ldconfig", command: "rm /etc/ld.so.cache && ldconfig && ldconfig -p | grep -c libc.so.6", want: `^[1-9]`},
	{name: "files: tar with xattrs, owners, devices", command: `cd /tmp && mkdir t && cp /bin/true t/ && chown alice t/true && setcap cap_net_raw+ep t/true && setfattr -n user.note -v x t/true && mknod t/node b 7 7 &&
		tar --xattrs --xattrs-include='*' -cf t.tar t && rm -r t && tar --xattrs --xattrs-include='*' -xpf t.tar && getcap t/true && getfattr -n user.note --only-values t/true && stat -c ' %U' t/true && stat -c %F t/node`,
		want: "t/true cap_net_raw=ep\nx alice\nblock special file\n$"},
	{name: "files: setcap, v2 on disk", command: "cp /bin/true /tmp/cap && setcap cap_net_bind_service+ep /tmp/cap && getfattr -n security.capability -e hex /tmp/cap 2> /dev/null | grep -c =0x01000002", want: "^1\n$"},
	{name: "files: setuid, sticky, device nodes", command: "touch /tmp/suid && chmod 4755 /tmp/suid && chown alice /tmp/suid && chmod 6755 /tmp/suid && stat -c %a /tmp/suid && mknod /tmp/disk b 8 0 && ! cat /tmp/disk", want: "^6755\ncat: /tmp/disk: (Permission denied|Operation not permitted)\n$"},
	{name: "python: venv", command: "python3 -m venv --without-pip /tmp/venv && /tmp/venv/bin/python -c 'import sys; print(sys.prefix)'", want: "^/tmp/venv\n$"},
	{name: "background: outlives its connection", command: "nohup sh -c 'sleep 1; echo done > /tmp/background' > /dev/null 2>&1 &", want: "^$"},
	{name: "background: next connection", command: "i=0; while [ ! -s /tmp/background ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; cat /tmp/background", want: "^done\n$"},

	{name: "refused: mount, with an error", command: "for m in '-t tmpfs tmpfs /mnt' '--bind /usr /mnt' '-t proc proc /mnt'; do mount $m 2>&1 && exit 1; done; echo refused", want: `(permission denied|must be superuser)(.|\n)*refused\n$`},
}

// TestWorks tries every row in both levels.
func TestWorks(t *testing.T) {
	root := debianRoot(t)
	results := map[string][]string{}
	levels := []string{"namespaces", "chroot"}
	for i, level := range levels {
		t.Run(level, func(t *testing.T) {
			c := start(t, root, i == 0)
			if log := tool(t, "podman", "logs", c.name); !strings.Contains(log, "level="+level) {
				t.Fatalf("not this level:\n%s", log)
			}
			for _, r := range rows {
				out, err := c.run(r.command, r.tty)
				matched := regexp.MustCompile(r.want).MatchString(out)
				odd := r.not != "" && regexp.MustCompile(r.not).MatchString(out)
				verdict := "works"
				if err != nil || !matched || odd {
					verdict = "FAILS"
					t.Errorf("%s: %v, as expected: %t, nothing odd: %t\n%s", r.name, err, matched, !odd, out)
				}
				results[r.name] = append(results[r.name], verdict)
			}
			verdict := "works"
			if !t.Run("ansible", func(t *testing.T) { c.ansible(t, map[bool]string{true: "True", false: "False"}[i == 0], i == 1) }) {
				verdict = "FAILS"
			}
			results[ansibleRow] = append(results[ansibleRow], verdict)
		})
	}
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "what\t%s\n", strings.Join(levels, "\t"))
	for _, r := range append(rows, row{name: ansibleRow}) {
		fmt.Fprintf(w, "%s\t%s\n", r.name, strings.Join(results[r.name], "\t"))
	}
	w.Flush()
	t.Logf("in a jail:\n%s", &table)
}
