// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const jobID = "dd083330-fa89-4acf-b701-619f6d00d304"

// env makes an environment that `sidecar run` accepts, with changes on top;
// "-" takes a variable away.
func env(t testing.TB, changes map[string]string) func(string) string {
	t.Helper()
	vars := map[string]string{
		"IMS_JOB_ID": jobID, "IMS_ACTION": "customize", "IMAGE_ROOT_ARCHIVE_NAME": "lab_image",
		"S3_ENDPOINT": "http://s3:8080", "S3_ACCESS_KEY": "access", "S3_SECRET_KEY": "topsecret", "S3_BUCKET": "boot-images",
		"IMS_URL": "http://ims", "OAUTH_CLIENT_ENDPOINT": "http://keycloak/token", "OAUTH_CLIENT_ID": "admin", "OAUTH_CLIENT_SECRET": "alsosecret",
	}
	maps.Copy(vars, changes)
	return func(name string) string {
		if vars[name] == "-" {
			return ""
		}
		return vars[name]
	}
}

func file(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDefaults(t *testing.T) {
	cfg, err := LoadSidecarFrom(env(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ got, want any }{
		"parent":     {cfg.Parent, "/mnt/image"},
		"root":       {cfg.RootDir, "/mnt/image/image-root"},
		"boot":       {cfg.BootDir, "boot"},
		"kernel":     {cfg.KernelName, "vmlinuz"},
		"initrd":     {cfg.InitrdName, "initrd"},
		"parameters": {cfg.ParametersName, ""},
		"arch":       {cfg.Arch, "x86_64"},
		"jailed":     {cfg.Jailed, false},
		"timeout":    {cfg.Timeout, 720 * time.Second},
		"ssh port":   {cfg.SSHPort, 22},
		"changes":    {cfg.Changes, "write"},
		"level":      {cfg.LogLevel, slog.LevelInfo},
		"ims dir":    {cfg.IMSDir, "/etc/cray/ims"},
		"keys":       {cfg.AuthorizedKeys, "/etc/cray/authorized_keys"},
		"md5":        {cfg.DownloadMD5, ""},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
	if cfg, err = LoadSidecarFrom(env(t, map[string]string{"IMS_URL": "-", "CA_CERT": "-"})); err != nil || cfg.IMSURL != "https://api-gw-service-nmn.local/apis/ims" {
		t.Errorf("IMS URL %q, %v", cfg.IMSURL, err)
	}
}

// TestRows holds the contract's table: variables in, fields out.
func TestRows(t *testing.T) {
	type vars = map[string]string
	get := map[string]func(Sidecar) any{
		"jailed":    func(c Sidecar) any { return c.Jailed },
		"dkms":      func(c Sidecar) any { return c.DKMS },
		"debug":     func(c Sidecar) any { return c.Debug },
		"kernel":    func(c Sidecar) any { return c.KernelName },
		"name":      func(c Sidecar) any { return c.ArchiveName },
		"root":      func(c Sidecar) any { return c.RootDir },
		"boot":      func(c Sidecar) any { return c.BootDir },
		"s3":        func(c Sidecar) any { return c.S3.Endpoint },
		"verify":    func(c Sidecar) any { return c.S3.Verify },
		"ims":       func(c Sidecar) any { return c.IMSURL },
		"timeout":   func(c Sidecar) any { return c.Timeout },
		"md5":       func(c Sidecar) any { return c.DownloadMD5 },
		"port":      func(c Sidecar) any { return c.SSHPort },
		"level":     func(c Sidecar) any { return c.LogLevel },
		"logFormat": func(c Sidecar) any { return c.LogFormat },
		"remote":    func(c Sidecar) any { return c.RemoteBuildNode },
	}
	for _, c := range []struct {
		vars  vars
		field string
		want  any
	}{
		{vars{"SSH_JAIL": "True"}, "jailed", true},
		{vars{"SSH_JAIL": "true"}, "jailed", true},
		{vars{"SSH_JAIL": "TRUE"}, "jailed", true},
		{vars{"SSH_JAIL": "False"}, "jailed", false},
		{vars{"SSH_JAIL": ""}, "jailed", false},
		{vars{"JOB_ENABLE_DKMS": "True"}, "dkms", true},
		{vars{"ENABLE_DEBUG": "true"}, "debug", true},
		{vars{"BUILD_ARCH": "aarch64"}, "kernel", "Image"},
		{vars{"BUILD_ARCH": "aarch64", "KERNEL_FILENAME": "vmlinuz"}, "kernel", "Image"},
		{vars{"BUILD_ARCH": "aarch64", "KERNEL_FILENAME": "vmlinux-6"}, "kernel", "vmlinux-6"},
		{vars{"BUILD_ARCH": "x86_64", "KERNEL_FILENAME": "bzImage"}, "kernel", "bzImage"},
		{vars{"IMAGE_ROOT_ARCHIVE_NAME": "a/b ü"}, "name", "a/b ü"},
		{vars{"IMAGE_ROOT_ARCHIVE_NAME": " two  blanks "}, "name", " two  blanks "},
		{vars{"IMAGE_ROOT_ARCHIVE_NAME": "-", "KIWI_RECIPE_NAME": "kiwi"}, "name", "kiwi"},
		{vars{"IMAGE_ROOT_ARCHIVE_NAME": "first", "KIWI_RECIPE_NAME": "kiwi"}, "name", "first"},
		{vars{"IMS_ACTION": "create"}, "root", "/mnt/image/build/image-root"},
		{vars{"IMAGE_ROOT_PARENT": "/srv/x/"}, "root", "/srv/x/image-root"},
		{vars{"IMAGE_ROOT_DIR": "/srv/y/"}, "root", "/srv/y"},
		{vars{"IMAGE_BOOT_DIR": "/mnt/image/image-root/efi/boot"}, "boot", "efi/boot"},
		{vars{"S3_ENDPOINT": "-", "S3_HOST": "http://old:7480/"}, "s3", "http://old:7480"},
		{vars{"S3_HOST": "http://old"}, "s3", "http://s3:8080"},
		{vars{"S3_SSL_VALIDATE": ""}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "False"}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "off"}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "no"}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "f"}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "0"}, "verify", false},
		{vars{"S3_SSL_VALIDATE": "true"}, "verify", true},
		{vars{"S3_SSL_VALIDATE": "True"}, "verify", true},
		{vars{"S3_SSL_VERIFY": "true"}, "verify", true},
		{vars{"S3_SSL_VERIFY": "true", "S3_SSL_VALIDATE": "false"}, "verify", true},
		{vars{"S3_SSL_VERIFY": "false", "S3_SSL_VALIDATE": "true"}, "verify", true},
		{vars{"IMS_URL": "http://gw:80/apis/ims/"}, "ims", "http://gw:80/apis/ims"},
		{vars{"API_GATEWAY_HOSTNAME": "istio", "IMS_URL": "http://gw"}, "ims", "http://gw"},
		{vars{"API_GATEWAY_HOSTNAME": "istio", "IMS_URL": "-"}, "ims", DefaultIMSURL},
		{vars{"IMS_PYTHON_HELPER_TIMEOUT": "5"}, "timeout", 5 * time.Second},
		{vars{"IMS_PYTHON_HELPER_TIMEOUT": "0.5"}, "timeout", 500 * time.Millisecond},
		{vars{"DOWNLOAD_MD5SUM": "3F33CCAB084E5AB4400EA7F24A7507A1"}, "md5", "3f33ccab084e5ab4400ea7f24a7507a1"},
		{vars{"SSHD_PORT": "2222"}, "port", 2222},
		{vars{"LOG_LEVEL": "debug"}, "level", slog.LevelDebug},
		{vars{"LOG_LEVEL": "WARNING"}, "level", slog.LevelWarn},
		{vars{"LOG_LEVEL": "ERROR"}, "level", slog.LevelError},
		{vars{"LOG_LEVEL": "chatty"}, "level", slog.LevelInfo},
		{vars{}, "logFormat", LogText},
		{vars{"IMS_BUILDENV_LOG_FORMAT": "JSON"}, "logFormat", LogJSON},
		{vars{"IMS_BUILDENV_LOG_FORMAT": "xml"}, "logFormat", LogText},
		{vars{"REMOTE_BUILD_NODE": "x3000c0"}, "remote", "x3000c0"},
	} {
		cfg, err := LoadSidecarFrom(env(t, c.vars))
		if err != nil {
			t.Errorf("%v: %v", c.vars, err)
			continue
		}
		if got := get[c.field](cfg); got != c.want {
			t.Errorf("%v: %s is %v, want %v", c.vars, c.field, got, c.want)
		}
	}
}

func TestFirstArgumentWins(t *testing.T) {
	getenv := env(t, map[string]string{"IMAGE_ROOT_PARENT": "/srv/env"})
	cfg, err := LoadSidecarFrom(getenv, "/srv/arg/")
	if err != nil || cfg.Parent != "/srv/arg" || cfg.RootDir != "/srv/arg/image-root" {
		t.Errorf("%q %q %v", cfg.Parent, cfg.RootDir, err)
	}
	if ssh, err := LoadSSHDFrom(getenv, "/srv/arg"); err != nil || ssh.ImageRoot() != "/srv/arg/image-root" {
		t.Errorf("%q %v", ssh.ImageRoot(), err)
	}
}

// TestProblems wants each bad value named with its variable.
func TestProblems(t *testing.T) {
	for variable, bad := range map[string]string{
		"IMS_JOB_ID":                 "../../jobs",
		"IMS_ACTION":                 "destroy",
		"SSH_JAIL":                   "maybe",
		"BUILD_ARCH":                 "riscv",
		"IMAGE_BOOT_DIR":             "/boot",
		"KERNEL_FILENAME":            "../vmlinuz",
		"INITRD_FILENAME":            "/boot/initrd",
		"KERNEL_PARAMETERS_FILENAME": "./parameters",
		"IMAGE_ROOT_DIR":             "image-root",
		"S3_ENDPOINT":                "s3.local:8080",
		"S3_SSL_VALIDATE":            "/nonexistent/ca.crt",
		"S3_SSL_VERIFY":              file(t, "empty.crt", "no certificate"),
		"IMS_URL":                    "ftp://x",
		"IMS_PYTHON_HELPER_TIMEOUT":  "-1",
		"DOWNLOAD_MD5SUM":            "abc",
		"SSHD_PORT":                  "65536",
		"OAUTH_CLIENT_ENDPOINT":      "keycloak",
	} {
		_, err := LoadSidecarFrom(env(t, map[string]string{variable: bad}))
		var problems *Error
		if !errors.As(err, &problems) || len(problems.Problems) != 1 || !strings.HasPrefix(problems.Problems[0], variable+" ") {
			t.Errorf("%s=%s: %v", variable, bad, err)
		}
	}
	for _, variable := range []string{"IMS_JOB_ID", "IMS_ACTION", "IMAGE_ROOT_ARCHIVE_NAME", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET"} {
		if _, err := LoadSidecarFrom(env(t, map[string]string{variable: "-"})); err == nil || !strings.Contains(err.Error(), variable+" is not set") {
			t.Errorf("%s missing: %v", variable, err)
		}
	}
	for _, seconds := range []string{"0", "NaN", "Inf", "1e300", "soon"} {
		if _, err := LoadSidecarFrom(env(t, map[string]string{"IMS_PYTHON_HELPER_TIMEOUT": seconds})); err == nil {
			t.Errorf("a timeout of %q was accepted", seconds)
		}
	}
}

// TestAllProblemsAtOnce also wants what was understood in spite of them: the
// job must be marked `error` with it.
func TestAllProblemsAtOnce(t *testing.T) {
	cfg, err := LoadSidecarFrom(env(t, map[string]string{"IMS_ACTION": "x", "S3_BUCKET": "-", "SSHD_PORT": "no"}))
	var problems *Error
	if !errors.As(err, &problems) || len(problems.Problems) != 3 {
		t.Fatalf("%v", err)
	}
	if cfg.JobID != jobID || cfg.IMSURL != "http://ims" || cfg.OAuth.ClientSecret.Reveal() != "alsosecret" {
		t.Errorf("what was valid is lost: %+v", cfg)
	}
}

func TestPrepareNeedsLess(t *testing.T) {
	less := map[string]string{"IMS_ACTION": "-", "IMAGE_ROOT_ARCHIVE_NAME": "-", "S3_ENDPOINT": "-", "S3_ACCESS_KEY": "-", "S3_SECRET_KEY": "-", "S3_BUCKET": "-"}
	if cfg, err := LoadPrepareFrom(env(t, less)); err != nil || len(cfg.Warnings) != 0 {
		t.Errorf("%v %q", err, cfg.Warnings)
	}
	less["IMS_JOB_ID"] = "-"
	if _, err := LoadPrepareFrom(env(t, less)); err == nil {
		t.Error("prepare without a job was accepted")
	}
}

func TestS3Verification(t *testing.T) {
	ca := file(t, "ca.crt", testCA)
	cfg, err := LoadSidecarFrom(env(t, map[string]string{"S3_SSL_VALIDATE": ca}))
	if err != nil || !cfg.S3.Verify || cfg.S3.CAFile != ca {
		t.Errorf("%+v %v", cfg.S3, err)
	}
	cfg, err = LoadSidecarFrom(env(t, map[string]string{"S3_SSL_VALIDATE": "true", "S3_SSL_VERIFY": ca}))
	if err != nil || !cfg.S3.Verify || cfg.S3.CAFile != ca {
		t.Errorf("%+v %v", cfg.S3, err)
	}
	cfg, err = LoadSidecarFrom(env(t, map[string]string{"S3_ENDPOINT": "https://s3", "S3_SSL_VALIDATE": "false"}))
	if err != nil || len(cfg.Warnings) != 1 || !strings.Contains(cfg.Warnings[0], "not verified") {
		t.Errorf("%q %v", cfg.Warnings, err)
	}
	cfg, err = LoadSidecarFrom(env(t, map[string]string{"S3_ENDPOINT": "https://s3", "S3_SSL_VALIDATE": "true"}))
	if err != nil || len(cfg.Warnings) != 0 {
		t.Errorf("%q %v", cfg.Warnings, err)
	}
}

func TestOAuth(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"endpoint": "http://file/token\n", "client-id": "fileid\n", "client-secret": "filesecret\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	none := map[string]string{"OAUTH_CLIENT_ENDPOINT": "-", "OAUTH_CLIENT_ID": "-", "OAUTH_CLIENT_SECRET": "-", "OAUTH_CONFIG_DIR": dir}
	load := func(changes map[string]string) (Sidecar, error) {
		all := maps.Clone(none)
		maps.Copy(all, changes)
		return LoadSidecarFrom(env(t, all))
	}
	cfg, err := load(nil)
	if err != nil || cfg.OAuth.Endpoint != "http://file/token" || cfg.OAuth.ClientID != "fileid" || cfg.OAuth.ClientSecret.Reveal() != "filesecret" {
		t.Errorf("files: %+v %v", cfg.OAuth, err)
	}
	cfg, err = load(map[string]string{"OAUTH_CLIENT_ID": "other"})
	if err != nil || cfg.OAuth.Endpoint != "http://file/token" || cfg.OAuth.ClientID != "other" {
		t.Errorf("override: %+v %v", cfg.OAuth, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "client-secret"), []byte("rotated\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, secret := cfg.OAuth.Reread(); id != "other" || secret != "rotated" {
		t.Errorf("read again: %q and a secret of %d bytes", id, len(secret))
	}
	if err := os.Remove(filepath.Join(dir, "client-secret")); err != nil {
		t.Fatal(err)
	}
	if _, err = load(nil); err == nil || !strings.Contains(err.Error(), "client-secret") {
		t.Errorf("a missing file: %v", err)
	}
	if _, err = load(map[string]string{"OAUTH_CONFIG_DIR": "/nonexistent"}); err == nil {
		t.Error("a directory that was named and is not there was accepted")
	}
}

func TestCACert(t *testing.T) {
	missing := map[string]string{"CA_CERT": "/nonexistent/ca.crt"}
	if cfg, err := LoadSidecarFrom(env(t, missing)); err != nil || len(cfg.Warnings) != 2 {
		t.Errorf("plain http: %v, warnings %q", err, cfg.Warnings)
	}
	missing["IMS_URL"] = "https://gw/apis/ims"
	if _, err := LoadSidecarFrom(env(t, missing)); err == nil || !strings.Contains(err.Error(), "CA_CERT") {
		t.Errorf("https: %v", err)
	}
}

func TestSSHD(t *testing.T) {
	vars := map[string]string{
		"IMS_ACTION": "-", "SSH_JAIL": "True", "JOB_ENABLE_DKMS": "True", "SSHD_CONFIG_FILE": "/etc/cray/ims/sshd_config", "CUSTOMIZATION_SCRIPT": "/run_script.sh",
		"SSHD_OPTIONS": `-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config -o "Banner=/a b"`,
	}
	cfg, err := LoadSSHDFrom(env(t, vars))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"-E", "/etc/cray/ims/sshd.log", "-f", "/etc/cray/ims/sshd_config", "-o", "Banner=/a b"}
	if !reflect.DeepEqual(cfg.Options, want) {
		t.Errorf("options %q", cfg.Options)
	}
	if cfg.Action != ActionCustomize || !cfg.Jailed || !cfg.DKMS || cfg.ConfigFile != "/etc/cray/ims/sshd_config" || cfg.CustomizationScript != "/run_script.sh" {
		t.Errorf("%+v", cfg)
	}
	if _, err := LoadSSHDFrom(env(t, map[string]string{"SSHD_OPTIONS": `-o "open`})); err == nil {
		t.Error("an unclosed quote was accepted")
	}
}

// TestSecretsLeaveTheEnvironment: no child of the sidecar may inherit them.
func TestSecretsLeaveTheEnvironment(t *testing.T) {
	getenv := env(t, nil)
	for _, name := range []string{"IMS_JOB_ID", "IMS_ACTION", "IMAGE_ROOT_ARCHIVE_NAME", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET",
		"IMS_URL", "OAUTH_CLIENT_ENDPOINT", "OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET"} {
		t.Setenv(name, getenv(name))
	}
	cfg, err := LoadSidecar()
	if err != nil || cfg.S3.SecretKey.Reveal() != "topsecret" || cfg.S3.AccessKey != "access" || cfg.OAuth.ClientSecret.Reveal() != "alsosecret" {
		t.Fatalf("%v", err)
	}
	for _, v := range os.Environ() {
		if strings.Contains(v, "secret") && !strings.Contains(v, "IMS_URL") || strings.HasPrefix(v, "S3_ACCESS_KEY") {
			t.Errorf("still in the environment: %s", v)
		}
	}
}

// TestSecretsDoNotPrint tries every usual way to write a configuration out.
func TestSecretsDoNotPrint(t *testing.T) {
	cfg, err := LoadSidecarFrom(env(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+"\n", cfg)
		fmt.Fprintf(&out, verb+"\n", &cfg)
		fmt.Fprintf(&out, verb+"\n", cfg.S3.SecretKey)
		fmt.Fprintf(&out, verb+"\n", struct{ hidden Secret }{cfg.S3.SecretKey})
	}
	if err := json.NewEncoder(&out).Encode(cfg); err != nil {
		t.Fatal(err)
	}
	NewLogger(&out, LogText, slog.LevelDebug).Info("cfg", "cfg", cfg, "secret", cfg.S3.SecretKey)
	NewLogger(&out, LogJSON, slog.LevelDebug).Info("cfg", "cfg", cfg, "secret", cfg.S3.SecretKey)
	for _, secret := range []string{"topsecret", "alsosecret", fmt.Sprintf("%x", "topsecret"), fmt.Sprintf("%x", "alsosecret")} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("%s was printed", secret)
		}
	}
}

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	log := NewLogger(&out, LogText, slog.LevelWarn, "job", jobID)
	log.Info("quiet")
	log.Warn("loud")
	if got := out.String(); strings.Contains(got, "quiet") || !strings.Contains(got, "loud") || !strings.Contains(got, "job="+jobID) {
		t.Errorf("%q", got)
	}
	out.Reset()
	NewLogger(&out, LogJSON, slog.LevelInfo, "job", jobID).Info("two\nlines", "after", time.Minute, "err", errors.New("x\xff"))
	var line map[string]string
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Fatalf("%q: %v", &out, err)
	}
	delete(line, "time")
	if want := map[string]string{"level": "INFO", "msg": "two\nlines", "job": jobID, "after": "1m0s", "err": "x\ufffd"}; !maps.Equal(line, want) {
		t.Errorf("%v, want %v", line, want)
	}
}

// FuzzLoad: any environment ends in a value or an error, never in a panic.
func FuzzLoad(f *testing.F) {
	f.Add("S3_ENDPOINT", "http://[::1")
	f.Add("IMAGE_BOOT_DIR", "/mnt/image/image-root/../..")
	f.Add("IMS_PYTHON_HELPER_TIMEOUT", "0x1p-2000")
	f.Add("SSHD_OPTIONS", `\`)
	f.Fuzz(func(t *testing.T, name, value string) {
		getenv := env(t, map[string]string{name: value})
		cfg, err := LoadSidecarFrom(getenv)
		if err == nil && (!filepath.IsLocal(cfg.BootDir) || cfg.Timeout <= 0) {
			t.Errorf("accepted: boot %q, timeout %v", cfg.BootDir, cfg.Timeout)
		}
		if _, err := LoadSSHDFrom(getenv); err != nil && err.Error() == "" {
			t.Error("an error without words")
		}
	})
}

// testCA is a throw-away certificate; only its form matters.
const testCA = `-----BEGIN CERTIFICATE-----
MIIBNDCB56ADAgECAhRFyQQxHmVyvkZIsTlZvOzq74cmsjAFBgMrZXAwDzENMAsG
A1UEAwwEdGVzdDAgFw0yNjExMjMwNTA0MjFaGA8yMTI2MTAzMDA1MDQyMVowDzEN
MAsGA1UEAwwEdGVzdDAqMAUGAytlcAMhABtmEx08M2r4hUStI1PEyujxO+nQ4xE9
Zd9lWVHCn2z9o1MwUTAdBgNVHQ4EFgQUxKjy3VJaFmLPU8jE1bEk1Whd9bgwHwYD
VR0jBBgwFoAUxKjy3VJaFmLPU8jE1bEk1Whd9bgwDwYDVR0TAQH/BAUwAwEB/zAF
BgMrZXADQQBa07GJBe58wDZkwDLckxyTkNdOFIu1qo4wv/UJWdGyeWWEuKy/Mwua
uK7HV3zHe8HV8vtkxg3G1nssZmV06KcN
-----END CERTIFICATE-----
`
