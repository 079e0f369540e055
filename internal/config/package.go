// SPDX-License-Identifier: Apache-2.0

package config

import "os"

// LoadPackage reads the environment for the legacy package_and_upload.sh: a
// job, a name and S3 keys are needed. Without IMS_ACTION the image root is that
// of a create job, as it was for the script.
func LoadPackage() (Sidecar, error) {
	defer dropSecrets()
	return load(func(name string) string {
		if v := os.Getenv(name); v != "" || name != "IMS_ACTION" {
			return v
		}
		return ActionCreate
	}, needJob|needName|needS3, nil)
}
