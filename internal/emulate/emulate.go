// SPDX-License-Identifier: Apache-2.0

// Package emulate has the node run programs of aarch64 images on x86_64, as the legacy container did: it registers
// qemu-aarch64-static with the kernel's binfmt_misc. The registration is the node's, not the container's: every container
// of the node can run such programs while it lasts, and handlers that others registered are used and never changed.
//
// Whether there is a handler is not read but tried, with a program of three instructions: a container that may not mount
// binfmt_misc sees no list, and a handler without flag F is of no use in a chroot, whatever the list says.
//
// It is refused to register other architectures or flags. In particular set-uid programs are run without their owner's
// rights (no flag C): what the kernel grants by it, it grants to all of the node.
package emulate

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Interpreter is where the sshd container has QEMU (Debian package qemu-user-static).
const Interpreter = "/usr/bin/qemu-aarch64-static"

// rule is Documentation/admin-guide/binfmt-misc.rst: the ELF header of a 64-bit little-endian program for EM_AARCH64 (183)
// of any OS ABI, executable or shared. F opens the interpreter now, so that it is found from within any root.
const (
	name = "qemu-aarch64"
	rule = ":" + name + `:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00` +
		`:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:%s:F`
)

// ARM64 makes sure that aarch64 programs run, with interpreter registered if nobody else has done so. Since Linux 6.7
// registrations end with the last mount of binfmt_misc: hold, nil where this process may not mount, is one, to be kept
// open as long as the programs are to run.
func ARM64(interpreter string, log *slog.Logger) (hold *os.File, err error) {
	if runtime.GOARCH == "arm64" {
		return nil, nil
	}
	fs, mountErr := mount()
	defer func() {
		if err != nil && fs != nil {
			fs.Close()
		}
	}()
	probeErr := probe()
	if probeErr == nil {
		return fs, nil
	}
	const next = "have the node's administrator install qemu-user-static with binfmt support"
	if mountErr != nil {
		return nil, fmt.Errorf("this node cannot run aarch64 programs (%w), and the container cannot change that (%w): "+
			"%s, or create the job with require_dkms", probeErr, mountErr, next)
	}
	if _, err := os.Stat(interpreter); err != nil {
		return nil, fmt.Errorf("this node cannot run aarch64 programs (%w), and the container has no QEMU (%w): %s", probeErr, err, next)
	}
	// Another container may have been faster.
	if err := register(fs, interpreter); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("register %s with binfmt_misc: %w: %s", interpreter, err, next)
	}
	if err := probe(); err != nil {
		return nil, fmt.Errorf("this node cannot run aarch64 programs (%w) although %s is registered with binfmt_misc: "+
			"is it disabled, or without flag F? %s", err, name, next)
	}
	log.Info("aarch64 programs are run by QEMU, on all of the node", "interpreter", interpreter)
	return fs, nil
}

// mount makes a mount of binfmt_misc that is attached nowhere. All mounts show the same list.
func mount() (*os.File, error) {
	fd, err := unix.Fsopen("binfmt_misc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount binfmt_misc: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("mount binfmt_misc: %w", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount binfmt_misc: %w", err)
	}
	return os.NewFile(uintptr(m), "binfmt_misc"), nil
}

func register(fs *os.File, interpreter string) error {
	fd, err := unix.Openat(int(fs.Fd()), "register", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, fmt.Appendf(nil, rule, interpreter))
	return err
}

// probe runs an aarch64 program in a root where there is nothing else.
func probe() error {
	dir, err := os.MkdirTemp("", "aarch64-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "true"), program(), 0o755); err != nil {
		return err
	}
	cmd := &exec.Cmd{Path: "/true", Args: []string{"/true"}, Dir: "/", Env: []string{}, SysProcAttr: &syscall.SysProcAttr{Chroot: dir}}
	return cmd.Run()
}

// program is /bin/true for aarch64.
func program() []byte {
	const base, headers = 0x400000, 64 + 56
	code := []uint32{0xd2800000, 0xd2800ba8, 0xd4000001} // mov x0, #0; mov x8, #93 (exit); svc #0
	size := uint64(headers + 4*len(code))
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_AARCH64), Version: uint32(elf.EV_CURRENT),
			Entry: base + headers, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x10000},
		code,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			panic(err) // fixed sizes into memory
		}
	}
	return b.Bytes()
}
