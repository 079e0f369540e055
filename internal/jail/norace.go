// SPDX-License-Identifier: Apache-2.0

//go:build !race

package jail

var raceEnv []string
