// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"testing"
)

func TestExec(t *testing.T) {
	eachLevel(t, func(t *testing.T, level Level) {
		root := newRoot(t)
		j := startJail(t, Config{Root: root, Level: level, Env: []string{"IMS_JOB_ID=1"}})
		if got := output(t, j, "echo hello $IMS_JOB_ID"); got != "hello 1" {
			t.Errorf("got %q", got)
		}
		t.Log(output(t, j, "env; id; ls -la / /dev; cat /proc/self/mountinfo"))
	})
}
