// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// panicky is a channel whose output is a fault of ours.
type panicky struct{ recorder }

func (*panicky) Write([]byte) (int, error) { panic("a fault in one session") }

// A panic where a session's output is sent ends its connection, and not the server.
func TestPanicInOutput(t *testing.T) {
	s := quietServer()
	s.set = &sshdconf.Settings{}
	ours, theirs := net.Pipe()
	c := newConn(s, ours)
	ch := &panicky{recorder{added: make(chan struct{}, 1<<16)}}
	ss := &session{c: c, ch: ch, log: s.log, out: &screen{w: ch}, events: make(chan struct{}, 1), signals: make(chan unix.Signal, 1)}
	stdout, out, err := pipe(false)
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	ss.pumps = []*pump{newPump(out, ss.out, ss.events)}
	ss.run(ended{jail.Exit{}}, stdin, false)
	io.WriteString(stdout, "x")
	stdout.Close()
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection: %v", err)
	}
}
