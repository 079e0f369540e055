// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// lastLogin remembers who was the last to get a terminal. It lives as long as the gateway
// and in its memory only: the image's own lastlog and wtmp are part of the image, and a
// customization nobody asked for must not end up in there.
type lastLogin struct {
	mu   sync.Mutex
	when time.Time
	host string
}

// enter records a login and returns the line about the one before, empty if there is none.
func (l *lastLogin) enter(when time.Time, host string) (line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.when.IsZero() {
		line = fmt.Sprintf("Last login: %s from %s\r\n", l.when.Format(time.ANSIC), l.host) // ctime(3)
	}
	l.when, l.host = when, host
	return line
}

// greeting is what a shell on a terminal begins with (do_login of session.c): the last
// login, then the message of the day of the image, or nothing when the image says so.
func greeting(set *sshdconf.Settings, last string, image jail.Greeting) string {
	if image.Hushed {
		return ""
	}
	if !set.PrintLastLog {
		last = ""
	}
	if !set.PrintMotd {
		return last
	}
	return last + strings.ReplaceAll(image.Motd, "\n", "\r\n")
}
