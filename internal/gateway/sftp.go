// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
	"github.com/ims-buildenv/ims-buildenv/internal/sftpserver"
)

// internalSFTP is the name sshd_config(5) gives the built-in SFTP server.
const internalSFTP = "internal-sftp"

// sftpArguments recognises the built-in server's command and returns its arguments.
func sftpArguments(command string) (args string, ok bool) {
	prog, args, _ := strings.Cut(command, " ")
	return args, prog == internalSFTP
}

// subsystem returns the command of a subsystem. sftp is always the built-in server: one in the image is neither needed
// nor wanted, because it may be missing or of another architecture.
func subsystem(set *sshdconf.Settings, name string) (string, bool) {
	c, ok := set.Subsystems[name]
	if name != "sftp" {
		return c, ok
	}
	prog, args, _ := strings.Cut(c, " ")
	if !ok || prog == internalSFTP || prog[strings.LastIndexByte(prog, '/')+1:] == "sftp-server" {
		return strings.TrimSuffix(internalSFTP+" "+args, " "), true
	}
	return c, true
}

// checkSFTP looks at the arguments of the SFTP server in sshd_config, before somebody depends on them.
func checkSFTP(set *sshdconf.Settings, log *slog.Logger) error {
	type line struct{ keyword, command string }
	var lines []line
	for _, v := range set.Variants() {
		sftp, _ := subsystem(v, "sftp")
		lines = append(lines, line{"Subsystem sftp", sftp}, line{"ForceCommand", v.ForceCommand})
	}
	for i, c := range lines {
		args, ok := sftpArguments(c.command)
		if !ok || slices.Contains(lines[:i], c) {
			continue
		}
		_, ignored, err := sftpserver.ParseOptions(strings.Fields(args))
		if err != nil {
			return fmt.Errorf("sshd_config: %s: %w", c.keyword, err)
		}
		if len(ignored) > 0 {
			log.Warn("arguments of the SFTP server without effect: its log is part of this one", "keyword", c.keyword, "arguments", ignored)
		}
	}
	return nil
}

// The log of a session's file operations comes from a process in the jail, that is, from whoever is root there. What is
// read is text of bounded length, quoted by the logger, and no more lines are logged than these; beyond them they are
// counted. Copying small files makes some hundred lines a second.
const (
	sftpLinesPerSecond = 5000
	sftpLinesAtOnce    = 20000
	// sftpLogEnd is how long the log may be held open after the server's end.
	sftpLogEnd = time.Second
)

// sftpProcess ends when the log has been read, too.
type sftpProcess struct {
	*jail.Process
	log  *os.File
	read chan struct{}
}

// Wait waits for the command and for the end of its log.
func (p sftpProcess) Wait() jail.Exit {
	exit := p.Process.Wait()
	if err := p.log.SetReadDeadline(time.Now().Add(sftpLogEnd)); err != nil {
		p.log.Close()
	}
	<-p.read
	return exit
}

// logSFTP logs the operations that arrive on r, which it closes.
func (ss *session) logSFTP(p *jail.Process, r *os.File) process {
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer r.Close()
		defer ss.c.guard("log of the SFTP server")
		l := &sftpLog{ss: ss, limit: rate.NewLimiter(sftpLinesPerSecond, sftpLinesAtOnce)}
		l.copy(r)
	}()
	return sftpProcess{p, r, read}
}

type sftpLog struct {
	ss    *session
	limit *rate.Limiter
	lost  int  // lines that were not logged
	full  bool // a full disk was told of
}

func (l *sftpLog) copy(r io.Reader) {
	in := bufio.NewReaderSize(r, sftpserver.MaxRecord)
	for cut := false; ; {
		line, err := in.ReadSlice('\n')
		if !cut && len(line) > 0 {
			l.line(line)
		}
		cut = errors.Is(err, bufio.ErrBufferFull) // the rest of a line that is too long
		if err != nil && !cut {
			break
		}
	}
	if l.lost > 0 {
		l.ss.log.Warn("file operations were not logged: too many at a time", "lines", l.lost)
	}
}

func (l *sftpLog) line(line []byte) {
	if !l.limit.Allow() {
		l.lost++
		return
	}
	log := l.ss.log
	var r sftpserver.Record
	if err := json.Unmarshal(line, &r); err != nil || r.Op == "" {
		// The server's last words, for the client too.
		log.Warn("sftp server", "text", strings.TrimSpace(string(line)))
		l.ss.ch.Stderr().Write(line)
		return
	}
	if r.Lost > 0 {
		log.Warn("file operations were not logged: the log was too slow", "lines", r.Lost)
	}
	attrs := []any{"op", r.Op}
	for _, a := range []struct{ key, value string }{
		{"path", r.Path}, {"target", r.Target}, {"flags", r.Flags}, {"mode", r.Mode}, {"attrs", r.Attrs},
	} {
		if a.value != "" {
			attrs = append(attrs, a.key, a.value)
		}
	}
	if r.Op == "close" || r.Op == "forced close" {
		attrs = append(attrs, "bytes_read", r.Read, "bytes_written", r.Written)
	}
	if r.Err != "" {
		attrs = append(attrs, "err", r.Err)
	}
	log.Info("file", attrs...)
	if r.Full && !l.full {
		l.full = true
		free, size, err := volume(l.ss.c.srv.root)
		if err != nil {
			log.Warn("disk full", "err", err)
			return
		}
		log.Warn("disk full", "path", r.Path, "volume_free_bytes", free, "volume_size_bytes", size)
	}
}
