// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"bytes"
	"errors"
	"io"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// messages has one of each body, filled.
func messages() []message {
	return []message{
		&setupMsg{level: Chroot, root: "/mnt/image/image-root", dev: 1 << 40, ino: 2, legacy: true, noNodes: true, attach: true, env: []string{"A=b", ""}},
		&readyMsg{caps: 1<<41 - 1, notes: []string{"n"}},
		&failedMsg{text: "no"},
		&spawnMsg{kind: Exec, command: "echo \xff\x00", env: []string{"X=1"}, setEnv: []string{"Y=2"}, stdio: 7},
		&spawnMsg{kind: Shell, tty: &TTY{Term: "xterm", Cols: 1, Rows: 2, XPixel: 3, YPixel: 1<<32 - 1, Modes: map[uint8]uint32{1: 3, 129: 38400}}},
		&startedMsg{pid: 1 << 22, greeting: Greeting{Motd: "Welcome.\n", Hushed: true}},
		&exitedMsg{code: 255, signal: 11, core: true},
		&numberMsg{n: 9},
		&stringMsg{s: "/tmp/complete"},
		&stoppedMsg{killed: []string{"bash[1]"}, left: []string{"x[2]"}},
		&listenMsg{path: "/tmp/a.sock", mask: 0o177, unlink: true},
		&socketMsg{path: "/tmp/ssh-ABCDEFGHIJ/agent.1", dev: 1 << 40, ino: 2, ownDir: true},
	}
}

func TestMessagesRoundTrip(t *testing.T) {
	for _, m := range messages() {
		e := &encoder{}
		m.encode(e)
		got := reflect.New(reflect.TypeOf(m).Elem()).Interface().(message)
		if err := got.decode(e.b); err != nil {
			t.Errorf("%T: %v", m, err)
		}
		if !reflect.DeepEqual(got, m) {
			t.Errorf("%T: %+v, want %+v", m, got, m)
		}
		for n := range e.b {
			if err := got.decode(e.b[:n]); !errors.Is(err, errMalformed) {
				t.Errorf("%T cut to %d bytes: %v", m, n, err)
			}
		}
		if err := got.decode(append(e.b, 0)); !errors.Is(err, errMalformed) {
			t.Errorf("%T with a byte too many: %v", m, err)
		}
	}
}

// FuzzMessages: no body makes a decoder panic, allocate without bound, or accept what it would encode differently.
func FuzzMessages(f *testing.F) {
	for i, m := range messages() {
		e := &encoder{}
		m.encode(e)
		f.Add(i, e.b)
	}
	f.Fuzz(func(t *testing.T, kind int, b []byte) {
		all := messages()
		m := reflect.New(reflect.TypeOf(all[uint(kind)%uint(len(all))]).Elem()).Interface().(message)
		if err := m.decode(b); err != nil {
			if !errors.Is(err, errMalformed) {
				t.Fatalf("%T: %v", m, err)
			}
			return
		}
		e := &encoder{}
		m.encode(e)
		again := reflect.New(reflect.TypeOf(m).Elem()).Interface().(message)
		if err := again.decode(e.b); err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%T: %+v became %+v, %v", m, m, again, err)
		}
	})
}

// connPair returns two connected ends.
func connPair(t *testing.T) (*conn, *conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*conn
	for i, fd := range fds {
		if ends[i], err = newConn(os.NewFile(uintptr(fd), "end")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ends[i].close)
	}
	return ends[0], ends[1]
}

func TestConn(t *testing.T) {
	a, b := connPair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.send(opExists, 7, &stringMsg{s: "x"}, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	p, err := b.recv()
	if err != nil || p.op != opExists || p.id != 7 || len(p.files) != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	p.files[0].WriteString("through")
	p.closeFiles()
	if got, err := io.ReadAll(r); err != nil || string(got) != "through" {
		t.Errorf("%q, %v", got, err)
	}
	r.Close()

	// The longest packet fits, one byte more is refused before it is sent.
	head := len(newMessage(opExists, 0).b) + 3
	if err := a.send(opExists, 1, &stringMsg{s: string(make([]byte, maxPacket-head))}); err != nil {
		t.Fatal(err)
	}
	if p, err := b.recv(); err != nil || len(p.body) != maxPacket-headerLen {
		t.Errorf("%d bytes, %v", len(p.body), err)
	}
	if err := a.send(opExists, 1, &stringMsg{s: string(make([]byte, maxPacket-head+1))}); !errors.Is(err, unix.E2BIG) {
		t.Errorf("too long: %v", err)
	}
}

// TestConnHostile: packets that the other side's send would not make.
func TestConnHostile(t *testing.T) {
	dir, err := os.Open(".")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	four := unix.UnixRights(int(dir.Fd()), int(dir.Fd()), int(dir.Fd()), int(dir.Fd()))
	many := make([]int, 200)
	for i := range many {
		many[i] = int(dir.Fd())
	}
	for name, c := range map[string]struct{ data, oob []byte }{
		"short":           {[]byte{1, 2}, nil},
		"too long":        {bytes.Repeat([]byte{1}, maxPacket+1), nil},
		"descriptors":     {make([]byte, 16), four},
		"200 descriptors": {make([]byte, 16), unix.UnixRights(many...)},
	} {
		a, b := connPair(t)
		before := countEntries(t, "/proc/self/fd")
		if _, _, err := a.c.WriteMsgUnix(c.data, c.oob, nil); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if p, err := b.recv(); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
		if after := countEntries(t, "/proc/self/fd"); after > before {
			t.Errorf("%s: %d descriptors leaked", name, after-before)
		}
		a.close()
		if _, err := b.recv(); err != io.EOF {
			t.Errorf("%s: after close: %v", name, err)
		}
	}
}

// A panic in one request is that request's failure; init, and every other session with it, lives on.
func TestPanicInRequest(t *testing.T) {
	gateway, end := connPair(t)
	s := &supervisor{conn: end, onMain: make(chan func())}
	go func() { (<-s.onMain)() }()
	for id, cause := range []func(){
		func() { s.spawn(0, nil, nil) },
		func() { s.start(1, func() (int, error) { panic("a fault") }, Greeting{}, nil, nil, nil) },
	} {
		cause()
		p, err := gateway.recv()
		if err != nil || p.op != opFailed || p.id != uint32(id) || !bytes.Contains(p.body, []byte("internal error")) {
			t.Errorf("request %d: %+v, %v", id, p, err)
		}
	}
	if !s.mu.TryLock() {
		t.Error("the lock is held")
	}
}

// A send to an end that takes nothing ends, for all who wait to send, and in the meantime the end is woken.
func TestStuck(t *testing.T) {
	a, b := connPair(t)
	woken := 0
	a.limit, a.stuck = 3*stuckEvery, func() { woken++ }
	long := &stringMsg{s: string(make([]byte, maxPacket/2))}
	var wg sync.WaitGroup
	var stuck atomic.Int32
	for range 20 { // more than the kernel holds
		wg.Go(func() {
			if err := a.send(opExists, 1, long); errors.Is(err, errStuck) {
				stuck.Add(1)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if stuck.Load() == 0 || woken < 2 {
		t.Errorf("%d sends were stuck, and %d times the other end was woken", stuck.Load(), woken)
	}
	for range 20 - stuck.Load() { // what was sent is whole
		if p, err := b.recv(); err != nil || len(p.body) < maxPacket/2 {
			t.Fatalf("%d bytes, %v", len(p.body), err)
		}
	}
	if err := a.send(opExists, 1, long); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}
