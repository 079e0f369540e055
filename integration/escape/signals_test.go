// SPDX-License-Identifier: Apache-2.0

package escape

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSignals promises that root in the chroot level, which shares the
// container's process table, signals neither the gateway nor the process that
// all sessions are children of. ATTACK: every signal to either, to the process
// groups they lead, and to all processes there are.
func TestSignals(t *testing.T) {
	c := start(t, "signals", true, false)
	for target, pid := range map[string]string{"gateway": "1", "init": "$PPID", "init's group": "-$PPID"} {
		out, err := c.run(`for s in HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO SYS; do
			kill -$s -- ` + pid + ` 2>/tmp/why && echo $s was sent; done; cat /tmp/why; echo went on`)
		if err != nil || !strings.HasSuffix(out, "not permitted\nwent on\n") || strings.Contains(out, "sent") {
			t.Errorf("signals to %s: %q, %v", target, out, err)
		}
	}
	// Those that are the jail's do get it; the one that sends it does not.
	if out, err := c.run("exec 2>/dev/null; sleep 1000 & kill -KILL -1; wait $!; echo $?"); err != nil || out != "137\n" {
		t.Errorf("signal to all: %q, %v", out, err)
	}
	if out, err := c.run("touch /tmp/complete"); err != nil {
		t.Errorf("complete: %v: %s", err, out)
	}
	c.until("the job is handed over", func() bool { return c.state() == "exited 0" })
	if _, err := os.Lstat(filepath.Join(c.dir, "mnt/image/exiting")); err != nil {
		t.Error(err)
	}
}
