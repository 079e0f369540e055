// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	names := map[string]func(){"sidecar": main}
	for script := range legacyNames {
		names[script] = main
	}
	testscript.Main(m, names)
}

// Each script is a promise about the command line.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:  "testdata",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// exits runs a command that must end with a code: exits CODE COMMAND ARG...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND ARG...")
	}
	code := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// A score that protects the program is given up, one that does not is kept.
func TestGiveUpImmunity(t *testing.T) {
	for was, want := range map[string]string{"-1000\n": "0", "-1\n": "0", "0\n": "0\n", "500\n": "500\n"} {
		file := filepath.Join(t.TempDir(), "oom_score_adj")
		if err := os.WriteFile(file, []byte(was), 0o600); err != nil {
			t.Fatal(err)
		}
		giveUpImmunity(file)
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%q became %q, %v", was, b, err)
		}
	}
	giveUpImmunity(filepath.Join(t.TempDir(), "none"))
}
