// SPDX-License-Identifier: Apache-2.0

// Package jail confines the sessions of one job.
package jail
