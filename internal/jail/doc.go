// SPDX-License-Identifier: Apache-2.0

// Package jail runs the sessions of one job where they belong: below the image root, and nowhere else.
//
// The users are root and stay root; the package decides what that is worth. One long-lived child, the jail's init, is
// started with the job (Start). It builds the confinement, starts every shell, command and SFTP server on request
// (Spawn), and ends with the job (Stop), together with everything that was ever started in it. Work in the background
// belongs to the jail, not to its session, and lives on until Stop. Unix sockets for the gateway are made and connected
// inside, too (Listen, ListenAgent, Dial): their paths are the jail's.
//
// # Levels
//
// Start takes the strongest level the container allows and logs which, or the one level it is told:
//
//	             Namespaces               Chroot                      Plain
//	needs        CAP_SYS_ADMIN, SETPCAP   CAP_SYS_CHROOT, SETPCAP     nothing
//	root         pivot_root, nodev        chroot                      the container's
//	processes    own PID namespace        the container's             the container's
//	init         PID 1 inside             outside, a subreaper        outside, a subreaper
//	/proc        own, kernel controls     the container's, the same   the container's
//	             read-only or hidden      read-only or hidden *
//	/sys         own, read-only           the container's, read-only *  the container's
//	/dev         null zero full random    the same but mqueue,        the container's
//	             urandom tty pts shm      read-only *
//	             mqueue, nothing else
//	system calls no user namespaces, no   the same                    the container's
//	             keyrings, no bpf, …
//
// What is marked * takes mounting, and the Chroot level is for containers that may not mount. It has a child in a user
// namespace mount it (lend.go). A container that refuses user namespaces (a system call filter, the node's settings)
// gets the bare chroot: /proc and /sys as the image holds them, which is empty, and in the image's /dev the missing
// devices, which Stop removes again. There programs cannot open terminals and the session's own has no name; /dev/tty
// works. Start says so in the log.
//
// Plain sessions see the image root as a directory to chroot into. With DKMS they find sysfs, proc and the container's
// devices mounted in it, in a mount namespace that only they see. In the Namespaces level DKMS changes nothing: what a
// module build reads is always there, what it could break never is. In the Chroot level it has no effect.
//
// # What root keeps
//
// Capabilities are cut to what installing packages takes (sessionCaps), by way of the bounding set, so that no program
// brings them back: no mounting, no modules, no raw sockets, no access past permissions by file handle, and in the Chroot
// level no chroot, because it leads out. Device nodes can be made, but not opened: all file systems are mounted nodev; in a
// bare chroot CAP_MKNOD is only kept where the container's device control group refuses the opening.
//
// # The proof
//
// Before the first session a child tries to break out of the finished jail, in all the ways of attempts.go. If one works,
// Start fails; it does not take a weaker level instead. An image that prevents a level (its /proc is a link) does not get
// a weaker one either: whoever made the image would choose.
//
// # What is refused, and what is not promised
//
//   - The root must be a directory, not a link to one. An image that brings the node of a disk is refused by the Chroot
//     level where the container would let root open it.
//   - Sessions cannot mount anything, not even a tmpfs or a bind of their own, and not even with DKMS: what mounting takes
//     (CAP_SYS_ADMIN) is as good as the node's root. A broker that mounts on request was decided against: it would have to
//     be reached by mount(8) in any image, by way of a system call filter, and all that it could allow safely, a tmpfs, is
//     what a directory of the image does as well.
//   - Nothing is inherited from the gateway: no environment, no descriptor, no signal disposition, no niceness.
//   - Paths inside the root are resolved inside it, by descriptor; of its files only regular ones are read, up to a size.
//   - The network is the pod's in every level; abstract sockets are shared.
//   - In the Chroot level root can signal any process of the container and change its priority, the gateway included: it
//     can end its job that way, but not have it packed (as PID 1 the gateway is immune to SIGKILL and SIGSTOP).
//     It cannot trace them: they hold CAP_SYS_CHROOT, it does not. A root process of the
//     container that has no more capabilities than a session would be at its mercy: the proof fails if there is one.
//   - In the Chroot level set-uid programs and file capabilities give a user other than root nothing: without
//     CAP_SYS_ADMIN system calls can only be filtered with no_new_privs. Root's own sudo, su and become work.
//   - In the Chroot level nothing keeps root from removing or renaming /proc, /sys and /dev: the kernel guards mount points
//     of the own mount namespace only. Sessions then have none any more; Stop makes the image's directory again.
//   - In the levels without a PID namespace processes could fork faster than they are found. Stop tries hard, and has
//     proof when it succeeds (init has no children left); otherwise it returns an error, and the root is not to be packed.
package jail
