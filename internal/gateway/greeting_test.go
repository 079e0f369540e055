// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

func TestLastLogin(t *testing.T) {
	var l lastLogin
	when := time.Date(2026, 2, 3, 4, 5, 6, 0, time.Local)
	if line := l.enter(when, "192.0.2.7"); line != "" {
		t.Errorf("the first login: %q", line)
	}
	if line := l.enter(when.Add(time.Hour), "x"); line != "Last login: Tue Feb  3 04:05:06 2026 from 192.0.2.7\r\n" {
		t.Errorf("%q", line)
	}
}

func TestGreeting(t *testing.T) {
	image := jail.Greeting{Motd: "Hello.\nMore.\n"}
	for _, tt := range []struct {
		conf, want string
		hushed     bool
	}{
		{"", "last\r\nHello.\r\nMore.\r\n", false}, {"PrintMotd no", "last\r\n", false},
		{"PrintLastLog no", "Hello.\r\nMore.\r\n", false}, {"", "", true},
	} {
		set, err := sshdconf.Parse("f", []byte(tt.conf))
		if err != nil {
			t.Fatal(err)
		}
		image.Hushed = tt.hushed
		if got := greeting(set, "last\r\n", image); got != tt.want {
			t.Errorf("%q, hushed %v: %q, want %q", tt.conf, tt.hushed, got, tt.want)
		}
	}
}

// A shell on a terminal is greeted out of the image, and only that: ATTACK: /etc/motd leads
// out of the image. PROMISE: the links mean files of the image.
func TestGreetingOfTheImage(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("the secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	j := start(t, options{root: imageRoot(t)})
	root := filepath.Join(j.parent, "image-root")
	shell := func(args ...string) string {
		t.Helper()
		cmd := j.tool("ssh", append([]string{"-tt", "-E", "/dev/null", host}, args...)...)
		if len(args) == 0 {
			cmd.Stdin = strings.NewReader("exit\n")
		}
		out, _, code := run(t, cmd)
		if code != 0 {
			t.Errorf("%q: %d", out, code)
		}
		return out
	}
	j.write(filepath.Join(root, "etc/motd"), "Welcome to the image.\n")
	last := regexp.MustCompile(`^Last login: \w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4} from 127\.0\.0\.1\r\n`)
	if out := shell(); !strings.HasPrefix(out, "Welcome to the image.\r\n") {
		t.Errorf("the first shell: %q", out)
	}
	if out := shell(); !last.MatchString(out) || !strings.HasPrefix(last.ReplaceAllString(out, ""), "Welcome to the image.\r\n") {
		t.Errorf("the second shell: %q", out)
	}
	if out := shell("echo a command"); out != "a command\r\n" {
		t.Errorf("a command on a terminal: %q", out)
	}
	if out, _, _ := run(t, j.tool("ssh", "-T", host, "true")); out != "" {
		t.Errorf("no terminal: %q", out)
	}
	for _, link := range []string{outside, strings.Repeat("../", 20) + outside[1:]} {
		os.Remove(filepath.Join(root, "etc/motd"))
		if err := os.Symlink(link, filepath.Join(root, "etc/motd")); err != nil {
			t.Fatal(err)
		}
		if out := shell(); strings.Contains(out, "secret") || !last.MatchString(out) {
			t.Errorf("%s: %q", link, out)
		}
	}
	j.write(filepath.Join(root, "root/.hushlogin"), "")
	if out := shell(); strings.Contains(out, "Last login") {
		t.Errorf("hushed: %q", out)
	}
}
