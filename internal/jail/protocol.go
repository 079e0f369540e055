// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The gateway and the jail's init talk over one SOCK_SEQPACKET pair. A packet is one message, so there is no framing:
//
//	+------+---------+-------------------------------------------+   + up to 3 descriptors (SCM_RIGHTS)
//	| op 1 | id 4 BE | body: strings, lists, numbers (see codec) |
//	+------+---------+-------------------------------------------+
//
//	gateway                                       init
//	   |  setup (level, root, env) ----------------->|   the first packet, once
//	   |<------------------ ready (notes) or failed  |
//	   |                                             |
//	   |  spawn #n, stdin stdout stderr ------------>|
//	   |<----- started #n (pid) [+ terminal master]  |   or failed #n, and that is the end of #n
//	   |  signal #n (number) ----------------------->|   no answer
//	   |<--------------- exited #n (code, sig, core) |   exactly once, always after started #n
//	   |                                             |
//	   |  exists #m (path) ------------------------->|
//	   |<-------------------- exists #m or failed #m |
//	   |                                             |
//	   |  stop #k (grace) -------------------------->|   no spawn is accepted from here on; a second stop
//	   |<--------------------- stopped #k (killed)   |   with a shorter grace hurries the first
//	   |  close ------------------------------------>|   at any time: init kills everything and exits
//
// A pair of the same kind leads to the child that makes sockets (sockets.go): one request at a time, one answer each.
//
//	gateway                                       child
//	   |  listen (path or agent, mask) ------------->|
//	   |<-- socket (path, identity) + descriptor     |   or failed
//	   |  connect (path) --------------------------->|
//	   |<-- socket + descriptor                      |   or failed
//	   |  remove (path, identity) ------------------>|
//	   |<-- removed                                  |   or failed
//	   |  close ------------------------------------>|   the child exits
//
// The gateway chooses the ids. Nothing secret is ever sent. Either side treats a packet it cannot read as the end of
// the other: init exits (and everything in the jail with it), the gateway kills init.
type op uint8

const (
	opSetup op = iota + 1
	opReady
	opFailed
	opSpawn
	opStarted
	opExited
	opSignal
	opExists
	opStop
	opStopped
	opListen
	opConnect
	opRemove
	opSocket
	opRemoved
)

const (
	headerLen = 5
	maxFiles  = 3

	// maxPacket is below the default socket buffer (net.core.wmem_default, 212992), which a packet has to fit in. The
	// kernel takes no single argument above 128 KiB (MAX_ARG_STRLEN), so no command that could run is refused.
	maxPacket = 192 << 10

	// maxList bounds every list: entries of an environment, terminal modes, names.
	maxList = 4096
)

var errMalformed = errors.New("malformed packet")

// encoder appends fields. Strings are a uvarint length and the bytes, lists a uvarint count and the items.
type encoder struct{ b []byte }

func newMessage(o op, id uint32) *encoder {
	e := &encoder{b: make([]byte, 0, 256)}
	e.b = append(e.b, byte(o))
	e.b = binary.BigEndian.AppendUint32(e.b, id)
	return e
}

func (e *encoder) num(v uint64) { e.b = binary.AppendUvarint(e.b, v) }

func (e *encoder) str(s string) {
	e.num(uint64(len(s)))
	e.b = append(e.b, s...)
}

func (e *encoder) flag(v bool) {
	if v {
		e.num(1)
	} else {
		e.num(0)
	}
}

func (e *encoder) list(l []string) {
	e.num(uint64(len(l)))
	for _, s := range l {
		e.str(s)
	}
}

// decoder reads what encoder wrote. The first error sticks; every value read after it is zero.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) num() uint64 {
	if d.err != nil {
		return 0
	}
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.err = fmt.Errorf("%w: bad number", errMalformed)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) num32() uint32 {
	v := d.num()
	if v > math.MaxUint32 && d.err == nil {
		d.err = fmt.Errorf("%w: number %d above 32 bits", errMalformed, v)
		return 0
	}
	return uint32(v)
}

func (d *decoder) flag() bool {
	v := d.num()
	if v > 1 && d.err == nil {
		d.err = fmt.Errorf("%w: flag %d", errMalformed, v)
	}
	return v == 1
}

func (d *decoder) str() string {
	n := d.num()
	if d.err == nil && n > uint64(len(d.b)) {
		d.err = fmt.Errorf("%w: string of %d bytes, %d left", errMalformed, n, len(d.b))
	}
	if d.err != nil {
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

// count reads a list's length; each item takes at least one byte.
func (d *decoder) count() int {
	n := d.num()
	if d.err == nil && (n > maxList || n > uint64(len(d.b))) {
		d.err = fmt.Errorf("%w: list of %d items", errMalformed, n)
	}
	if d.err != nil {
		return 0
	}
	return int(n)
}

func (d *decoder) list() []string {
	var l []string
	for range d.count() {
		l = append(l, d.str())
	}
	return l
}

// end returns the sticky error, or one if bytes are left over.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) != 0 {
		d.err = fmt.Errorf("%w: %d bytes left over", errMalformed, len(d.b))
	}
	return d.err
}

// setupMsg is what init needs to build the confinement.
type setupMsg struct {
	level    Level
	root     string
	dev, ino uint64 // of root as the gateway sees it: both must look at the same directory
	legacy   bool   // plain level: mount what the job asked for with DKMS
	noNodes  bool   // chroot level: sessions may not make device nodes
	attach   bool   // the root is a mount that comes along
	env      []string
}

func (m *setupMsg) encode(e *encoder) {
	e.num(uint64(m.level))
	e.str(m.root)
	e.num(m.dev)
	e.num(m.ino)
	e.flag(m.legacy)
	e.flag(m.noNodes)
	e.flag(m.attach)
	e.list(m.env)
}

func (m *setupMsg) decode(b []byte) error {
	d := decoder{b: b}
	l := d.num32()
	if d.err == nil && (l < uint32(Plain) || l > uint32(Namespaces)) {
		return fmt.Errorf("%w: level %d", errMalformed, l)
	}
	*m = setupMsg{level: Level(l), root: d.str(), dev: d.num(), ino: d.num(), legacy: d.flag(), noNodes: d.flag(), attach: d.flag(), env: d.list()}
	return d.end()
}

// readyMsg is init's answer to setup.
type readyMsg struct {
	caps  uint64   // the bounding set of the sessions
	notes []string // what the confinement had to do without, for the log
}

func (m *readyMsg) encode(e *encoder) {
	e.num(m.caps)
	e.list(m.notes)
}

func (m *readyMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = readyMsg{caps: d.num(), notes: d.list()}
	return d.end()
}

// failedMsg refuses a request.
type failedMsg struct{ text string }

func (m *failedMsg) encode(e *encoder) { e.str(m.text) }

func (m *failedMsg) decode(b []byte) error {
	d := decoder{b: b}
	m.text = d.str()
	return d.end()
}

// The bits of spawnMsg.stdio: which of the three descriptors came along. The others become /dev/null.
const (
	hasStdin = 1 << iota
	hasStdout
	hasStderr
)

// spawnMsg is a Request on the wire.
type spawnMsg struct {
	kind    Kind
	command string
	env     []string
	setEnv  []string
	stdio   uint32
	tty     *TTY
}

func (m *spawnMsg) encode(e *encoder) {
	e.num(uint64(m.kind))
	e.str(m.command)
	e.list(m.env)
	e.list(m.setEnv)
	e.num(uint64(m.stdio))
	e.flag(m.tty != nil)
	if m.tty == nil {
		return
	}
	e.str(m.tty.Term)
	for _, v := range [...]uint32{m.tty.Cols, m.tty.Rows, m.tty.XPixel, m.tty.YPixel} {
		e.num(uint64(v))
	}
	e.num(uint64(len(m.tty.Modes)))
	for o, v := range m.tty.Modes {
		e.num(uint64(o))
		e.num(uint64(v))
	}
}

func (m *spawnMsg) decode(b []byte) error {
	d := decoder{b: b}
	k := d.num()
	if d.err == nil && (k < uint64(Shell) || k > uint64(kindSockets)) {
		return fmt.Errorf("%w: kind %d", errMalformed, k)
	}
	*m = spawnMsg{kind: Kind(k), command: d.str(), env: d.list(), setEnv: d.list(), stdio: d.num32()}
	if d.err == nil && m.stdio > hasStdin|hasStdout|hasStderr {
		return fmt.Errorf("%w: stdio %d", errMalformed, m.stdio)
	}
	if d.flag() {
		t := &TTY{Term: d.str(), Cols: d.num32(), Rows: d.num32(), XPixel: d.num32(), YPixel: d.num32()}
		n := d.count()
		t.Modes = make(map[uint8]uint32, n)
		for range n {
			o := d.num()
			if o > math.MaxUint8 && d.err == nil {
				d.err = fmt.Errorf("%w: terminal mode %d", errMalformed, o)
			}
			t.Modes[uint8(o)] = d.num32()
		}
		m.tty = t
	}
	return d.end()
}

// startedMsg answers spawn.
type startedMsg struct {
	pid      uint32 // as init sees it
	greeting Greeting
}

func (m *startedMsg) encode(e *encoder) {
	e.num(uint64(m.pid))
	e.str(m.greeting.Motd)
	e.flag(m.greeting.Hushed)
}

func (m *startedMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = startedMsg{pid: d.num32(), greeting: Greeting{Motd: d.str(), Hushed: d.flag()}}
	return d.end()
}

// exitedMsg reports the end of a command.
type exitedMsg struct {
	code, signal uint32
	core         bool
}

func (m *exitedMsg) encode(e *encoder) {
	e.num(uint64(m.code))
	e.num(uint64(m.signal))
	e.flag(m.core)
}

func (m *exitedMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = exitedMsg{code: d.num32(), signal: d.num32(), core: d.flag()}
	if d.err == nil && (m.code > 255 || m.signal > 127) {
		return fmt.Errorf("%w: exit code %d, signal %d", errMalformed, m.code, m.signal)
	}
	return d.end()
}

// numberMsg carries the one number of signal (its number), exists (0 or 1) and stop (grace in milliseconds).
type numberMsg struct{ n uint64 }

func (m *numberMsg) encode(e *encoder) { e.num(m.n) }

func (m *numberMsg) decode(b []byte) error {
	d := decoder{b: b}
	m.n = d.num()
	return d.end()
}

// stringMsg carries the path of an exists or connect request.
type stringMsg struct{ s string }

func (m *stringMsg) encode(e *encoder) { e.str(m.s) }

func (m *stringMsg) decode(b []byte) error {
	d := decoder{b: b}
	m.s = d.str()
	return d.end()
}

// stoppedMsg answers stop.
type stoppedMsg struct {
	killed []string // the processes that outlived the grace period
	left   []string // the processes that outlive even SIGKILL
}

func (m *stoppedMsg) encode(e *encoder) {
	e.list(m.killed)
	e.list(m.left)
}

func (m *stoppedMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = stoppedMsg{killed: d.list(), left: d.list()}
	return d.end()
}

// listenMsg asks for a listening socket.
type listenMsg struct {
	path   string // empty: a name for an agent, in a new directory of its own
	mask   uint32 // umask of bind(2)
	unlink bool   // remove what is at path before
}

func (m *listenMsg) encode(e *encoder) {
	e.str(m.path)
	e.num(uint64(m.mask))
	e.flag(m.unlink)
}

func (m *listenMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = listenMsg{path: d.str(), mask: d.num32(), unlink: d.flag()}
	if d.err == nil && m.mask > 0o777 {
		return fmt.Errorf("%w: umask %o", errMalformed, m.mask)
	}
	return d.end()
}

// socketMsg names a socket in the file system: the answer to listen and connect, and what remove removes.
type socketMsg struct {
	path     string
	dev, ino uint64 // of the socket, when it was made
	ownDir   bool   // its directory was made for it and goes with it
}

func (m *socketMsg) encode(e *encoder) {
	e.str(m.path)
	e.num(m.dev)
	e.num(m.ino)
	e.flag(m.ownDir)
}

func (m *socketMsg) decode(b []byte) error {
	d := decoder{b: b}
	*m = socketMsg{path: d.str(), dev: d.num(), ino: d.num(), ownDir: d.flag()}
	return d.end()
}
