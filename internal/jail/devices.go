// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// nodeName is the name of the device nodes that tests of what may be opened make and remove.
const nodeName = ".ims-device-probe"

// hostDevices are devices no session may open, where they exist: disks, and memory.
var hostDevices = []devEntry{
	{mode: unix.S_IFBLK, rdev: unix.Mkdev(8, 0)},    // sda
	{mode: unix.S_IFBLK, rdev: unix.Mkdev(253, 0)},  // device mapper, virtio
	{mode: unix.S_IFBLK, rdev: unix.Mkdev(254, 0)},  // virtio
	{mode: unix.S_IFBLK, rdev: unix.Mkdev(259, 0)},  // nvme
	{mode: unix.S_IFBLK, rdev: unix.Mkdev(7, 0)},    // loop0
	{mode: unix.S_IFCHR, rdev: unix.Mkdev(1, 1)},    // mem
	{mode: unix.S_IFCHR, rdev: unix.Mkdev(1, 4)},    // port
	{mode: unix.S_IFCHR, rdev: unix.Mkdev(10, 237)}, // loop-control
}

// openDevices makes device nodes in the image root and tries to open them. It returns the first that is not forbidden, ""
// when all are: by the container's device control group or by a nodev mount. Whether the device exists is not the
// question, a permission granted for one that does not would show as ENXIO.
func (d *imageDir) openDevices() (open string, err error) {
	dirfd := d.fd()
	err = keepTimes(dirfd, func() error {
		for _, d := range append(partitions(), hostDevices...) {
			if err := tryDevice(dirfd, d); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EROFS) {
				kind := "block"
				if d.mode == unix.S_IFCHR {
					kind = "character"
				}
				open = fmt.Sprintf("%s device %d:%d", kind, unix.Major(d.rdev), unix.Minor(d.rdev))
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("try device nodes in the image root: %w", err)
	}
	return open, nil
}

// tryDevice makes the node, opens it and removes it again.
func tryDevice(dirfd int, d devEntry) error {
	if err := unix.Mknodat(dirfd, nodeName, d.mode|0o600, int(d.rdev)); err != nil {
		return err
	}
	defer unix.Unlinkat(dirfd, nodeName, 0)
	fd, err := unix.Openat(dirfd, nodeName, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Close(fd)
	return nil
}

// harmlessDevice reports whether rdev is one of the character devices every container may use.
func harmlessDevice(rdev uint64) bool {
	major, minor := unix.Major(rdev), unix.Minor(rdev)
	switch major {
	case 1: // null zero full random urandom
		return minor == 3 || minor == 5 || minor == 7 || minor == 8 || minor == 9
	case 5: // tty console ptmx
		return minor <= 2
	}
	return false
}

// findDevices looks through the whole image for nodes of devices that this machine has. Where root may open devices
// (openDevices) such a node is a way out as good as any; an image that brings one is refused. Nothing is opened: some
// devices act on that alone.
func (d *imageDir) findDevices() error {
	top := fmt.Sprintf("/proc/self/fd/%d", d.fd())
	return filepath.WalkDir(top+"/.", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("look for device nodes: %w", err)
		}
		if !e.IsDir() && e.Type()&fs.ModeDevice == 0 {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("look for device nodes: %w", err)
		}
		if e.IsDir() {
			if st.Dev != d.st.Dev {
				return fs.SkipDir
			}
			return nil
		}
		kind := "block"
		if st.Mode&unix.S_IFMT == unix.S_IFCHR {
			kind = "char"
			if harmlessDevice(st.Rdev) {
				return nil
			}
		}
		number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		if _, err := os.Lstat("/sys/dev/" + kind + "/" + number); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("%s of the image is the %s device %s of this machine, and this container lets root open it; remove it: %w",
			path[len(top):], kind, number, errImage)
	})
}
