// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// partitions lists the block devices of the machine, which /proc shows in every container.
func partitions() []devEntry {
	b, err := os.ReadFile("/proc/partitions")
	if err != nil {
		return nil
	}
	return parsePartitions(string(b))
}

func parsePartitions(text string) []devEntry {
	var devs []devEntry
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 4 {
			continue
		}
		major, err1 := strconv.ParseUint(f[0], 10, 32)
		minor, err2 := strconv.ParseUint(f[1], 10, 32)
		if err1 == nil && err2 == nil {
			devs = append(devs, devEntry{mode: unix.S_IFBLK, rdev: unix.Mkdev(uint32(major), uint32(minor))})
		}
	}
	return devs
}
