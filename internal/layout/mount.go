// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount mounts the image with the upper layer on it, attached nowhere: the result
// is the descriptor of the mount (fsmount(2)), good for attaching it in any mount
// namespace and for opening what is in it. The mount, and the loop device under
// it, end with the last descriptor and the last namespace that has it.
//
// root is an empty directory in parent. It takes CAP_SYS_ADMIN and Linux 5.11,
// with loop, overlay, and squashfs for the image's compressor.
func Mount(parent, root string) (*os.File, error) {
	return mountLayers(parent, filepath.Base(root), Upper, Work)
}

// overlayOptions: userxattr, because the unprivileged sidecar must be able to read
// what the layer's marks say; index, so that the names of a file stay together when
// it is changed. The first rules out redirected directories and files without data.
var overlayOptions = [][2]string{{"userxattr", ""}, {"index", "on"}}

func mountLayers(parent, root, upper, work string) (mount *os.File, err error) {
	image, err := Open(parent, Image)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	err = aside(func() (err error) {
		// Names relative to the volume need no quoting in mount options.
		if err := unix.Chdir(parent); err != nil {
			return fmt.Errorf("job volume: %w", err)
		}
		if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=64k"); err != nil {
			return fmt.Errorf("mount tmpfs: %w", err)
		}
		// The overlay has mounts of its own of its layers.
		defer func() { err = errors.Join(err, unmount(root)) }()
		lower := filepath.Join(root, "lower")
		if err := unix.Mkdir(lower, 0o700); err != nil {
			return err
		}
		if err := mountImage(image, root, lower); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unmount(lower)) }()
		mount, err = overlay(lower, upper, work)
		return err
	})
	if err != nil && mount != nil {
		mount.Close()
		mount = nil
	}
	return mount, err
}

func unmount(path string) error {
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// aside runs do in a mount namespace of its own, on a thread that ends with it.
func aside(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread does not end; as long as it is held here, it is another one's turn.
			err := aside(do)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err != nil {
			err = fmt.Errorf("new mount namespace: %w", err)
		} else if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			err = fmt.Errorf("make mounts private: %w", err)
		} else {
			err = do()
		}
		done <- err
	}()
	return <-done
}

// Device numbers: admin-guide/devices.txt of the kernel.
const (
	loopControlMajor = 10
	loopControlMinor = 237
)

// mountImage mounts the image read-only at target, by way of a loop device that
// ends with the mount. The devices' nodes are made in dir: a container's /dev
// lacks those that appeared after its start.
func mountImage(image *os.File, dir, target string) error {
	control, err := openNode(filepath.Join(dir, "loop-control"), unix.S_IFCHR, unix.Mkdev(loopControlMajor, loopControlMinor))
	if err != nil {
		return fmt.Errorf("loop devices: %w", err)
	}
	defer control.Close()
	const most = 100 // lost races
	for range most {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a free loop device: %w", err)
		}
		err = tryLoop(image, n, dir, target)
		if errors.Is(err, unix.EBUSY) {
			continue // somebody else took it
		}
		return err
	}
	return fmt.Errorf("find a free loop device: %w", unix.EBUSY)
}

func tryLoop(image *os.File, n int, dir, target string) error {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/dev", n))
	if err != nil {
		return fmt.Errorf("loop device: %w", err)
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(b)), ":")
	x, err1 := strconv.ParseUint(major, 10, 32)
	y, err2 := strconv.ParseUint(minor, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("loop device %d: %w", n, err)
	}
	node := filepath.Join(dir, "loop"+strconv.Itoa(n))
	dev, err := openNode(node, unix.S_IFBLK, unix.Mkdev(uint32(x), uint32(y)))
	if err != nil {
		return fmt.Errorf("loop device: %w", err)
	}
	defer dev.Close()
	c := unix.LoopConfig{Fd: uint32(image.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}
	copy(c.Info.File_name[:len(c.Info.File_name)-1], image.Name())
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &c); err != nil {
		return fmt.Errorf("set up loop device: %w", err)
	}
	if err := unix.Mount(node, target, "squashfs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("mount the image (does this kernel have squashfs with its compressor?): %w", err)
	}
	return nil
}

func openNode(path string, kind uint32, rdev uint64) (*os.File, error) {
	if err := unix.Mknod(path, kind|0o600, int(rdev)); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "make device", Path: path, Err: err}
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// overlay makes the mount. It has the restrictions of the volume's.
func overlay(lower, upper, work string) (*os.File, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("this kernel has no overlay file system: %w", err)
	}
	defer unix.Close(fd)
	for _, o := range append([][2]string{{"lowerdir", lower}, {"upperdir", upper}, {"workdir", work}}, overlayOptions...) {
		if o[1] == "" {
			err = unix.FsconfigSetFlag(fd, o[0])
		} else {
			err = unix.FsconfigSetString(fd, o[0], o[1])
		}
		if err != nil {
			return nil, fmt.Errorf("overlay option %s: %w%s", o[0], err, said(fd))
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("make the overlay: %w%s", err, said(fd))
	}
	var st unix.Statfs_t
	if err := unix.Statfs(".", &st); err != nil {
		return nil, err
	}
	// The flags of statfs(2) and of fsmount(2) are the same numbers.
	restrictions := int(st.Flags) & (unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, restrictions)
	if err != nil {
		return nil, fmt.Errorf("mount the overlay: %w%s", err, said(fd))
	}
	return os.NewFile(uintptr(m), "image root"), nil
}

// said is what the kernel says of an error of a file system context.
func said(fd int) string {
	buf := make([]byte, 1024)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return ""
	}
	return " (" + strings.TrimSpace(string(buf[:n])) + ")"
}
