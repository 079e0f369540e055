// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// object reads a line that is one JSON object without a key that is there twice.
func object(line string) (map[string]any, error) {
	dec := json.NewDecoder(strings.NewReader(line))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return nil, fmt.Errorf("no object: %v, %w", open, err)
	}
	o := map[string]any{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var value any
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		if _, twice := o[key.(string)]; twice {
			return nil, fmt.Errorf("%v twice", key)
		}
		o[key.(string)] = value
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something after the object")
	}
	return o, nil
}

// TestLogJSON: whatever clients do, each line of a JSON log is one object, and what is secret is in none, with the level DEBUG.
func TestLogJSON(t *testing.T) {
	testkit.NeedTool(t, "sftp")
	var log logBuffer
	dir := t.TempDir()
	j := launch(t, options{config: "AcceptEnv CANARY_*\nRecordDirectory " + filepath.Join(dir, "casts"), change: func(c *Config) {
		c.Log = config.NewLogger(&log, config.LogJSON, slog.LevelDebug, "job", "the job")
	}})
	j.log = &log
	j.awaitLog(`"msg":"listening"`)
	stranger := newKey(t)
	if _, err := j.dialAs("root", stranger); err == nil {
		t.Error("a stranger has logged in")
	}
	if _, err := j.dialAs("a\"user\n{\xff", j.key); err == nil {
		t.Error("another user has logged in")
	}
	ssh1 := j.tool("ssh", "-tt", "-o", "SendEnv=CANARY_ENV", host, "echo canary-$((1+1))-command; exit 3")
	ssh1.Env = append(os.Environ(), "CANARY_ENV=canary-value")
	if out, errs, code := run(t, ssh1); code != 3 || !strings.Contains(out, "canary-2-command") {
		t.Fatalf("%q %q %d", out, errs, code)
	}
	sftp := j.tool("sftp", "-b", "-", host)
	name := filepath.Join(dir, "a\xff\"\\ {")
	sftp.Stdin = strings.NewReader(`mkdir "` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(name) + "\"\n")
	if _, errs, code := run(t, sftp); code != 0 {
		t.Errorf("sftp: %d %s", code, errs)
	}
	c := j.dial()
	if _, _, err := c.SendRequest("tcpip-forward", true, ssh.Marshal(struct {
		Host string
		Port uint32
	}{"no\"such\nhost", 0})); err != nil {
		t.Error(err)
	}
	if _, _, err := c.OpenChannel("odd\"channel\xfe\n", nil); err == nil {
		t.Error("an odd channel was opened")
	}
	j.flag("complete")
	<-j.ended
	if j.err != nil {
		t.Error(j.err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(log.String()) {
		o, err := object(line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		msg, _ := o["msg"].(string)
		level, _ := o["level"].(string)
		at, _ := o["time"].(string)
		if msg == "" || level == "" || at == "" || o["job"] != "the job" {
			t.Errorf("%s lacks time, level, msg or job", line)
		}
		seen[msg] = true
	}
	for _, msg := range []string{"listening", "login", "login refused", "session started", "session ended", "file", "channel refused", "exiting"} {
		if !seen[msg] {
			t.Errorf("the log has no line %q", msg)
		}
	}
	for _, secret := range []string{"canary", string(payload(j.key)), string(payload(stranger))} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("%s is in the log", secret)
		}
	}
}

// payload is a public key as authorized_keys has it.
func payload(k key) []byte {
	return bytes.Fields([]byte(k.line("", "")))[1]
}
