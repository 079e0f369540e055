// SPDX-License-Identifier: Apache-2.0

// Package config reads the environment contract of an IMS job pod, once, into
// typed structs. It is the only place in the product that calls os.Getenv.
//
// Names, defaults and aliases are those the IMS job template and the legacy
// containers use; nothing is renamed. SSHD_PORT and IMS_BUILDENV_… are our
// extensions.
//
// It refuses to guess: a value that cannot be understood is an error that
// names the variable and the next step, and all of them are reported at once,
// because a pod that fails twice costs its owner two downloads. Secrets are
// dropped from the process environment after reading, so that no child
// inherits them, and their type does not print.
package config

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Paths the pod mounts. They are fields of the structs as well, so that a
// test can point them elsewhere; no variable changes them.
const (
	DefaultParent  = "/mnt/image"
	IMSDir         = "/etc/cray/ims"             // shared by sidecar and sshd
	CADir          = "/etc/cray/ca"              // ConfigMap: certificate_authority.crt
	AuthorizedKeys = "/etc/cray/authorized_keys" // ConfigMap: the user's public key
	ResolvConf     = "/etc/resolv.conf"
)

// Defaults of single variables. API_GATEWAY_HOSTNAME, which the job template
// also sets, is not read: the contract knows IMS_URL and this default only.
const (
	DefaultIMSURL   = "https://api-gw-service-nmn.local/apis/ims"
	DefaultOAuthDir = "/etc/admin-client-auth" // files endpoint, client-id, client-secret
	DefaultTimeout  = 720 * time.Second
	DefaultSSHPort  = 22
)

// Values of Common.Action, Common.Arch and Sidecar.Layout.
const (
	ActionCustomize = "customize"
	ActionCreate    = "create"
	ArchX86         = "x86_64"
	ArchARM         = "aarch64"

	LayoutAuto     = "auto" // layered when the container sshd will be able to mount it
	LayoutLayered  = "layered"
	LayoutUnpacked = "unpacked"
)

// Values of Sidecar.Changes, what becomes of the report on what a job changed.
const (
	ChangesWrite  = "write"  // beside the job's log
	ChangesUpload = "upload" // beside the image in the store, too
	ChangesOff    = "off"
)

// Values of Common.LogFormat.
const (
	LogText = "text"
	LogJSON = "json"
)

// Names of directories and files in an image.
const (
	rootName      = "image-root"
	bootName      = "boot"
	kernelX86     = "vmlinuz"
	kernelARM     = "Image"
	defaultInitrd = "initrd"
)

// Common is what every container of the job pod is told.
type Common struct {
	JobID           string // uuid; may be empty outside a job
	Action          string // ActionCustomize or ActionCreate
	Parent          string // absolute; holds the signal files and the image root
	Jailed          bool
	Arch            string // ArchX86 or ArchARM
	DKMS            bool
	Debug           bool
	RemoteBuildNode string // set: the job is built on another machine
	LogLevel        slog.Level
	LogFormat       string // LogText or LogJSON
	CACert          string // CA file for HTTPS to IMS and the token endpoint; may be empty
	IMSDir          string // always the constant IMSDir outside tests

	// Warnings are remarks about accepted values, to be logged once a logger exists.
	Warnings []string
}

// ImageRoot is the directory a customize job works on.
func (c Common) ImageRoot() string { return filepath.Join(c.Parent, rootName) }

// S3 is the artifact store.
type S3 struct {
	Endpoint  string // URL
	AccessKey string
	SecretKey Secret
	Bucket    string
	Verify    bool   // verify the server's certificate
	CAFile    string // with Verify: trust this file; empty means the system's
}

// OAuth holds the client credentials for IMS. All empty means that no token
// is asked for.
type OAuth struct {
	Endpoint     string // token URL
	ClientID     string
	ClientSecret Secret

	idFile, secretFile string // where the two come from; empty: the environment
}

// Reread returns the id and the secret as their files say now: a mounted secret is replaced while a job waits for its user.
func (o OAuth) Reread() (id, secret string) {
	id, secret = o.ClientID, o.ClientSecret.Reveal()
	for file, to := range map[string]*string{o.idFile: &id, o.secretFile: &secret} {
		if file == "" {
			continue
		}
		if b, err := os.ReadFile(file); err == nil {
			*to = strings.TrimSpace(string(b))
		}
	}
	return id, secret
}

// Configured reports whether a token can be asked for.
func (o OAuth) Configured() bool { return o.Endpoint != "" }

// Sidecar is the configuration of the containers prepare and buildenv-sidecar.
type Sidecar struct {
	Common
	ArchiveName    string // user text: never part of a path
	RootDir        string // absolute
	BootDir        string // inside RootDir, without a leading slash
	KernelName     string // inside BootDir
	InitrdName     string
	ParametersName string // empty: no parameters file is looked for
	S3             S3
	OAuth          OAuth
	IMSURL         string // base URL without a trailing slash
	Timeout        time.Duration
	DownloadMD5    string // 32 lower-case hex digits, or empty
	SSHPort        int
	Changes        string // ChangesWrite, ChangesUpload or ChangesOff
	Layout         string // of the root: LayoutAuto, or the one that is wanted
	Compressor     string // of the new image; "": that of the old one
	BlockSize      string // likewise
	ExcludeFile    string // what is left out of the new image; "": nothing
	CADir          string
	AuthorizedKeys string
	ResolvConf     string
}

// SSHD is the configuration of the container sshd.
type SSHD struct {
	Common
	Options             []string // SSHD_OPTIONS, split as a shell would
	ConfigFile          string
	CustomizationScript string
}

// Error lists everything wrong with the environment.
type Error struct{ Problems []string }

func (e *Error) Error() string {
	if len(e.Problems) == 1 {
		return "configuration: " + e.Problems[0]
	}
	return fmt.Sprintf("configuration: %d problems:\n  - %s", len(e.Problems), strings.Join(e.Problems, "\n  - "))
}

// What a command needs beside what it may use.
type need int

const (
	needJob need = 1 << iota
	needAction
	needName
	needS3
)

// LoadSidecar reads the environment for `sidecar run`. The first argument,
// when given, is the image root's parent and wins over IMAGE_ROOT_PARENT.
// S3 and OAuth secrets leave the process environment.
//
// On error the result still holds every value that was understood: a job with
// an unusable environment must be marked `error` in IMS, which needs only the
// job id, the URL and the credentials.
func LoadSidecar(args ...string) (Sidecar, error) {
	defer dropSecrets()
	return LoadSidecarFrom(os.Getenv, args...)
}

// LoadSidecarFrom is LoadSidecar over any environment.
func LoadSidecarFrom(getenv func(string) string, args ...string) (Sidecar, error) {
	return load(getenv, needJob|needAction|needName|needS3, args)
}

// LoadPrepare reads the environment for `sidecar prepare`, which needs a job
// and neither an action nor S3 keys. Otherwise it is LoadSidecar.
func LoadPrepare(args ...string) (Sidecar, error) {
	defer dropSecrets()
	return LoadPrepareFrom(os.Getenv, args...)
}

// LoadPrepareFrom is LoadPrepare over any environment.
func LoadPrepareFrom(getenv func(string) string, args ...string) (Sidecar, error) {
	return load(getenv, needJob, args)
}

// LoadUpload reads the environment for `sidecar upload`: S3 keys are needed,
// a job is not.
func LoadUpload() (Sidecar, error) {
	defer dropSecrets()
	return load(os.Getenv, needS3, nil)
}

// LoadStatus reads the environment for `sidecar status`, whose job id comes
// from the command line.
func LoadStatus() (Sidecar, error) {
	defer dropSecrets()
	return load(os.Getenv, 0, nil)
}

// LoadSSHD reads the environment of the container sshd. The first argument,
// when given, is the image root's parent.
func LoadSSHD(args ...string) (SSHD, error) { return LoadSSHDFrom(os.Getenv, args...) }

// LoadSSHDFrom is LoadSSHD over any environment.
func LoadSSHDFrom(getenv func(string) string, args ...string) (SSHD, error) {
	r := reader{getenv: getenv}
	cfg := SSHD{
		Common:              r.common(args),
		Options:             r.words("SSHD_OPTIONS"),
		ConfigFile:          r.text("SSHD_CONFIG_FILE", ""),
		CustomizationScript: r.text("CUSTOMIZATION_SCRIPT", ""),
	}
	if cfg.Action == "" {
		cfg.Action = ActionCustomize
	}
	cfg.Warnings = r.warnings
	return cfg, r.err()
}

func load(getenv func(string) string, needs need, args []string) (Sidecar, error) {
	r := reader{getenv: getenv}
	cfg := Sidecar{
		Common:         r.common(args),
		ArchiveName:    r.userText("IMAGE_ROOT_ARCHIVE_NAME", "KIWI_RECIPE_NAME"),
		InitrdName:     r.fileName("INITRD_FILENAME", defaultInitrd),
		ParametersName: r.fileName("KERNEL_PARAMETERS_FILENAME", ""),
		S3:             r.s3(needs&needS3 != 0),
		OAuth:          r.oauth(),
		IMSURL:         strings.TrimRight(r.url("IMS_URL", r.text("IMS_URL", DefaultIMSURL)), "/"),
		Timeout:        r.seconds("IMS_PYTHON_HELPER_TIMEOUT", DefaultTimeout),
		DownloadMD5:    r.md5("DOWNLOAD_MD5SUM"),
		SSHPort:        r.port("SSHD_PORT", DefaultSSHPort),
		Changes:        r.oneOf("IMS_BUILDENV_CHANGES", ChangesWrite, ChangesWrite, ChangesUpload, ChangesOff),
		Layout:         r.oneOf("IMS_BUILDENV_LAYOUT", LayoutAuto, LayoutAuto, LayoutUnpacked, LayoutLayered),
		Compressor:     r.text("IMS_BUILDENV_COMPRESSOR", ""),
		BlockSize:      r.text("IMS_BUILDENV_BLOCK_SIZE", ""),
		ExcludeFile:    r.text("IMS_BUILDENV_EXCLUDE_FILE", ""),
		CADir:          CADir,
		AuthorizedKeys: AuthorizedKeys,
		ResolvConf:     ResolvConf,
	}
	cfg.KernelName = kernelName(cfg.Arch, r.fileName("KERNEL_FILENAME", ""))
	r.rootAndBoot(&cfg)
	r.checkCA(&cfg)
	if needs&needJob != 0 {
		r.checkJob(cfg.JobID)
	}
	if needs&needAction != 0 && r.text("IMS_ACTION", "") == "" {
		r.problem("IMS_ACTION", "is not set: set it to customize or create, as the IMS job template does")
	}
	if needs&needName != 0 && cfg.ArchiveName == "" {
		r.problem("IMAGE_ROOT_ARCHIVE_NAME", "is not set, nor is KIWI_RECIPE_NAME: set it to the name the new image shall have")
	}
	cfg.Warnings = r.warnings
	return cfg, r.err()
}

// kernelName applies the legacy rule: an aarch64 kernel is called Image, and
// the cray CLI sends vmlinuz for every architecture.
func kernelName(arch, given string) string {
	if arch == ArchARM && (given == "" || given == kernelX86) {
		return kernelARM
	}
	if given == "" {
		return kernelX86
	}
	return given
}

// dropSecrets keeps children from inheriting what only this process needs.
func dropSecrets() {
	for _, name := range []string{"S3_SECRET_KEY", "S3_ACCESS_KEY", "OAUTH_CLIENT_SECRET"} {
		os.Unsetenv(name)
	}
}

func (r *reader) common(args []string) Common {
	parent := r.text("IMAGE_ROOT_PARENT", DefaultParent)
	if len(args) > 0 && args[0] != "" {
		parent = args[0]
	}
	abs, err := filepath.Abs(parent)
	if err != nil {
		r.problem("IMAGE_ROOT_PARENT", fmt.Sprintf("%q: %v", parent, err))
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real // later opens refuse a link in its place
	}
	return Common{
		JobID:           r.text("IMS_JOB_ID", ""),
		Action:          r.oneOf("IMS_ACTION", "", ActionCustomize, ActionCreate),
		Parent:          abs,
		Jailed:          r.boolean("SSH_JAIL"),
		Arch:            r.oneOf("BUILD_ARCH", ArchX86, ArchX86, ArchARM),
		DKMS:            r.boolean("JOB_ENABLE_DKMS"),
		Debug:           r.boolean("ENABLE_DEBUG"),
		RemoteBuildNode: r.text("REMOTE_BUILD_NODE", ""),
		LogLevel:        r.level("LOG_LEVEL"),
		LogFormat:       r.logFormat("IMS_BUILDENV_LOG_FORMAT"),
		CACert:          r.text("CA_CERT", ""),
		IMSDir:          IMSDir,
	}
}

// rootAndBoot finds the image root, and the boot directory inside it.
func (r *reader) rootAndBoot(cfg *Sidecar) {
	cfg.RootDir = cfg.ImageRoot()
	if cfg.Action == ActionCreate {
		cfg.RootDir = filepath.Join(cfg.Parent, "build", rootName)
	}
	if dir := r.text("IMAGE_ROOT_DIR", ""); dir != "" {
		if !filepath.IsAbs(dir) {
			r.problem("IMAGE_ROOT_DIR", fmt.Sprintf("%q is not absolute: write the full path of the image root", dir))
		}
		cfg.RootDir = filepath.Clean(dir)
	}
	cfg.BootDir = bootName
	if dir := r.text("IMAGE_BOOT_DIR", ""); dir != "" {
		rel, err := filepath.Rel(cfg.RootDir, dir)
		if err != nil || !filepath.IsLocal(rel) {
			r.problem("IMAGE_BOOT_DIR", fmt.Sprintf("%q is not below the image root %s: unset it, or name a directory there", dir, cfg.RootDir))
			return
		}
		cfg.BootDir = rel
	}
}

// checkCA insists on CA_CERT only when something is reached over HTTPS: the
// job template always sets it, also where no ConfigMap is mounted.
func (r *reader) checkCA(cfg *Sidecar) {
	if cfg.CACert == "" {
		return
	}
	f, err := os.Open(cfg.CACert)
	if err == nil {
		f.Close()
		return
	}
	if strings.HasPrefix(cfg.IMSURL, "https:") || strings.HasPrefix(cfg.OAuth.Endpoint, "https:") {
		r.problem("CA_CERT", fmt.Sprintf("%v: mount the ConfigMap with the site's CA there, or unset it to trust the system's", err))
		return
	}
	r.warn("CA_CERT: %v; not needed, as IMS is reached without HTTPS", err)
}

// jobIDLength is that of a uuid in its canonical text form (RFC 9562).
const jobIDLength = 36

func (r *reader) checkJob(id string) {
	if id == "" {
		r.problem("IMS_JOB_ID", "is not set: set it to the id of the IMS job")
		return
	}
	valid := len(id) == jobIDLength
	for i, c := range id {
		switch i {
		case 8, 13, 18, 23:
			valid = valid && c == '-'
		default:
			valid = valid && strings.ContainsRune("0123456789abcdefABCDEF", c)
		}
	}
	if !valid {
		r.problem("IMS_JOB_ID", strconv.Quote(id)+" is not a uuid: copy the id IMS gave the job")
	}
}
