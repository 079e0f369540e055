// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"fmt"
	"os/exec"
)

// runTool runs a program and reports what it said when it fails.
func runTool(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	return nil
}
