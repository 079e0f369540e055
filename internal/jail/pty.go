// SPDX-License-Identifier: Apache-2.0

package jail

import (
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// devPTS is where sessions find their terminals.
const devPTS = "/dev/pts"

// openPTY opens a terminal pair on the devpts instance at dir, sized and with the modes of t, and owned by root and the
// group tty. name is the slave's path in the session; nobody else has both ends open.
func openPTY(dir string, t *TTY, gid int) (master, slave *os.File, name string, err error) {
	mfd, err := unix.Open(dir+"/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, "", fmt.Errorf("open %s/ptmx: %w", dir, err)
	}
	master = os.NewFile(uintptr(mfd), dir+"/ptmx")
	defer func() {
		if err != nil {
			master.Close()
			if slave != nil {
				slave.Close()
			}
		}
	}()
	if err := unix.IoctlSetPointerInt(mfd, unix.TIOCSPTLCK, 0); err != nil {
		return master, nil, "", fmt.Errorf("unlock terminal: %w", err)
	}
	n, err := unix.IoctlGetUint32(mfd, unix.TIOCGPTN)
	if err != nil {
		return master, nil, "", fmt.Errorf("number of terminal: %w", err)
	}
	number := strconv.FormatUint(uint64(n), 10)
	name = devPTS + "/" + number
	sfd, err := unix.Open(dir+"/"+number, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return master, nil, "", fmt.Errorf("open %s: %w", name, err)
	}
	slave = os.NewFile(uintptr(sfd), name)
	mode := uint32(0o600)
	if gid >= 0 {
		mode = 0o620
	}
	if err := unix.Fchown(sfd, 0, gid); err != nil {
		return master, slave, "", fmt.Errorf("own %s: %w", name, err)
	}
	if err := unix.Fchmod(sfd, mode); err != nil {
		return master, slave, "", fmt.Errorf("set mode of %s: %w", name, err)
	}
	if err := setWindow(mfd, t.Cols, t.Rows, t.XPixel, t.YPixel); err != nil {
		return master, slave, "", err
	}
	if err := setModes(sfd, t.Modes); err != nil {
		return master, slave, "", err
	}
	return master, slave, name, nil
}

// setWindow sets the terminal's size; SSH counts in 32 bits, the kernel in 16.
func setWindow(fd int, cols, rows, xpixel, ypixel uint32) error {
	clamp := func(v uint32) uint16 { return uint16(min(v, math.MaxUint16)) }
	w := unix.Winsize{Row: clamp(rows), Col: clamp(cols), Xpixel: clamp(xpixel), Ypixel: clamp(ypixel)}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &w); err != nil {
		return fmt.Errorf("set window size: %w", err)
	}
	return nil
}

// The opcodes of RFC 4254, section 8 (and IUTF8 of RFC 8160) that Linux knows.
var (
	modeChars = map[uint8]int{
		1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2,
		8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT,
		16: unix.VSWTC, 18: unix.VDISCARD,
	}
	modeInput = map[uint8]uint32{
		30: unix.IGNPAR, 31: unix.PARMRK, 32: unix.INPCK, 33: unix.ISTRIP, 34: unix.INLCR, 35: unix.IGNCR, 36: unix.ICRNL,
		37: unix.IUCLC, 38: unix.IXON, 39: unix.IXANY, 40: unix.IXOFF, 41: unix.IMAXBEL, 42: unix.IUTF8,
	}
	modeLocal = map[uint8]uint32{
		50: unix.ISIG, 51: unix.ICANON, 52: unix.XCASE, 53: unix.ECHO, 54: unix.ECHOE, 55: unix.ECHOK, 56: unix.ECHONL,
		57: unix.NOFLSH, 58: unix.TOSTOP, 59: unix.IEXTEN, 60: unix.ECHOCTL, 61: unix.ECHOKE, 62: unix.PENDIN,
	}
	modeOutput = map[uint8]uint32{
		70: unix.OPOST, 71: unix.OLCUC, 72: unix.ONLCR, 73: unix.OCRNL, 74: unix.ONOCR, 75: unix.ONLRET,
	}
	modeControl = map[uint8]uint32{92: unix.PARENB, 93: unix.PARODD}
)

const (
	modeCS7    = 90
	modeCS8    = 91
	modeISpeed = 128
	modeOSpeed = 129

	// modeNoChar is how SSH says that a character is switched off; Linux's _POSIX_VDISABLE is 0.
	modeNoChar = 255

	// cibaudShift moves an output speed code to the input speed's place (CIBAUD, asm-generic/termbits.h).
	cibaudShift = 16
)

var speedCodes = map[uint32]uint32{
	0: unix.B0, 50: unix.B50, 75: unix.B75, 110: unix.B110, 134: unix.B134, 150: unix.B150, 200: unix.B200,
	300: unix.B300, 600: unix.B600, 1200: unix.B1200, 1800: unix.B1800, 2400: unix.B2400, 4800: unix.B4800,
	9600: unix.B9600, 19200: unix.B19200, 38400: unix.B38400, 57600: unix.B57600, 115200: unix.B115200,
	230400: unix.B230400, 460800: unix.B460800, 500000: unix.B500000, 576000: unix.B576000, 921600: unix.B921600,
	1000000: unix.B1000000, 1152000: unix.B1152000, 1500000: unix.B1500000, 2000000: unix.B2000000,
	2500000: unix.B2500000, 3000000: unix.B3000000, 3500000: unix.B3500000, 4000000: unix.B4000000,
}

// setModes applies the encoded terminal modes; what Linux does not know is ignored, as the RFC asks.
func setModes(fd int, modes map[uint8]uint32) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS2)
	if err != nil {
		return fmt.Errorf("read terminal modes: %w", err)
	}
	for _, o := range slices.Sorted(maps.Keys(modes)) {
		applyMode(t, o, modes[o])
	}
	if err := unix.IoctlSetTermios(fd, unix.TCSETS2, t); err != nil {
		return fmt.Errorf("set terminal modes: %w", err)
	}
	return nil
}

func applyMode(t *unix.Termios, o uint8, v uint32) {
	if i, ok := modeChars[o]; ok {
		if v == modeNoChar {
			v = 0
		}
		t.Cc[i] = uint8(v)
		return
	}
	for _, group := range []struct {
		bits  map[uint8]uint32
		field *uint32
	}{{modeInput, &t.Iflag}, {modeLocal, &t.Lflag}, {modeOutput, &t.Oflag}, {modeControl, &t.Cflag}} {
		if bit, ok := group.bits[o]; ok {
			*group.field &^= bit
			if v != 0 {
				*group.field |= bit
			}
			return
		}
	}
	switch o {
	case modeCS7, modeCS8:
		if v != 0 {
			t.Cflag = t.Cflag&^unix.CSIZE | map[uint8]uint32{modeCS7: unix.CS7, modeCS8: unix.CS8}[o]
		}
	case modeISpeed:
		t.Cflag = t.Cflag&^(unix.CBAUD<<cibaudShift) | speedCode(v)<<cibaudShift
		t.Ispeed = v
	case modeOSpeed:
		t.Cflag = t.Cflag&^unix.CBAUD | speedCode(v)
		t.Ospeed = v
	}
}

// speedCode is the code of a speed; BOTHER says that the number itself counts.
func speedCode(v uint32) uint32 {
	if c, ok := speedCodes[v]; ok {
		return c
	}
	return unix.BOTHER
}
