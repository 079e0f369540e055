// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"net"
)

// requestAgent makes a socket in the jail that leads to the client's agent (ssh -A). The
// connection has one, as in sshd: every session that starts later finds it.
func (ss *session) requestAgent() error {
	set := ss.c.set
	switch {
	case ss.started:
		return errors.New("the command is already running")
	case set.DisableForwarding:
		return errors.New("DisableForwarding yes")
	case !set.AgentForwarding:
		return errors.New("AllowAgentForwarding no")
	case !ss.login.key.AgentForwarding:
		return errors.New("the key's options forbid agent forwarding")
	}
	f := ss.c.forwards
	f.agentMu.Lock()
	defer f.agentMu.Unlock()
	if f.agent != "" {
		return nil
	}
	var path string
	err := f.listen(ss.sc, &forwarded{typ: "auth-agent@openssh.com"}, func(fw *forwarded) error {
		l, err := ss.c.srv.jail.ListenAgent()
		if err != nil {
			return fmt.Errorf("make a socket for the agent: %w", err)
		}
		path, fw.on = l.Path(), []net.Listener{l}
		return nil
	}, func(net.Conn) []byte { return nil })
	f.agent = path
	return err
}

// agentSocket is the path of the agent's socket in the jail; empty without one.
func (f *forwards) agentSocket() string {
	f.agentMu.Lock()
	defer f.agentMu.Unlock()
	return f.agent
}
