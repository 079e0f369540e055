// SPDX-License-Identifier: Apache-2.0

//go:build race

package jail

// raceEnv keeps a child that is built with the race detector from sleeping a second before it ends: it has a dozen short
// lives in each test.
var raceEnv = []string{"GORACE=atexit_sleep_ms=0"}
