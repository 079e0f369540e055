// SPDX-License-Identifier: Apache-2.0

package sshdconf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// A Peer is what Match blocks depend on: the two ends of a connection. The user is root.
type Peer struct {
	Addr, Local netip.Addr
	LocalPort   int
}

// For returns the settings for one connection.
func (s *Settings) For(p Peer) *Settings {
	if s.rules == nil {
		return s
	}
	return apply(s.rules, func(b *block) bool { return b.holds(p) })
}

// Variants returns the settings for a peer that no conditional Match block names, and for each of these blocks those where it
// alone holds: what is wrong with a value shows in one of them.
func (s *Settings) Variants() []*Settings {
	all := []*Settings{s}
	seen := map[*block]bool{}
	for _, d := range s.rules {
		if d.block.conditional() && !seen[d.block] {
			seen[d.block] = true
			all = append(all, apply(s.rules, func(b *block) bool { return b == d.block }))
		}
	}
	return all
}

// block is what a Match line demands. A nil one is no Match line and holds always.
type block struct {
	other bool              // it is for another user than root
	tests []func(Peer) bool // all must hold
}

func (b *block) never() bool { return b != nil && b.other }

// conditional reports whether the block holds for some peers and for others not.
func (b *block) conditional() bool { return b != nil && !b.other && len(b.tests) > 0 }

func (b *block) holds(p Peer) bool {
	for _, t := range b.tests {
		if !t(p) {
			return false
		}
	}
	return true
}

// parseMatch reads the criteria of a Match line (match_cfg_line of servconf.c), which count beside those of outer. What can
// be judged without a peer, for the one login there is, is judged at once.
func parseMatch(args []string, outer *block) (*block, error) {
	b := &block{}
	if outer != nil {
		b.other = outer.other
		b.tests = append(b.tests, outer.tests...)
	}
	for i := 0; i < len(args); i++ {
		attr, val, joined := strings.Cut(args[i], "=")
		attr = strings.ToLower(attr)
		switch attr {
		case "all":
			if len(args) > 1 || joined {
				return nil, errors.New("Match: 'all' cannot be combined with other attributes")
			}
			continue
		case "invalid-user": // that is, one there is not
			if joined {
				return nil, errors.New("Match: invalid-user takes no value")
			}
			b.other = true
			continue
		}
		if !joined {
			if i++; i >= len(args) {
				return nil, fmt.Errorf("Match: missing value for %q", attr)
			}
			val = args[i]
		}
		if err := b.criterion(attr, val); err != nil {
			return nil, fmt.Errorf("Match: %w", err)
		}
	}
	return b, nil
}

func (b *block) criterion(attr, val string) error {
	switch attr {
	case "user", "group":
		b.other = b.other || !MatchList("root", val)
	case "address", "localaddress":
		of := func(p Peer) netip.Addr { return p.Addr }
		if attr == "localaddress" {
			of = func(p Peer) netip.Addr { return p.Local }
		}
		if err := checkAddresses(val); err != nil {
			return fmt.Errorf("%s: %w", attr, err)
		}
		b.tests = append(b.tests, func(p Peer) bool {
			ok, err := MatchAddress(of(p), val)
			return err == nil && ok
		})
	case "localport":
		n, err := net.LookupPort("tcp", val)
		if err != nil || n == 0 {
			return fmt.Errorf("invalid localport %q: want one port", val)
		}
		b.tests = append(b.tests, func(p Peer) bool { return p.LocalPort == n })
	case "host", "localnetwork", "rdomain", "version", "command", "sessiontype":
		return fmt.Errorf("criterion %s is not supported by this server; use all, user, group, address, localaddress or localport", attr)
	default:
		return fmt.Errorf("unknown criterion %q", attr)
	}
	return nil
}

// checkAddresses refuses a list with an element that could match no address: sshd takes a name for a pattern of addresses.
func checkAddresses(list string) error {
	if _, err := MatchAddress(netip.IPv4Unspecified(), list); err != nil {
		return err
	}
	for e := range strings.SplitSeq(list, ",") {
		e = strings.TrimPrefix(e, "!")
		if e == "" || strings.Trim(e, "0123456789abcdefABCDEF.:/*?") != "" {
			return fmt.Errorf("%q is neither an address, nor ADDRESS/BITS, nor a pattern of addresses", e)
		}
	}
	return nil
}

// MatchAddress is match_host_and_ip of match.c without names, which sshd does not look up
// either unless UseDNS is set: a list of CIDR blocks and patterns on the address, ! before
// those that must not match. A list that cannot be understood is an error.
func MatchAddress(addr netip.Addr, list string) (bool, error) {
	addr = addr.Unmap().WithZone("")
	found := false
	for p := range strings.SplitSeq(list, ",") {
		pat, not := strings.CutPrefix(strings.TrimSpace(p), "!")
		var hit bool
		if strings.Contains(pat, "/") {
			block, err := netip.ParsePrefix(pat)
			if err != nil {
				return false, err
			}
			if block != block.Masked() {
				return false, fmt.Errorf("%s: host bits are set below the mask", pat)
			}
			hit = block.Contains(addr)
		} else if a, err := netip.ParseAddr(pat); err == nil {
			hit = a.Unmap() == addr
		} else {
			hit = MatchList(addr.String(), strings.ToLower(pat))
		}
		if hit && not {
			return false, nil
		}
		found = found || hit
	}
	return found, nil
}

// MatchList reports whether s matches a comma-separated list of patterns with * and ?,
// where a matching pattern with a leading ! means no (match_pattern_list in match.c).
func MatchList(s, list string) bool {
	found := false
	for p := range strings.SplitSeq(list, ",") {
		neg, not := strings.CutPrefix(p, "!")
		if !matchPattern(s, neg) {
			continue
		}
		if not {
			return false
		}
		found = true
	}
	return found
}

// matchPattern compares with the wildcards * and ? in linear space and at most quadratic
// time; the recursive form of match.c is exponential.
func matchPattern(s, p string) bool {
	si, pi, star, mark := 0, 0, -1, 0
	for si < len(s) {
		switch {
		case pi < len(p) && p[pi] == '*':
			star, mark = pi, si
			pi++
		case pi < len(p) && (p[pi] == '?' || p[pi] == s[si]):
			si, pi = si+1, pi+1
		case star >= 0:
			mark++
			si, pi = mark, star+1
		default:
			return false
		}
	}
	return strings.Trim(p[pi:], "*") == ""
}
