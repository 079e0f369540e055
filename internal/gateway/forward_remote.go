// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	gssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/ims-buildenv/ims-buildenv/internal/gateway/sshdconf"
)

// lookupTime bounds the look-up of a name to listen on.
const lookupTime = 10 * time.Second

// forwarded is one request to listen that is in force.
type forwarded struct {
	typ  string // of the channels to the client
	name string // what the client calls it
	on   []net.Listener
	log  *slog.Logger
}

// forwarding adapts a handler of the global requests about listening. It runs to its end
// before the connection's next request: cancel always finds what was asked for before.
func (s *server) forwarding(h func(*forwards, *ssh.ServerConn, *login, *ssh.Request) ([]byte, error)) gssh.RequestHandler {
	return func(ctx gssh.Context, _ *gssh.Server, req *ssh.Request) (ok bool, answer []byte) {
		c := ctx.Value(connKey{}).(*conn)
		defer c.forwards.contain("global request", func() {})
		sc := ctx.Value(gssh.ContextKeyConn).(*ssh.ServerConn)
		c.announceHostKeys(sc)
		err := errors.New("this connection has not logged in")
		if l, ok := sc.Permissions.ExtraData[loginKey{}].(*login); ok {
			answer, err = h(c.forwards, sc, l, req)
		}
		if err != nil {
			c.log.Info("forward refused", "type", req.Type, "why", err)
			return false, nil
		}
		return true, answer
	}
}

// parseListenTCP reads the payload of tcpip-forward and its cancellation (RFC 4254, 7.1).
func parseListenTCP(payload []byte) (host string, port int, err error) {
	var m struct {
		Host string
		Port uint32
	}
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", 0, err
	}
	if m.Port > 0xffff || strings.IndexByte(m.Host, 0) >= 0 {
		return "", 0, errors.New("malformed address")
	}
	return m.Host, int(m.Port), nil
}

// listenTCP makes a port listen for the client (ssh -R).
func (f *forwards) listenTCP(sc *ssh.ServerConn, l *login, req *ssh.Request) ([]byte, error) {
	host, port, err := parseListenTCP(req.Payload)
	if err != nil {
		return nil, err
	}
	name := target{host, port}.String()
	if err := f.c.permitForward(l.key, remoteForward, host, port); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", name, err)
	}
	if port == 0 && !req.WantReply {
		return nil, errors.New("listen on any port: the client does not want to know which")
	}
	var ls []net.Listener
	err = f.listen(sc, &forwarded{typ: "forwarded-tcpip"}, func(fw *forwarded) (err error) {
		ls, err = listenOn(f.c.set, host, port)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", name, err)
		}
		fw.on = ls
		fw.name = net.JoinHostPort(host, strconv.Itoa(portOf(ls[0])))
		return nil
	}, func(c net.Conn) []byte {
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
		return ssh.Marshal(struct {
			Host       string
			Port       uint32
			Originator string
			From       uint32
		}{host, uint32(c.LocalAddr().(*net.TCPAddr).Port), from.Addr().Unmap().String(), uint32(from.Port())})
	})
	if err != nil || port != 0 {
		return nil, err
	}
	return ssh.Marshal(struct{ Port uint32 }{uint32(portOf(ls[0]))}), nil
}

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func (f *forwards) cancelTCP(_ *ssh.ServerConn, _ *login, req *ssh.Request) ([]byte, error) {
	host, port, err := parseListenTCP(req.Payload)
	if err != nil {
		return nil, err
	}
	return nil, f.cancel("forwarded-tcpip", net.JoinHostPort(host, strconv.Itoa(port)))
}

// listenUnix makes a Unix socket listen for the client, where the sessions see it.
func (f *forwards) listenUnix(sc *ssh.ServerConn, l *login, req *ssh.Request) ([]byte, error) {
	path, err := parseString(req.Payload)
	if err != nil {
		return nil, err
	}
	if err := f.c.permitForward(l.key, remoteForward, path, unixPort); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", short(path), err)
	}
	channel := ssh.Marshal(struct{ Path, Reserved string }{path, ""})
	return nil, f.listen(sc, &forwarded{typ: "forwarded-streamlocal@openssh.com", name: path}, func(fw *forwarded) error {
		l, err := f.c.srv.jail.Listen(path, f.c.set.StreamLocalMask, f.c.set.StreamLocalUnlink)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", short(path), err)
		}
		fw.on = []net.Listener{l}
		return nil
	}, func(net.Conn) []byte { return channel })
}

func (f *forwards) cancelUnix(_ *ssh.ServerConn, _ *login, req *ssh.Request) ([]byte, error) {
	path, err := parseString(req.Payload)
	if err != nil {
		return nil, err
	}
	return nil, f.cancel("forwarded-streamlocal@openssh.com", path)
}

// listen enters fw, which start brings up, and opens a channel with the given data to the
// client for each connection.
func (f *forwards) listen(sc ssh.Conn, fw *forwarded, start func(*forwarded) error, data func(net.Conn) []byte) error {
	if why := f.c.srv.stopping(); why != "" {
		return errors.New(why)
	}
	f.mu.Lock()
	full := len(f.listeners) >= maxListeners
	f.mu.Unlock()
	if full {
		return errListeners
	}
	if err := start(fw); err != nil {
		return err
	}
	var addrs []string
	for _, l := range fw.on {
		addrs = append(addrs, l.Addr().String())
	}
	fw.log = f.c.log.With("type", fw.typ, "on", strings.Join(addrs, " "))
	f.mu.Lock()
	closed := f.closed
	if !closed {
		f.listeners = append(f.listeners, fw)
	}
	f.mu.Unlock()
	if closed {
		fw.close()
		return net.ErrClosed
	}
	fw.log.Info("forward listening")
	for _, l := range fw.on {
		go f.accept(sc, fw, l, data)
	}
	return nil
}

// close stops listening; connections that are there stay.
func (fw *forwarded) close() {
	for _, l := range fw.on {
		if err := l.Close(); err != nil {
			fw.log.Warn("forward", "err", err)
		}
	}
	fw.log.Debug("forward no longer listening")
}

// cancel ends what listens under the name.
func (f *forwards) cancel(typ, name string) error {
	is := func(fw *forwarded) bool { return fw.typ == typ && fw.name == name }
	f.mu.Lock()
	var hit []*forwarded
	for _, fw := range f.listeners {
		if is(fw) {
			hit = append(hit, fw)
		}
	}
	f.listeners = slices.DeleteFunc(f.listeners, is)
	f.mu.Unlock()
	for _, fw := range hit {
		fw.close()
	}
	if len(hit) == 0 {
		return fmt.Errorf("cancel %s: nothing listens under this name", short(name))
	}
	return nil
}

func (f *forwards) accept(sc ssh.Conn, fw *forwarded, l net.Listener, data func(net.Conn) []byte) {
	defer f.contain("forward", func() { l.Close() })
	for {
		nc, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // out of descriptors, mostly
			fw.log.Warn("forward: accept", "err", err)
			select {
			case <-f.c.gone:
				return
			case <-time.After(time.Second):
			}
			continue
		}
		if !f.take() {
			fw.log.Info("forward refused", "why", errForwarded)
			nc.Close()
			continue
		}
		go f.toClient(sc, fw, nc.(duplex), data)
	}
}

// toClient asks the client to take a connection over.
func (f *forwards) toClient(sc ssh.Conn, fw *forwarded, nc duplex, data func(net.Conn) []byte) {
	defer f.put()
	defer f.contain("forward", func() {})
	defer nc.Close()
	log := fw.log.With("forward", f.c.ids.Add(1))
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		log = log.With("from", a)
	}
	ch, reqs, err := sc.OpenChannel(fw.typ, data(nc))
	if err != nil {
		log.Info("forward refused", "why", "the client does not take it", "err", err)
		return
	}
	f.relay(log, ch, reqs, nc)
}

// bindAddresses is where a port listens for host (channel_fwd_bind_addr in channels.c).
func bindAddresses(gatewayPorts, host string) []string {
	loopback := []string{"127.0.0.1", "::1"}
	switch {
	case gatewayPorts == "no" && !slices.Contains(loopback, host):
		return loopback
	case gatewayPorts == "no":
		return []string{host}
	case gatewayPorts == "yes", host == "", host == "*":
		return []string{"0.0.0.0", "::"}
	case host == "localhost":
		return loopback
	}
	return []string{host}
}

// listenOn listens on each address for host that can be had, all with the same port.
func listenOn(set *sshdconf.Settings, host string, port int) (ls []net.Listener, err error) {
	var addrs []netip.Addr
	for _, h := range bindAddresses(set.GatewayPorts, host) {
		if a, err := netip.ParseAddr(h); err == nil {
			addrs = append(addrs, a)
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), lookupTime)
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", h)
		cancel()
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, found...)
	}
	for _, a := range addrs {
		network := "tcp6"
		if a = a.Unmap(); a.Is4() {
			network = "tcp4"
		}
		if want := tcpNetwork(set); want != "tcp" && want != network {
			continue
		}
		l, lerr := net.Listen(network, netip.AddrPortFrom(a, uint16(port)).String())
		if lerr != nil {
			err = errors.Join(err, lerr)
			continue
		}
		ls, port = append(ls, l), portOf(l)
	}
	if len(ls) == 0 {
		return nil, errors.Join(err, errors.New("no address to listen on"))
	}
	return ls, nil
}
