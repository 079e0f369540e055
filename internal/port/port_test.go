// SPDX-License-Identifier: Apache-2.0

package port

import (
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// TestHold: of two ports that there are, the one that is held goes only to whoever asks for it by its number.
func TestHold(t *testing.T) {
	testkit.NeedRoot(t)
	for _, address := range []string{":0", "0.0.0.0:0", "[::]:0"} {
		t.Run(address, func(t *testing.T) {
			runtime.LockOSThread() // and never unlocked: the thread ends with the test, and its network with it
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40001"), 0); err != nil {
				t.Fatal(err)
			}
			held, addr, err := Hold(address)
			if err != nil {
				t.Fatal(err)
			}
			other, err := net.Listen("tcp", address)
			if err != nil || other.Addr().(*net.TCPAddr).Port == addr.Port {
				t.Fatalf("%s is held, and given away: %v, %v", addr, other, err)
			}
			defer other.Close()
			if third, err := net.Listen("tcp", address); err == nil {
				t.Errorf("%s is held, and given away as %s", addr, third.Addr())
				third.Close()
			}
			l, err := net.Listen("tcp", addr.String())
			if err != nil {
				t.Fatalf("whom it is held for: %v", err)
			}
			defer l.Close()
			if err := held.Close(); err != nil {
				t.Error(err)
			}
			if _, _, err := Hold(addr.String()); err == nil {
				t.Errorf("%s has a listener, and is held", addr)
			}
		})
	}
}
