// SPDX-License-Identifier: Apache-2.0

package local

// noRunner records jobs and runs nothing: the pod is started by somebody else,
// who gives it this installation's addresses. Its jobs outlive imslocal.
type noRunner struct{}

// Reserve implements Runner: the pod's port 22, on the network imslocal is in.
func (noRunner) Reserve(Job) (ConnectionInfo, error) { return endpoint(22), nil }

// Start implements Runner.
func (noRunner) Start(Job, PodInput) error { return nil }

// Release implements Runner.
func (noRunner) Release(string) error { return nil }

// Remove implements Runner.
func (noRunner) Remove(string) error { return nil }
