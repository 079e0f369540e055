// SPDX-License-Identifier: Apache-2.0

package changes

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ims-buildenv/ims-buildenv/internal/testkit"
)

// browser is a headless Chromium in namespaces of its own: it has no network, and
// no process of it outlives the test. It is driven over two pipes with the DevTools
// protocol, https://chromedevtools.github.io/devtools-protocol/.
type browser struct {
	t  *testing.T
	to *os.File

	mu      sync.Mutex
	next    int
	answers map[int]chan message
	events  []message
	woken   chan struct{} // closed and replaced with each event
}

type message struct {
	ID      int             `json:"id,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   json.RawMessage `json:"error,omitempty"`
	Session string          `json:"sessionId,omitempty"`
}

// patience is for a browser that hangs; nothing waits for it to pass.
const patience = 2 * time.Minute

func startBrowser(t *testing.T) *browser {
	t.Helper()
	testkit.NeedRoot(t)
	testkit.NeedTool(t, "chromium")
	commandsOut, commandsIn, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answersOut, answersIn, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
		"--disable-sync", "--disable-extensions", "--no-first-run", "--disable-breakpad", "--window-size=1200,1000",
		"--user-data-dir="+home, "--remote-debugging-pipe", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+home, "DBUS_SESSION_BUS_ADDRESS=disabled:")
	cmd.ExtraFiles = []*os.File{commandsOut, answersIn}
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	commandsOut.Close()
	answersIn.Close()
	b := &browser{t: t, to: commandsIn, answers: map[int]chan message{}, woken: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.read(answersOut)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill() // it is PID 1 of its namespace: all its children go with it
		cmd.Wait()
		commandsIn.Close()
		<-done
		answersOut.Close()
		if t.Failed() {
			t.Logf("chromium said: %s", said.String())
		}
	})
	return b
}

func (b *browser) read(from *os.File) {
	in := bufio.NewReader(from)
	for {
		line, err := in.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if json.Unmarshal(line[:len(line)-1], &m) != nil {
			continue
		}
		b.mu.Lock()
		if c := b.answers[m.ID]; m.ID != 0 && c != nil {
			delete(b.answers, m.ID)
			c <- m
		} else {
			b.events = append(b.events, m)
			close(b.woken)
			b.woken = make(chan struct{})
		}
		b.mu.Unlock()
	}
}

// call sends a command and decodes its result.
func (b *browser) call(session, method string, params map[string]any, result any) {
	b.t.Helper()
	p, err := json.Marshal(params)
	if err != nil {
		b.t.Fatal(err)
	}
	answer := make(chan message, 1)
	b.mu.Lock()
	b.next++
	m := message{ID: b.next, Method: method, Params: p, Session: session}
	b.answers[m.ID] = answer
	b.mu.Unlock()
	line, err := json.Marshal(m)
	if err == nil {
		_, err = b.to.Write(append(line, 0))
	}
	if err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
	select {
	case m = <-answer:
	case <-time.After(patience):
		b.t.Fatalf("%s: no answer", method)
	}
	if m.Error != nil {
		b.t.Fatalf("%s: %s", method, m.Error)
	}
	if result != nil {
		if err := json.Unmarshal(m.Result, result); err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
	}
}

// tab is a page in the browser.
type tab struct {
	*browser
	session string
	url     string
}

// open shows a report. With scripts off, the page's own do not run.
func (b *browser) open(r *Report, scripts bool) *tab {
	b.t.Helper()
	file := filepath.Join(b.t.TempDir(), "page.html")
	f, err := os.Create(file)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := r.WriteHTML(f); err != nil {
		b.t.Fatal(err)
	}
	f.Close()
	var target struct{ TargetID string }
	b.call("", "Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var session struct{ SessionID string }
	b.call("", "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &session)
	p := &tab{b, session.SessionID, "file://" + file}
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(p.session, domain+".enable", nil, nil)
	}
	if !scripts {
		b.call(p.session, "Emulation.setScriptExecutionDisabled", map[string]any{"value": true}, nil)
	}
	b.call(p.session, "Page.navigate", map[string]any{"url": p.url}, nil)
	p.wait("Page.loadEventFired")
	return p
}

func (p *tab) wait(method string) {
	p.t.Helper()
	deadline := time.After(patience)
	for {
		p.mu.Lock()
		woken := p.woken
		found := false
		for _, e := range p.events {
			found = found || e.Session == p.session && e.Method == method
		}
		p.mu.Unlock()
		if found {
			return
		}
		select {
		case <-woken:
		case <-deadline:
			p.t.Fatalf("no event %s", method)
		}
	}
}

// eval returns the value of an expression as JSON decodes it.
func (p *tab) eval(expression string) any {
	p.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails json.RawMessage
	}
	p.call(p.session, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &r)
	if r.ExceptionDetails != nil {
		p.t.Fatalf("%s: %s", expression, r.ExceptionDetails)
	}
	return r.Result.Value
}

func (p *tab) want(expression string, want any) {
	p.t.Helper()
	if got := p.eval(expression); fmt.Sprint(got) != fmt.Sprint(want) {
		p.t.Errorf("%s: got %v, want %v", expression, got, want)
	}
}

// key presses a key in the focused element.
func (p *tab) key(name string) {
	p.t.Helper()
	codes := map[string]int{"Enter": 13, "Escape": 27, "ArrowRight": 39, "End": 35}
	params := map[string]any{"type": "keyDown", "key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
	if name == "Enter" {
		params["text"] = "\r"
	}
	p.call(p.session, "Input.dispatchKeyEvent", params, nil)
	params["type"] = "keyUp"
	p.call(p.session, "Input.dispatchKeyEvent", params, nil)
}

// quiet fails the test if the page complained, asked for anything but itself, or
// opened a dialog.
func (p *tab) quiet() {
	p.t.Helper()
	p.eval("new Promise(done => requestAnimationFrame(() => setTimeout(done)))") // what was started has been reported
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.events {
		if e.Session != p.session {
			continue
		}
		switch e.Method {
		case "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening", "Page.windowOpen":
			p.t.Errorf("%s: %s", e.Method, e.Params)
		case "Network.requestWillBeSent":
			var r struct{ Request struct{ URL string } }
			if err := json.Unmarshal(e.Params, &r); err != nil || r.Request.URL != p.url && !strings.HasPrefix(r.Request.URL, "data:,") {
				p.t.Errorf("the page asked for %s", r.Request.URL)
			}
		}
	}
}
