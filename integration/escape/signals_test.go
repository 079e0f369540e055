// SPDX-License-Identifier: Apache-2.0

package escape

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSignals promises that root in the chroot level, which shares the
// container's process table, gets nothing from the signals it may send but the
// end of its own job: no session without a jail, and no exiting flag, so that
// nothing is packed. ATTACK: every signal to the gateway, and to the process
// that all sessions are children of.
func TestSignals(t *testing.T) {
	exiting := func(c *container) bool {
		_, err := os.Lstat(filepath.Join(c.dir, "mnt/image/exiting"))
		return err == nil
	}
	t.Run("survived", func(t *testing.T) {
		c := start(t, "survives", true, false)
		out, err := c.run("for s in KILL STOP TSTP TTIN TTOU USR1 USR2 ALRM PIPE WINCH CHLD URG; do kill -$s 1; done; echo went on")
		if err != nil || out != "went on\n" {
			t.Errorf("the session that signalled the gateway: %q, %v", out, err)
		}
		// Its parent is the jail's init. The stopped one must still start sessions, and see the job through.
		out, err = c.run("kill -STOP $PPID; for s in HUP INT QUIT TERM USR1 SEGV; do kill -$s $PPID; done; echo went on")
		if err != nil || out != "went on\n" {
			t.Errorf("the session that stopped init: %q, %v", out, err)
		}
		if out, err := c.run("touch /tmp/complete; kill -STOP $PPID"); err != nil {
			t.Errorf("complete: %v: %s", err, out)
		}
		c.until("the job is handed over", func() bool { return c.state() == "exited 0" })
		if !exiting(c) {
			t.Error("no exiting flag")
		}
	})
	for name, command := range map[string]string{
		"end of the gateway": "kill -TERM 1", "crash of the gateway": "kill -QUIT 1", "init killed": "kill -KILL $PPID",
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, strings.ReplaceAll(name, " ", "-"), true, false)
			c.run(command + "; sleep 100")
			c.until("the container ends", func() bool { return strings.HasPrefix(c.state(), "exited") })
			if state := c.state(); state == "exited 0" || exiting(c) {
				t.Errorf("the job was handed over: %s", state)
			}
		})
	}
}
