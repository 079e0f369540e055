// SPDX-License-Identifier: Apache-2.0

// Package port keeps a TCP port for a program that will listen there and cannot be handed a listener: one that was only
// found free is somebody else's by the time the program is up, now and then.
package port

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Hold keeps an address; port 0 is any free one. Until the file is closed the kernel gives the port to nobody who does not
// ask for it by its number. Who does may listen, since both sockets have SO_REUSEADDR and this one does not listen
// (socket(7)); every server sets it.
func Hold(address string) (*os.File, *net.TCPAddr, error) {
	addr, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, nil, err
	}
	held, err := bindOnly(addr)
	if err != nil {
		return nil, nil, fmt.Errorf("listen at %s: %w", addr, err)
	}
	return held, addr, nil
}

// bindOnly binds a socket, and sets the port in addr.
func bindOnly(addr *net.TCPAddr) (_ *os.File, err error) {
	domain, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: addr.Port})
	if ip := addr.IP.To4(); ip != nil {
		domain, sa = unix.AF_INET, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(ip)}
	} else if addr.IP != nil {
		sa = &unix.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP)}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == unix.EAFNOSUPPORT && addr.IP == nil { // no IPv6 here
		addr.IP = net.IPv4zero
		return bindOnly(addr)
	}
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), addr.String())
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if sa, err = unix.Getsockname(fd); err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		addr.Port = sa.Port
	case *unix.SockaddrInet6:
		addr.Port = sa.Port
	}
	return f, nil
}
