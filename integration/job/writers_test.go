// SPDX-License-Identifier: Apache-2.0

package job

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/ims"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// TestNobodyWritesWhilePacking promises that the image is what was there when the
// user was done. ATTACK: programs that write on and ignore every request to end.
// Each writes a record to a file at the beginning of the image, then the same
// record to one at its end: were one still writing while the image was packed,
// the second file would be ahead.
func TestNobodyWritesWhilePacking(t *testing.T) {
	s := need(t)
	attacker := filepath.Join(t.TempDir(), "attacker")
	testkit.BuildAttacker(t, attacker)
	writers := []string{"stubborn", "daemon", "passed", "mapped", "stopped", "chain"}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			j := s.create(t, m.order)
			j.wait(ims.WaitingOnUser)
			program := j.inside("/bin/attacker")
			j.scp(attacker, "remote:"+program)
			command, started := "", "true"
			for _, w := range writers {
				files := j.inside("/aaa-"+w) + " " + j.inside("/zzz-"+w)
				does := "write " + w
				if w == "chain" {
					does = "fork-chain 1000000"
				}
				command += fmt.Sprintf("%s %s %s </dev/null >/dev/null 2>&1 & ", program, does, files)
				started += " && [ -s " + j.inside("/zzz-"+w) + " ]"
			}
			j.ssh(command + "until " + started + "; do sleep 1; done; touch " + j.flag("complete"))
			j.wait(ims.Success)
			image := unpack(t, j.result(kernelText, initrdText).file)
			for _, w := range writers {
				first, last := readFile(t, filepath.Join(image, "aaa-"+w)), readFile(t, filepath.Join(image, "zzz-"+w))
				n, m := len(first)/8, len(last)/8
				switch w {
				case "mapped":
					n, m = int(binary.LittleEndian.Uint64([]byte(first))), int(binary.LittleEndian.Uint64([]byte(last)))
				case "chain":
					n, m = len(first), len(last)
				}
				if n == 0 || n != m && n != m+1 {
					t.Errorf("%s: %d records at the beginning of the image, %d at its end", w, n, m)
				}
			}
			if log := j.log("sshd"); !strings.Contains(log, "processes had to be killed") {
				t.Error("sshd says nothing of those it had to kill")
			}
			j.checkNothingLeft()
		})
	}
}
