// SPDX-License-Identifier: Apache-2.0

package progress

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func lines(b *bytes.Buffer) int { return strings.Count(b.String(), "\n") }

func TestALinePerTenth(t *testing.T) {
	var out bytes.Buffer
	p := New(&out, "unpack", 0)
	now := p.start
	p.now = func() time.Time { return now }
	for done := int64(0); done <= 10_000; done++ {
		now = now.Add(lineApart / 1000)
		p.Update(done, 10_000)
	}
	if n := lines(&out); n != 10 {
		t.Errorf("%d lines, want one per tenth:\n%s", n, &out)
	}
	if !strings.Contains(out.String(), "msg=unpack bytes=1000 of=10000 percent=10") {
		t.Errorf("first line:\n%s", &out)
	}
	p.Finish()
	p.Finish()
	p.Update(1, 2)
	if n := lines(&out); n != 11 {
		t.Errorf("%d lines after Finish:\n%s", n, &out)
	}
}

// TestFastWork: what is over in a moment gets its last line only.
func TestFastWork(t *testing.T) {
	var out bytes.Buffer
	p := New(&out, "unpack", 0)
	frozen := p.start
	p.now = func() time.Time { return frozen }
	for done := int64(0); done <= 100; done++ {
		p.Update(done, 100)
	}
	p.Finish()
	if n := lines(&out); n != 1 || !strings.Contains(out.String(), "unpack done") {
		t.Errorf("%d lines, want the last one only:\n%s", n, &out)
	}
}

// TestSlowWork: without a known total, or within one tenth, time makes lines.
func TestSlowWork(t *testing.T) {
	for _, total := range []int64{0, 1 << 60} {
		var out bytes.Buffer
		p := New(&out, "fetch", total)
		now := p.start
		p.now = func() time.Time { return now }
		for i := range int64(90) {
			now = now.Add(time.Second)
			p.Update(i, 0)
		}
		if n := lines(&out); n != 3 {
			t.Errorf("total %d: %d lines in 90 s, want 3:\n%s", total, n, &out)
		}
	}
}

func TestFreshStart(t *testing.T) {
	var out bytes.Buffer
	p := New(&out, "fetch", 100)
	now := p.start
	p.now = func() time.Time { now = now.Add(lineApart); return now }
	p.Update(90, 0)
	p.Update(0, 0)
	p.Update(50, 0)
	if n := lines(&out); n != 2 {
		t.Errorf("%d lines, want one before and one after the start over:\n%s", n, &out)
	}
}

func TestManyGoroutines(t *testing.T) {
	var out bytes.Buffer
	p := New(&out, "pack", 1000)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range int64(250) {
				p.Update(int64(g)*250+i, 1000)
			}
		})
	}
	wg.Wait()
	p.Finish()
	if !strings.Contains(out.String(), "pack done") {
		t.Errorf("%s", &out)
	}
}

// TestTerminal draws into a pseudo terminal and wants a bar, not log lines.
func TestTerminal(t *testing.T) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs a pseudo terminal: ", err)
	}
	defer ptmx.Close()
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Skip("needs a pseudo terminal: ", err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Skip("needs a pseudo terminal: ", err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs a pseudo terminal: ", err)
	}
	got := make(chan string)
	go func() {
		buf := make([]byte, 64<<10)
		n, _ := ptmx.Read(buf)
		got <- string(buf[:n])
	}()
	p := New(tty, "unpack", 100)
	p.Update(100, 100)
	p.Finish()
	tty.Close() // ends the read above, should nothing have been drawn
	if text := <-got; strings.Contains(text, "level=") || !strings.Contains(text, "unpack") {
		t.Errorf("on a terminal: %q", text)
	}
}
