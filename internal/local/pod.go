// SPDX-License-Identifier: Apache-2.0

package local

import (
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// The containers of a customize job's pod.
const (
	prepareName = "prepare"
	sidecarName = "buildenv-sidecar"
	sshdName    = "sshd"
)

// Paths inside the containers.
const (
	volumePath  = "/mnt/image"
	insideBin   = "/usr/local/bin"
	caPath      = "/etc/cray/ca"
	caFile      = "certificate_authority.crt"
	gatewayHost = "istio-ingressgateway.istio-system.svc.cluster.local"
	sshdImage   = "artifactory.algol60.net/csm-docker/stable/cray-ims-sshd:0.0.0-imssshd"
)

// podWorld is what every job's pod is told of its surroundings.
type podWorld struct {
	imsURL, tokenURL string
	clientID, secret string
	s3Endpoint       string
	s3               s3Keys
	ca, remoteKey    []byte // PEM
	bin              string // directory of sidecar and sshd
	hide             []string
}

// podSpec is one job's pod.
type podSpec struct {
	world podWorld
	job   Job
	input PodInput
	port  int
	dir   string // <data>/jobs/<id>
}

func (p podSpec) path(elem ...string) string {
	return filepath.Join(append([]string{p.dir}, elem...)...)
}

// pyBool is how the service writes a bool into its template.
func pyBool(b bool) string {
	if b {
		return "True"
	}
	return "False"
}

// write makes the pod's volumes: the claim, the empty directory, and the config
// maps and secrets in the shape the kubelet gives them.
func (p podSpec) write() error {
	for _, dir := range []string{"volume", "ims", "logs", "scratch/" + prepareName, "scratch/" + sidecarName, "scratch/" + sshdName, "etc"} {
		if err := os.MkdirAll(p.path(dir), 0o755); err != nil {
			return err
		}
	}
	for name, files := range map[string]map[string][]byte{
		"ssh-pubkey":  {"authorized_keys": []byte(p.input.PublicKey)},
		"ca-pubkey":   {caFile: p.world.ca},
		"remote-key":  {"id_ecdsa": p.world.remoteKey},
		"client-auth": {"endpoint": []byte(p.world.tokenURL), "client-id": []byte(p.world.clientID), "client-secret": []byte(p.world.secret)},
	} {
		if err := writeConfigMap(p.path(name), files); err != nil {
			return err
		}
	}
	// mount points inside the volume mounted on /etc/cray
	for _, name := range []string{"ims", "ca", "remote-keys"} {
		if err := os.Mkdir(p.path("ssh-pubkey", name), 0o755); err != nil {
			return err
		}
	}
	return p.writeNetworkFiles()
}

// writeNetworkFiles copies what the kubelet gives a pod that shares the host's
// network. They are copies because the host's may be links into /run.
func (p podSpec) writeNetworkFiles() error {
	for _, name := range []string{"resolv.conf", "hosts"} {
		b, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		if name == "hosts" {
			b = append(b, "\n127.0.1.1 "+p.hostname()+"\n"...)
		}
		if err := os.WriteFile(p.path("etc", name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// writeConfigMap lays files out as the kubelet does: a dated directory, a
// ..data link to it, and a link per file.
func writeConfigMap(dir string, files map[string][]byte) error {
	dated := time.Now().Format("..2006_01_02_15_04_05.000000000")
	if err := os.MkdirAll(filepath.Join(dir, dated), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(dated, filepath.Join(dir, "..data")); err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, dated, name), content, 0o600); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func (p podSpec) hostname() string { return p.job.KubernetesJob }

// container is the set-up of one of the pod's containers: program, environment
// and mounts as the service's job template has them. IMS_URL and SSHD_PORT are
// ours: there is no gateway host here, and port 22 belongs to the machine.
func (p podSpec) container(name string) containerSetup {
	var (
		volume  = mount{p.path("volume"), volumePath, false}
		config  = mount{p.path("ims"), "/etc/cray/ims", false}
		ca      = mount{p.path("ca-pubkey"), caPath, true}
		remote  = mount{p.path("remote-key"), "/etc/cray/remote-keys", true}
		keys    = mount{p.path("ssh-pubkey"), "/etc/cray", true}
		auth    = mount{p.path("client-auth"), "/etc/admin-client-auth", true}
		resolve = mount{p.path("etc", "resolv.conf"), "/etc/resolv.conf", false}
		hosts   = mount{p.path("etc", "hosts"), "/etc/hosts", false}
	)
	program := func(name string) mount {
		return mount{filepath.Join(p.world.bin, name), filepath.Join(insideBin, name), true}
	}
	s := containerSetup{Hostname: p.hostname(), Hide: p.world.hide, Scratch: p.path("scratch", name)}
	switch name {
	case prepareName:
		s.Args = []string{insideBin + "/sidecar", "prepare", volumePath, p.input.DownloadURL}
		s.Env = p.prepareEnv()
		s.Privileged = true
		s.Mounts = []mount{program("sidecar"), keys, ca, remote, auth, volume}
	case sidecarName:
		s.Args = []string{insideBin + "/sidecar", "run", volumePath}
		s.Env = p.sidecarEnv()
		s.Mounts = []mount{program("sidecar"), keys, config, ca, remote, auth, volume}
	case sshdName:
		s.Args = []string{insideBin + "/sshd"}
		s.Env = p.sshdEnv()
		s.Privileged = p.job.RequireDKMS
		s.Mounts = []mount{program("sshd"), config, ca, remote, volume}
	}
	s.Mounts = append(s.Mounts, resolve, hosts)
	return s
}

func (p podSpec) commonEnv() []string {
	return []string{
		"API_GATEWAY_HOSTNAME=" + gatewayHost,
		"CA_CERT=" + filepath.Join(caPath, caFile),
		"IMAGE_ROOT_PARENT=" + volumePath,
		"IMS_JOB_ID=" + p.job.ID,
		"SSH_JAIL=" + pyBool(p.job.SSHContainers[0].Jail),
		"BUILD_ARCH=" + p.job.Arch,
		"REMOTE_BUILD_NODE=" + p.job.RemoteBuildNode,
	}
}

func (p podSpec) bootEnv() []string {
	return []string{
		"OAUTH_CONFIG_DIR=/etc/admin-client-auth",
		"KERNEL_FILENAME=" + p.job.KernelFileName,
		"INITRD_FILENAME=" + p.job.InitrdFileName,
		"KERNEL_PARAMETERS_FILENAME=" + p.job.ParametersFileName,
		"LOG_LEVEL=INFO",
		"IMS_URL=" + p.world.imsURL,
	}
}

func (p podSpec) prepareEnv() []string {
	return append(append(p.commonEnv(), p.bootEnv()...),
		"DOWNLOAD_MD5SUM="+p.input.DownloadMD5,
		"JOB_ENABLE_DKMS="+pyBool(p.job.RequireDKMS),
		"IMS_SSHD_IMAGE="+sshdImage,
	)
}

func (p podSpec) sidecarEnv() []string {
	return append(append(p.commonEnv(), p.bootEnv()...),
		"ENABLE_DEBUG="+pyBool(p.job.EnableDebug),
		"IMS_ACTION="+p.job.JobType,
		"SERVICE_NAME="+p.job.KubernetesService,
		"IMAGE_ROOT_ARCHIVE_NAME="+p.job.ArchiveName,
		"S3_BUCKET="+bucketImages,
		"S3_ACCESS_KEY="+p.world.s3.AccessKey,
		"S3_SECRET_KEY="+p.world.s3.SecretKey,
		"S3_ENDPOINT="+p.world.s3Endpoint,
		"S3_SSL_VALIDATE=true",
		"SSHD_PORT="+strconv.Itoa(p.port),
	)
}

func (p podSpec) sshdEnv() []string {
	return append(p.commonEnv(),
		"ENABLE_DEBUG="+pyBool(p.job.EnableDebug),
		"IMS_ACTION="+p.job.JobType,
		// The template's, and not for the whole network: here it is the host's.
		"SSHD_OPTIONS=-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config -o ListenAddress=127.0.0.1",
		"SSHD_CONFIG_FILE=/etc/cray/ims/sshd_config",
		"JOB_ENABLE_DKMS="+pyBool(p.job.RequireDKMS),
		"REMOTE_HEARTBEAT_TIMEOUT_COUNT=12",
	)
}

// endpoint is where the job's SSH container answers, for every caller.
func endpoint(port int) ConnectionInfo {
	e := Endpoint{Host: "127.0.0.1", Port: port}
	return ConnectionInfo{CustomerAccess: e, ClusterLocal: e}
}

// volumeRemoved is the claim after its release: gone by name, while containers
// that still run keep it.
func (p podSpec) volumeRemoved() string { return p.path("volume.released") }
