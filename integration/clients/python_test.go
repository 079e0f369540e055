// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// needModule skips the test where Python does not have the module.
func needModule(t *testing.T, name string) {
	t.Helper()
	testkit.NeedTool(t, "python3")
	if out, err := exec.Command("python3", "-c", "import "+name).CombinedOutput(); err != nil {
		if testkit.InCI() {
			t.Fatalf("needs %s: %s", name, out)
		}
		t.Skip("needs " + name)
	}
}

func TestPython(t *testing.T) {
	for _, name := range []string{"paramiko", "asyncssh"} {
		t.Run(name, func(t *testing.T) {
			program(t)
			needModule(t, name)
			each(t, func(t *testing.T, g *gateway) {
				_, there := g.space(t)
				cmd := client("python3", filepath.Join("testdata", name+"_client.py"), g.port, g.identity, filepath.Join(g.dir, "host.pub"), there)
				if g.level == chroot {
					cmd.Args = append(cmd.Args, "long")
				}
				cmd.Env = append(cmd.Env, "TMPDIR="+t.TempDir(), "PYTHONWARNINGS=ignore")
				must(t, cmd)
			})
		})
	}
}

// What the site's orchestrator does when it is done with an image, on a machine that is
// busy: the command whose client is gone at once is run, every time.
func TestForgottenCommands(t *testing.T) {
	program(t)
	needModule(t, "paramiko")
	g := common(t, chroot)
	here, there := g.space(t)
	for range 2 * runtime.NumCPU() {
		busy := exec.Command("sh", "-c", "while :; do :; done")
		if err := busy.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			busy.Process.Kill()
			busy.Wait()
		})
	}
	const workers, loops = 8, 25
	var wg sync.WaitGroup
	for i := range workers {
		dir := fmt.Sprint("/", i)
		if err := os.Mkdir(here+dir, 0o755); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if _, errs, code := run(t, client("python3", "testdata/paramiko_forget.py", g.port, g.identity, there+dir, fmt.Sprint(loops))); code != 0 {
				t.Errorf("%d, %s", code, errs)
			}
		})
	}
	wg.Wait()
	eventually(t, "all commands have run", func() bool {
		found, _ := filepath.Glob(here + "/*/*")
		return len(found) == workers*loops
	})
}
