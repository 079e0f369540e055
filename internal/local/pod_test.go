// SPDX-License-Identifier: Apache-2.0

package local

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func testSpec(dir string, jail, dkms bool) podSpec {
	job := Job{ID: "dd083330-fa89-4acf-b701-619f6d00d304", JobType: "customize", ArchiveName: "lab_image", Arch: "x86_64",
		KernelFileName: "vmlinuz", InitrdFileName: "initrd", ParametersFileName: "kernel-parameters", RequireDKMS: dkms,
		KubernetesService: "cray-ims-dd083330-fa89-4acf-b701-619f6d00d304-service",
		KubernetesJob:     "cray-ims-dd083330-fa89-4acf-b701-619f6d00d304-customize",
		SSHContainers:     []SSHContainer{{Name: "customize", Jail: jail}}}
	return podSpec{dir: dir, job: job, port: 40022,
		input: PodInput{PublicKey: "ssh-ed25519 AAAA lab\n", DownloadURL: "http://127.0.0.1:7072/rootfs?a=b&c=d", DownloadMD5: "3f33ccab084e5ab4400ea7f24a7507a1"},
		world: podWorld{imsURL: "http://127.0.0.1:9100", tokenURL: "http://127.0.0.1:9100" + TokenPath, clientID: "admin-client", secret: "s",
			s3Endpoint: "http://127.0.0.1:7072", s3: s3Keys{"access", "secret"}, ca: []byte("CA"), remoteKey: []byte("KEY"), bin: "/opt/bin"}}
}

// TestPodEnvironment: the variables of the job template and no others, but for
// the two that a machine without gateway and cluster network needs.
func TestPodEnvironment(t *testing.T) {
	want := map[string]string{
		prepareName: `API_GATEWAY_HOSTNAME=istio-ingressgateway.istio-system.svc.cluster.local
BUILD_ARCH=x86_64
CA_CERT=/etc/cray/ca/certificate_authority.crt
DOWNLOAD_MD5SUM=3f33ccab084e5ab4400ea7f24a7507a1
IMAGE_ROOT_PARENT=/mnt/image
IMS_JOB_ID=dd083330-fa89-4acf-b701-619f6d00d304
IMS_SSHD_IMAGE=artifactory.algol60.net/csm-docker/stable/cray-ims-sshd:0.0.0-imssshd
IMS_URL=http://127.0.0.1:9100
INITRD_FILENAME=initrd
JOB_ENABLE_DKMS=True
KERNEL_FILENAME=vmlinuz
KERNEL_PARAMETERS_FILENAME=kernel-parameters
LOG_LEVEL=INFO
OAUTH_CONFIG_DIR=/etc/admin-client-auth
REMOTE_BUILD_NODE=
SSH_JAIL=False`,
		sidecarName: `API_GATEWAY_HOSTNAME=istio-ingressgateway.istio-system.svc.cluster.local
BUILD_ARCH=x86_64
CA_CERT=/etc/cray/ca/certificate_authority.crt
ENABLE_DEBUG=False
IMAGE_ROOT_ARCHIVE_NAME=lab_image
IMAGE_ROOT_PARENT=/mnt/image
IMS_ACTION=customize
IMS_JOB_ID=dd083330-fa89-4acf-b701-619f6d00d304
IMS_URL=http://127.0.0.1:9100
INITRD_FILENAME=initrd
KERNEL_FILENAME=vmlinuz
KERNEL_PARAMETERS_FILENAME=kernel-parameters
LOG_LEVEL=INFO
OAUTH_CONFIG_DIR=/etc/admin-client-auth
REMOTE_BUILD_NODE=
S3_ACCESS_KEY=access
S3_BUCKET=boot-images
S3_ENDPOINT=http://127.0.0.1:7072
S3_SECRET_KEY=secret
S3_SSL_VALIDATE=true
SERVICE_NAME=cray-ims-dd083330-fa89-4acf-b701-619f6d00d304-service
SSHD_PORT=40022
SSH_JAIL=False`,
		sshdName: `API_GATEWAY_HOSTNAME=istio-ingressgateway.istio-system.svc.cluster.local
BUILD_ARCH=x86_64
CA_CERT=/etc/cray/ca/certificate_authority.crt
ENABLE_DEBUG=False
IMAGE_ROOT_PARENT=/mnt/image
IMS_ACTION=customize
IMS_JOB_ID=dd083330-fa89-4acf-b701-619f6d00d304
JOB_ENABLE_DKMS=True
REMOTE_BUILD_NODE=
REMOTE_HEARTBEAT_TIMEOUT_COUNT=12
SSHD_CONFIG_FILE=/etc/cray/ims/sshd_config
SSHD_OPTIONS=-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config -o ListenAddress=127.0.0.1
SSH_JAIL=False`,
	}
	for _, jail := range []bool{false, true} {
		for name, env := range want {
			got := testSpec("/data/jobs/x", jail, true).container(name).Env
			slices.Sort(got)
			if jail {
				env = strings.Replace(env, "SSH_JAIL=False", "SSH_JAIL=True", 1)
			}
			if strings.Join(got, "\n") != env {
				t.Errorf("%s (jail %v) gets\n%s\nwant\n%s", name, jail, strings.Join(got, "\n"), env)
			}
		}
	}
}

func TestPodPrivilegesAndSecrets(t *testing.T) {
	for _, dkms := range []bool{false, true} {
		spec := testSpec("/data/jobs/x", true, dkms)
		for name, privileged := range map[string]bool{prepareName: true, sidecarName: false, sshdName: dkms} {
			if got := spec.container(name).Privileged; got != privileged {
				t.Errorf("%s with require_dkms %v: privileged %v", name, dkms, got)
			}
		}
		// the container people log in to holds no secret
		sshd := spec.container(sshdName)
		for _, m := range sshd.Mounts {
			if m.Target == "/etc/admin-client-auth" || m.Target == "/etc/cray" {
				t.Errorf("sshd mounts %s", m.Target)
			}
		}
		if env := strings.Join(sshd.Env, " "); strings.Contains(env, "secret") || strings.Contains(env, "S3_") {
			t.Errorf("sshd's environment: %s", env)
		}
	}
}

func TestPodVolumes(t *testing.T) {
	spec := testSpec(t.TempDir(), false, true)
	if err := spec.write(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"ssh-pubkey/authorized_keys":          "ssh-ed25519 AAAA lab\n",
		"ssh-pubkey/..data/authorized_keys":   "ssh-ed25519 AAAA lab\n",
		"ca-pubkey/certificate_authority.crt": "CA",
		"remote-key/id_ecdsa":                 "KEY",
		"client-auth/endpoint":                "http://127.0.0.1:9100" + TokenPath,
		"client-auth/client-id":               "admin-client",
		"client-auth/client-secret":           "s",
	} {
		if b, err := os.ReadFile(spec.path(path)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v", path, b, err)
		}
	}
	if link, err := os.Readlink(spec.path("ca-pubkey", caFile)); err != nil || link != "..data/"+caFile {
		t.Errorf("%s is a link to %q, %v", caFile, link, err)
	}
	if link, err := os.Readlink(spec.path("ca-pubkey", "..data")); err != nil || !strings.HasPrefix(link, "..2") || filepath.Base(link) != link {
		t.Errorf("..data is a link to %q, %v", link, err)
	}
}
