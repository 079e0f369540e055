// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// kexInit is a client's first key exchange packet with the given ciphers.
func kexInit(ciphers string) []byte {
	body := append([]byte{0, msgKexInit}, make([]byte, 16)...)
	for _, l := range []string{"curve25519-sha256", "ssh-ed25519", ciphers, ciphers, "hmac-sha2-256", "hmac-sha2-256", "none", "none", "", ""} {
		body = binary.BigEndian.AppendUint32(body, uint32(len(l)))
		body = append(body, l...)
	}
	body = append(body, make([]byte, 5)...)
	pad := 8 - (len(body)+4)%8
	if pad < 4 {
		pad += 8
	}
	body[0] = byte(pad)
	body = append(body, make([]byte, pad)...)
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func TestGreet(t *testing.T) {
	const openssh = "SSH-2.0-OpenSSH_9.9 test\r\n"
	for _, tt := range []struct {
		name, send string
		gcm        bool
	}{
		{"OpenSSH", openssh + string(kexInit("chacha20-poly1305@openssh.com,aes128-ctr,aes256-gcm@openssh.com")), true},
		{"OpenSSH without GCM", openssh + string(kexInit("aes128-ctr")), false},
		{"another client", "SSH-2.0-paramiko_3.4\r\n" + string(kexInit("aes256-gcm@openssh.com")), false},
		{"a packet that is too long", openssh + "\xff\xff\xff\xff\x00\x14" + strings.Repeat("x", 100), false},
		{"a packet that is too short", openssh + "\x00\x00\x00\x03\x00\x14" + strings.Repeat("x", 100), false},
		{"another message", openssh + strings.Replace(string(kexInit("aes256-gcm@openssh.com")), "\x14", "\x15", 1), false},
		{"lists that end early", openssh + "\x00\x00\x00\x20\x00\x14" + strings.Repeat("\xff", 40), false},
		{"no line", strings.Repeat("x", 1000), false},
		{"nothing", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, replayed := greeted(t, []byte(tt.send))
			want := []string{"all"}
			if tt.gcm {
				want = gcmCiphers
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("offered %q, want %q", got, want)
			}
			if string(replayed) != tt.send {
				t.Errorf("the library reads %q", replayed)
			}
		})
	}
}

// greeted sends a client's bytes to a connection and returns what it offers, and what the
// SSH library then reads.
func greeted(t testing.TB, send []byte) (ciphers []string, replayed []byte) {
	t.Helper()
	s, err := newServer(quietSettings(), nil, nil, "test", quietServer().log)
	if err != nil {
		t.Fatal(err)
	}
	s.algs.ciphers = []string{"all"}
	client, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		line, err := bufio.NewReader(client).ReadString('\n')
		if err != nil || line != "SSH-2.0-OpenSSH_compatible ims-buildenv_test\r\n" {
			t.Errorf("version line %q, %v", line, err)
		}
		client.Write(send)
		client.Close()
	}()
	c := newConn(s, theirs)
	c.ciphers = c.greet()
	if n, err := c.Write([]byte("SSH-2.0-OpenSSH_compatible ims-buildenv_test\r\n")); n == 0 || err != nil {
		t.Errorf("the library's version line: %d, %v", n, err)
	}
	replayed, _ = io.ReadAll(c)
	c.end("")
	<-done
	return c.ciphers, replayed
}

// REGRESSION: a client counted as one that had said nothing until its first packet was complete, and beyond MaxStartups
// it was pushed out by those who really had not.
func TestGreetCounts(t *testing.T) {
	s, err := newServer(quietSettings(), nil, nil, "test", quietServer().log)
	if err != nil {
		t.Fatal(err)
	}
	client, theirs := net.Pipe()
	defer client.Close()
	c := newConn(s, theirs)
	greeted := make(chan struct{})
	go func() {
		defer close(greeted)
		c.greet()
	}()
	if _, err := bufio.NewReader(client).ReadString('\n'); err != nil || c.progress() != 0 {
		t.Errorf("progress %d, %v", c.progress(), err)
	}
	io.WriteString(client, "SSH-2.0-")
	eventually(t, "the client's first words count", func() bool { return c.progress() == 1 })
	client.Close()
	<-greeted
}

// A client that calls itself OpenSSH and waits for the server to speak first must not be
// kept waiting.
func TestGreetWaitsNotForEver(t *testing.T) {
	j := start(t, options{})
	nc, err := net.Dial("tcp", j.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	io.WriteString(nc, "SSH-2.0-OpenSSH_9.9\r\n")
	r := bufio.NewReader(nc)
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	packet := make([]byte, 6)
	if _, err := io.ReadFull(r, packet); err != nil || packet[5] != msgKexInit {
		t.Errorf("%x, %v; want the server's first packet", packet, err)
	}
	if rest, _ := r.Peek(200); !bytes.Contains(rest, []byte("curve25519")) {
		t.Errorf("%q", rest)
	}
}

func TestCipherForOpenSSH(t *testing.T) {
	j := start(t, options{})
	cipher := func(args ...string) string {
		t.Helper()
		out, errs, code := run(t, j.tool("ssh", append(args, "-v", host, "echo ok")...))
		if out != "ok\n" || code != 0 {
			t.Fatalf("%q: %q, %d: %s", args, out, code, errs)
		}
		_, after, _ := strings.Cut(errs, "client->server cipher: ")
		name, _, _ := strings.Cut(after, " ")
		return name
	}
	if got := cipher(); fastAES() && got != ssh.CipherAES128GCM && got != ssh.CipherAES256GCM {
		t.Errorf("default: %s", got)
	}
	for _, c := range []string{ssh.CipherAES256CTR, ssh.CipherChaCha20Poly1305, ssh.CipherAES256GCM} {
		if got := cipher("-c", c); got != c {
			t.Errorf("-c %s: %s", c, got)
		}
	}
}

func FuzzGreet(f *testing.F) {
	f.Add([]byte("SSH-2.0-OpenSSH_9.9\r\n" + string(kexInit("aes128-gcm@openssh.com"))))
	f.Add([]byte("SSH-2.0-OpenSSH_9.9\n\x00\x00\x00\x1c\x04\x14"))
	f.Add([]byte("\r\n\r\nSSH-1.5"))
	f.Fuzz(func(t *testing.T, send []byte) {
		if _, replayed := greeted(t, send); !bytes.Equal(replayed, send) {
			t.Fatalf("%q was replayed as %q", send, replayed)
		}
	})
}
