// SPDX-License-Identifier: Apache-2.0

package sshdconf

import "testing"

func TestPermissions(t *testing.T) {
	for _, tt := range []struct {
		line string
		open func(s *Settings) bool
		want bool
	}{
		{"", func(s *Settings) bool { return s.PermitOpen.Open("h", 1) }, true},
		{"PermitOpen any", func(s *Settings) bool { return s.PermitOpen.Open("h", 1) }, true},
		{"PermitOpen none", func(s *Settings) bool { return s.PermitOpen.Open("h", 1) }, false},
		{"PermitOpen a:1 h:1", func(s *Settings) bool { return s.PermitOpen.Open("h", 1) }, true},
		{"PermitOpen h:1", func(s *Settings) bool { return s.PermitOpen.Open("h", 2) }, false},
		{"PermitOpen h:*", func(s *Settings) bool { return s.PermitOpen.Open("h", 2) }, true},
		{"PermitOpen *:1", func(s *Settings) bool { return s.PermitOpen.Open("x", 1) }, true},
		{"PermitOpen h*:1", func(s *Settings) bool { return s.PermitOpen.Open("hh", 1) }, false},
		{"PermitOpen H:1", func(s *Settings) bool { return s.PermitOpen.Open("h", 1) }, false},
		{"PermitOpen [::1]:1", func(s *Settings) bool { return s.PermitOpen.Open("::1", 1) }, true},
		{"PermitOpen h:http", func(s *Settings) bool { return s.PermitOpen.Open("h", 80) }, true},
		{"PermitOpen *:*", func(s *Settings) bool { return s.PermitOpen.Open("/path", -1) }, true},
		{"PermitOpen *:1", func(s *Settings) bool { return s.PermitOpen.Open("/path", -1) }, false},
		{"PermitListen 1", func(s *Settings) bool { return s.PermitListen.Listen("", 1) }, true},
		{"PermitListen 1", func(s *Settings) bool { return s.PermitListen.Listen("h", 2) }, false},
		{"PermitListen localhost:1", func(s *Settings) bool { return s.PermitListen.Listen("LocalHost", 1) }, true},
		{"PermitListen local*:1", func(s *Settings) bool { return s.PermitListen.Listen("localhost", 1) }, true},
		{"PermitListen localhost:1", func(s *Settings) bool { return s.PermitListen.Listen("", 1) }, false},
		{"PermitListen none", func(s *Settings) bool { return s.PermitListen.Listen("", 1) }, false},
		{"", func(s *Settings) bool { return s.StreamLocalMask == 0o177 && !s.StreamLocalUnlink }, true},
		{"StreamLocalBindMask 0111\nStreamLocalBindUnlink yes", func(s *Settings) bool { return s.StreamLocalMask == 0o111 && s.StreamLocalUnlink }, true},
	} {
		s, err := Parse("sshd_config", []byte(tt.line))
		if err != nil {
			t.Errorf("%s: %v", tt.line, err)
		} else if tt.open(s) != tt.want {
			t.Errorf("%q: got %v", tt.line, !tt.want)
		}
	}
	for _, line := range []string{
		"PermitOpen h", "PermitOpen h:", "PermitOpen h:99999", "PermitOpen h:x:y", "PermitOpen h:1 none", "PermitOpen any h:1",
		"PermitOpen [h:1", "PermitOpen h/1:1", "PermitListen x", "StreamLocalBindMask 8", "StreamLocalBindMask 1000", "StreamLocalBindMask -1",
		"StreamLocalBindMask 1x",
	} {
		if _, err := Parse("sshd_config", []byte(line)); err == nil {
			t.Errorf("%s: accepted", line)
		}
	}
}
