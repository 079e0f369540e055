// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestParsePasswd(t *testing.T) {
	for _, c := range []struct{ text, home, shell string }{
		{"", "/root", "/bin/sh"},
		{"daemon:x:1:1::/:/bin/false\nroot:x:0:0:r:/home/r:/bin/zsh\nroot:x:0:0::/:/bin/csh\n", "/home/r", "/bin/zsh"},
		{"toor:x:0:0::/x:/bin/x\n", "/root", "/bin/sh"},
		{"root:x:0:0::relative:\n", "/root", "/bin/sh"},
		{"root:x:0:0:/root:/bin/sh\nroot:x:0:0::/a:/bin/b\r\n", "/a", "/bin/b"},
		{strings.Repeat("y", 1<<17) + "\nroot:x:0:0::/a:/b\n", "/root", "/bin/sh"},
	} {
		a := account{name: "root", home: defaultHome, shell: defaultShell}
		a.parsePasswd([]byte(c.text))
		if a.home != c.home || a.shell != c.shell {
			t.Errorf("%.40q: %s %s", c.text, a.home, a.shell)
		}
	}
}

func TestParseGroup(t *testing.T) {
	a := account{name: "root", ttyGID: -1}
	a.parseGroup([]byte("root:x:0:root\nwheel:x:10:x,root,y\nbad\nbig:x:4294967296:root\nrooty:x:11:rooty\ntty:x:7:\ntty:x:8:\nwheel2:x:10:root\n"))
	if !reflect.DeepEqual(a.groups, []uint32{0, 10}) || a.ttyGID != 7 {
		t.Errorf("%v, tty %d", a.groups, a.ttyGID)
	}
	a.parseGroup([]byte(strings.Repeat("g:x:1:root\ng:x:2:root\n", 10)))
	if len(a.groups) != 3 {
		t.Errorf("%v", a.groups)
	}
}

func TestParseEnvironment(t *testing.T) {
	got := parseEnvironment([]byte("A=1\n export B='two words' \n#C=3\nD=\"x\nE\n=F\n1G=2\nH-I=3\nJ=a=b\nK=\x00\nL=\n"))
	want := []string{"A=1", "B=two words", "D=\"x", "J=a=b", "L="}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestEnvironmentOrder: of those who name a variable the last one wins, as under OpenSSH's sshd with PAM.
func TestEnvironmentOrder(t *testing.T) {
	a := account{name: "root", env: []string{"IMAGE=image", "SERVER=image", "JOB=image", "HOME=image"}}
	req := spawnMsg{env: []string{"CLIENT=client", "IMAGE=client", "SERVER=client", "USER=client"}, setEnv: []string{"SERVER=server", "JOB=server", "SHELL=server"}}
	got := a.environment(nil, "/bin/sh", "/root", "", &req, []string{"JOB=job", "LOGNAME=job"})
	slices.Sort(got)
	want := []string{"CLIENT=client", "HOME=/root", "IMAGE=image", "JOB=job", "LOGNAME=root", "MAIL=/var/mail/root", "SERVER=server", "SHELL=/bin/sh", "USER=root"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for term, want := range map[string]bool{"xterm": true, "": false} {
		got := a.environment(nil, "/bin/sh", "/root", "/dev/pts/1", &spawnMsg{tty: &TTY{Term: term}}, nil)
		if slices.Contains(got, "TERM="+term) != want || !slices.Contains(got, "SSH_TTY=/dev/pts/1") {
			t.Errorf("on a terminal of type %q: %q", term, got)
		}
	}
}

// FuzzAccount: whatever the image's files hold, there is a usable account.
func FuzzAccount(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/bash\n"), []byte("tty:x:5:\n"), []byte("A=b\n"))
	f.Fuzz(func(t *testing.T, passwd, group, environment []byte) {
		a := account{name: "root", home: defaultHome, shell: defaultShell, ttyGID: -1}
		a.parsePasswd(passwd)
		a.parseGroup(group)
		a.env = parseEnvironment(environment)
		if a.home[0] != '/' || a.shell[0] != '/' || len(a.groups) > maxGroups {
			t.Fatalf("%+v", a)
		}
		for _, kv := range a.environment(defaultEnv(Plain), a.shell, a.home, "", &spawnMsg{}, nil) {
			if strings.ContainsRune(kv, 0) || !strings.Contains(kv, "=") {
				t.Fatalf("%q", kv)
			}
		}
	})
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		line string
		want procInfo
		ok   bool
	}{
		{"12 (a b) c)) S 1 12 11 34816 12 4194304 1 0 0 0 0 0 0 0 20 0 1 0 777 1 1", procInfo{pid: 12, ppid: 1, session: 11, name: "a b) c)", state: 'S', tty: 34816, start: 777}, true},
		{"12 (x) Z 1 12 11 0 -1 1 1 0 0 0 0 0 0 0 20 0 1 0 5", procInfo{pid: 12, ppid: 1, session: 11, name: "x", state: 'Z', start: 5}, true},
		{"", procInfo{}, false}, {"12 (x S 1", procInfo{}, false}, {"12 )x( S 1 2", procInfo{}, false}, {"(x) S", procInfo{}, false},
	} {
		if got, ok := parseStat([]byte(c.line)); got != c.want || ok != c.ok {
			t.Errorf("%q: %+v, %v", c.line, got, ok)
		}
	}
}

func TestDescendants(t *testing.T) {
	procs := []procInfo{{pid: 2, ppid: 1}, {pid: 3, ppid: 2}, {pid: 4, ppid: 3, state: 'Z'}, {pid: 5, ppid: 4}, {pid: 6, ppid: 1}, {pid: 7, ppid: 7}}
	var pids []int
	for _, p := range living(descendants(procs, 2), 2) {
		pids = append(pids, p.pid)
	}
	if !slices.Equal(pids, []int{3, 5}) {
		t.Errorf("%v", pids)
	}
}
