// SPDX-License-Identifier: Apache-2.0

// Attacker is what a hostile root user would run in a session. It is started inside the jail as
//
//	attacker ATTACK CANARIES GATEWAY-PID
//
// and exits with 0 if the attack worked, printing how; with 1 if it did not. CANARIES are the absolute paths of files
// outside the jail, separated by colons: who can read one is out. Attacks that need no file count as worked when the
// kernel obeyed. None of them damages what it reaches, so that the same list can be tried where nothing holds it.
//
//	attacker list                      the attacks, each with what it does
//	attacker swap NAME NAME SECONDS    exchange two names all the time, for others to stumble over
//	attacker fork-chain LINKS FILE...  run away from whoever wants to end it, writing to the files
//	attacker write KIND FILE FILE      write and do not end; see writer
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

var (
	canaries []string
	gateway  int
)

var attacks = []struct {
	name, what string
	try        func() error
}{
	{"chroot", "chroot into a directory, walk up from outside it", chrootWalk},
	{"chroot-held", "the same with an open descriptor of the old root", chrootHeld},
	{"descriptors", "use an inherited descriptor", descriptors},
	{"proc-links", "/proc/*/root, cwd, fd and task of any process", procLinks},
	{"proc-files", "environment, memory and descriptors of others in /proc", procFiles},
	{"ptrace", "trace the gateway", ptrace},
	{"memory", "read and write the gateway's memory", memory},
	{"pidfd", "take a descriptor or the namespaces of the gateway by pidfd", pidfd},
	{"signal", "signal the gateway", signalOutside},
	{"limits", "change the gateway's resource limits", limits},
	{"overwrite-exe", "write to a program that runs outside", overwriteExe},
	{"mount", "mount, remount, unmount", mount},
	{"mount-api", "the same with fsopen, open_tree, mount_setattr", mountAPI},
	{"pivot", "pivot_root", pivot},
	{"setns", "join another namespace", setns},
	{"unshare", "make a namespace", unshare},
	{"userns", "make a user namespace and be root of it", userns},
	{"owned-userns", "join a user namespace that root made before", ownedNamespace},
	{"handle", "open a file by handle, past all directories", handle},
	{"mknod", "make and open the node of a disk, or of memory", mknod},
	{"device-nodes", "open a disk's node that is there", deviceNodes},
	{"module", "load a kernel module", module},
	{"kernel-files", "core_pattern, sysrq and their like", kernelFiles},
	{"kernel-calls", "reboot, kexec, swap, host name, clock", kernelCalls},
	{"capabilities", "hold or regain capabilities", capabilities},
	{"raw-socket", "sniff the pod's network", rawSocket},
	{"keyring", "the node's keyrings", keyring},
	{"x32", "keyrings by the x32 table of system calls", x32},
}

var errFailed = errors.New("did not work")

func main() {
	runtime.LockOSThread()
	if err := run(os.Args[1:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "list":
		for _, a := range attacks {
			fmt.Printf("%s\t%s\n", a.name, a.what)
		}
		return nil
	case len(args) == 1 && args[0] == usernsChild:
		return nil
	case len(args) >= 3 && args[0] == "fork-chain":
		return forkChain(args[1], args[2:])
	case len(args) == 4 && args[0] == "write":
		return writer(args[1], args[2], args[3])
	case len(args) == 4 && args[0] == "swap":
		return swap(args[1], args[2], args[3])
	case len(args) == 3:
		for _, a := range attacks {
			if a.name == args[0] {
				canaries = strings.Split(args[1], ":")
				gateway, _ = strconv.Atoi(args[2])
				return a.try()
			}
		}
	}
	return fmt.Errorf("unknown: %q", args)
}

// out reports whether a canary can be read below prefix.
func out(prefix string) bool {
	for _, canary := range canaries {
		if b, err := os.ReadFile(prefix + canary); err == nil {
			fmt.Printf("read %s%s: %s\n", prefix, canary, b)
			return true
		}
	}
	return false
}
