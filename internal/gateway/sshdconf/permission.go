// SPDX-License-Identifier: Apache-2.0

package sshdconf

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// A Permission is one host:port of PermitOpen, PermitListen, permitopen= or permitlisten=.
type Permission struct {
	Host string // as the client must write it; "*": any. For listening a pattern with * and ?
	Port int    // 0: any
}

// Permissions is what may be opened or listened on: nil is anything, empty nothing.
type Permissions []Permission

// maxHost is NI_MAXHOST (netdb.h).
const maxHost = 1025

// ParsePermission reads host:port, [host]:port, and with barePort also port alone, which
// means any host. A port is a number, a service name or *.
func ParsePermission(s string, barePort bool) (Permission, error) {
	if barePort && !strings.Contains(s, ":") {
		s = "*:" + s
	}
	host, port, ok := strings.Cut(s, ":")
	if strings.HasPrefix(s, "[") {
		host, port, ok = strings.Cut(s[1:], "]:")
	}
	switch {
	case !ok:
		return Permission{}, fmt.Errorf("invalid permission %q: want host:port", s)
	case len(host) >= maxHost || strings.Contains(host, "/"):
		return Permission{}, fmt.Errorf("invalid host in permission %q", s)
	case port == "*":
		return Permission{Host: host}, nil
	case port == "":
		return Permission{}, fmt.Errorf("bad port number in permission %q", s)
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		return Permission{}, fmt.Errorf("bad port number in permission %q", s)
	}
	return Permission{Host: host, Port: n}, nil
}

func (p Permission) port(port int) bool { return p.Port == 0 || p.Port == port }

// Open reports whether a connection to host and port is permitted (open_match in
// channels.c). A Unix socket has its path for a host and a port that only * matches: -1.
func (l Permissions) Open(host string, port int) bool {
	return l == nil || slices.ContainsFunc(l, func(p Permission) bool {
		return p.port(port) && (p.Host == "*" || p.Host == host)
	})
}

// Listen reports whether listening is permitted (remote_open_match in channels.c).
func (l Permissions) Listen(host string, port int) bool {
	return l == nil || slices.ContainsFunc(l, func(p Permission) bool {
		return p.port(port) && matchPattern(strings.ToLower(host), p.Host)
	})
}

// permissions is the parser of PermitOpen and PermitListen.
func permissions(field func(*Settings) *Permissions, barePort bool) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		list := Permissions{}
		for _, a := range args {
			if a == "any" || a == "none" {
				if len(args) > 1 {
					return nil, errors.New(a + " must appear alone")
				}
				if a == "any" {
					list = nil
				}
				break
			}
			p, err := ParsePermission(a, barePort)
			if err != nil {
				return nil, err
			}
			list = append(list, p)
		}
		return func(s *Settings) { *field(s) = list }, nil
	}
}

// mask is an octal umask.
func mask(field func(*Settings) *uint32) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseUint(a, 8, 32)
		if err != nil || n > 0o777 {
			return nil, fmt.Errorf("%q is not an octal number up to 0777", a)
		}
		return func(s *Settings) { *field(s) = uint32(n) }, nil
	}
}
