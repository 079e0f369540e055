// SPDX-License-Identifier: Apache-2.0

package sshdconf

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// RootLogin is the value of PermitRootLogin.
type RootLogin int

// Values of PermitRootLogin; with public keys only, "yes" and "prohibit-password" are the
// same thing.
const (
	RootYes RootLogin = iota
	RootForcedCommandsOnly
	RootNo
)

// Settings are the values this server acts on, defaults filled in. Times are durations,
// 0 means off; sizes are counts.
type Settings struct {
	Ports               []int
	ListenAddresses     []string // "host" or "host:port" as net.SplitHostPort reads it; empty: every address
	AddressFamily       string   // any, inet, inet6
	HostKeys            []string // paths
	HostCertificates    []string
	LogLevel            *slog.Level
	LoginGraceTime      time.Duration
	MaxAuthTries        int
	MaxSessions         int // per connection
	MaxStartups         int // unauthenticated connections at a time
	PermitRootLogin     RootLogin
	PubkeyAuth          bool
	AuthorizedKeysFiles []string
	TrustedUserCAKeys   string // path
	PrincipalsFile      string // AuthorizedPrincipalsFile, a path
	RevokedKeys         string // path
	CAAlgorithms        string // CASignatureAlgorithms
	TouchRequired       bool   // PubkeyAuthOptions touch-required
	AllowUsers          []string
	DenyUsers           []string
	AllowGroups         []string
	DenyGroups          []string
	PermitTTY           bool
	PermitUserEnv       string // "no", "yes" or a pattern list; empty: not set
	AcceptEnv           []string
	SetEnv              []string // NAME=value
	ForceCommand        string
	ChrootDirectory     string
	Subsystems          map[string]string
	Banner              string // path
	PrintMotd           bool
	PrintLastLog        bool
	TCPKeepAlive        bool
	AgentForwarding     bool
	TCPForwarding       string // yes, no, local, remote
	StreamLocal         string // the same for Unix sockets
	PermitOpen          Permissions
	PermitListen        Permissions
	GatewayPorts        string // yes, no, clientspecified
	StreamLocalMask     uint32 // umask of Unix sockets that listen
	StreamLocalUnlink   bool   // what is in their place is removed before
	DisableForwarding   bool
	ClientAliveInterval time.Duration
	ClientAliveCountMax int
	RekeyBytes          uint64 // new keys after so many bytes in one direction; 0: as the cipher asks
	Ciphers             string // lists as written, with an optional leading +, - or ^
	MACs                string
	KexAlgorithms       string
	HostKeyAlgorithms   string
	PubkeyAlgorithms    string
	RequiredRSASize     int // bits

	// Of this server alone, see below.
	MetricsListen   string // address; empty: no metrics
	RecordDirectory string // path; empty: no recordings
	RecordCommands  bool   // sessions without a terminal, too
	RecordRedact    []*regexp.Regexp
	AbandonTimeout  time.Duration

	// Ignored are the keywords that were understood and have no effect here; Missed those of
	// them that ask for something that this server does not do.
	Ignored, Missed []string

	rules []directive // all of them, when some hold for some peers only
}

func defaults() *Settings {
	return &Settings{
		AddressFamily:       "any",
		LoginGraceTime:      120 * time.Second,
		MaxAuthTries:        6,
		MaxSessions:         1000,
		MaxStartups:         1000,
		PubkeyAuth:          true,
		AuthorizedKeysFiles: []string{"/etc/cray/ims/authorized_keys"},
		PermitTTY:           true,
		Subsystems:          map[string]string{},
		PrintMotd:           true,
		PrintLastLog:        true,
		TCPKeepAlive:        true,
		AgentForwarding:     true,
		TCPForwarding:       "yes",
		StreamLocal:         "yes",
		GatewayPorts:        "no",
		StreamLocalMask:     0o177,
		ClientAliveCountMax: 3,
		RequiredRSASize:     1024,
	}
}

// keyword is one line of the table: parse checks the arguments and returns what to do if
// the directive wins.
type keyword struct {
	list  bool // several directives add up
	match bool // may stand in a Match block
	whole bool // but has one value for all connections
	raw   bool // has one argument, the rest of the line as it is
	// missed: without parse, and not to be passed over in silence unless it says no or none
	missed bool
	parse  func(args []string) (func(*Settings), error)
}

var errArgs = errors.New("extra arguments at end of line")

func one(args []string) (string, error) {
	if len(args) != 1 {
		return "", errArgs
	}
	return args[0], nil
}

func yesno(field func(*Settings) *bool) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		v, err := choice(args, "yes", "no")
		return func(s *Settings) { *field(s) = v == "yes" }, err
	}
}

func choice(args []string, values ...string) (string, error) {
	a, err := one(args)
	if err != nil {
		return "", err
	}
	for _, v := range values {
		if strings.EqualFold(a, v) {
			return v, nil
		}
	}
	return "", fmt.Errorf("unsupported option %q: use one of %s", a, strings.Join(values, ", "))
}

func oneOf(field func(*Settings) *string, values ...string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		v, err := choice(args, values...)
		return func(s *Settings) { *field(s) = v }, err
	}
}

func number(field func(*Settings) *int, lo int) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		n, err := atoi(a, lo, math.MaxInt32)
		return func(s *Settings) { *field(s) = n }, err
	}
}

func duration(field func(*Settings) *time.Duration) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		d, err := parseTime(a)
		return func(s *Settings) { *field(s) = d }, err
	}
}

func text(field func(*Settings) *string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		return func(s *Settings) { *field(s) = a }, err
	}
}

// path is a file name; "none" means no file.
func path(field func(*Settings) *string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if strings.EqualFold(a, "none") {
			a = ""
		}
		return func(s *Settings) { *field(s) = a }, err
	}
}

func words(field func(*Settings) *[]string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		return func(s *Settings) { *field(s) = append(*field(s), args...) }, nil
	}
}

// replace is words for a list with a default.
func replace(field func(*Settings) *[]string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		return func(s *Settings) { *field(s) = args }, nil
	}
}

func onePath(field func(*Settings) *[]string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		a, err := one(args)
		return func(s *Settings) { *field(s) = append(*field(s), a) }, err
	}
}

// refuse accepts only the value that asks for nothing.
func refuse(neutral, instead string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		if len(args) == 1 && strings.EqualFold(args[0], neutral) {
			return func(*Settings) {}, nil
		}
		return nil, fmt.Errorf("not supported by this server: %s", instead)
	}
}

// keywords holds every keyword of sshd_config(5) of OpenSSH 9.x in lower case; those with
// a nil parse are accepted and have no effect. The first five are this server's own.
var keywords = map[string]keyword{
	"metricslisten": {parse: func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, fmt.Errorf("%w: want ADDRESS:PORT, such as 127.0.0.1:9100", err)
		}
		return func(s *Settings) { s.MetricsListen = a }, nil
	}},
	"recorddirectory": {parse: path(func(s *Settings) *string { return &s.RecordDirectory })},
	"recordcommands":  {parse: yesno(func(s *Settings) *bool { return &s.RecordCommands })},
	"recordredact": {list: true, parse: func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, fmt.Errorf("%w: put a pattern with spaces into quotes", err)
		}
		p, err := regexp.Compile(a)
		if err != nil {
			return nil, fmt.Errorf("%w: see https://github.com/google/re2/wiki/Syntax", err)
		}
		if p.MatchString("") {
			return nil, fmt.Errorf("%q matches nothing at all, too: want a pattern of at least one character", a)
		}
		return func(s *Settings) { s.RecordRedact = append(s.RecordRedact, p) }, nil
	}},
	"abandontimeout": {parse: duration(func(s *Settings) *time.Duration { return &s.AbandonTimeout })},

	"port": {list: true, parse: func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		n, err := atoi(a, 1, 65535)
		return func(s *Settings) { s.Ports = append(s.Ports, n) }, err
	}},
	"listenaddress":   {list: true, parse: parseListen},
	"addressfamily":   {parse: oneOf(func(s *Settings) *string { return &s.AddressFamily }, "any", "inet", "inet6")},
	"hostkey":         {list: true, parse: onePath(func(s *Settings) *[]string { return &s.HostKeys })},
	"hostcertificate": {list: true, parse: onePath(func(s *Settings) *[]string { return &s.HostCertificates })},
	"loglevel": {match: true, whole: true, parse: func(args []string) (func(*Settings), error) {
		a, err := one(args)
		if err != nil {
			return nil, err
		}
		l, ok := logLevels[strings.ToUpper(a)]
		if !ok {
			return nil, fmt.Errorf("unsupported log level %q", a)
		}
		return func(s *Settings) { s.LogLevel = &l }, nil
	}},
	"logingracetime": {parse: duration(func(s *Settings) *time.Duration { return &s.LoginGraceTime })},
	"maxauthtries":   {match: true, parse: number(func(s *Settings) *int { return &s.MaxAuthTries }, 1)},
	"maxsessions":    {match: true, parse: number(func(s *Settings) *int { return &s.MaxSessions }, 0)},
	"maxstartups":    {parse: parseStartups},
	"permitrootlogin": {match: true, parse: func(args []string) (func(*Settings), error) {
		a, err := choice(args, "yes", "no", "prohibit-password", "without-password", "forced-commands-only")
		v := map[string]RootLogin{"no": RootNo, "forced-commands-only": RootForcedCommandsOnly}[a]
		return func(s *Settings) { s.PermitRootLogin = v }, err
	}},
	"pubkeyauthentication":     {match: true, parse: yesno(func(s *Settings) *bool { return &s.PubkeyAuth })},
	"authorizedkeysfile":       {match: true, parse: replace(func(s *Settings) *[]string { return &s.AuthorizedKeysFiles })},
	"trustedusercakeys":        {match: true, parse: path(func(s *Settings) *string { return &s.TrustedUserCAKeys })},
	"authorizedprincipalsfile": {match: true, parse: path(func(s *Settings) *string { return &s.PrincipalsFile })},
	"revokedkeys":              {match: true, parse: path(func(s *Settings) *string { return &s.RevokedKeys })},
	"casignaturealgorithms":    {match: true, parse: text(func(s *Settings) *string { return &s.CAAlgorithms })},
	"pubkeyauthoptions": {match: true, parse: func(args []string) (func(*Settings), error) {
		a, err := one(args)
		touch := false
		for o := range strings.SplitSeq(strings.ToLower(a), ",") {
			switch o {
			case "none":
			case "touch-required":
				touch = true
			default:
				return nil, errors.Join(err, fmt.Errorf("%q is not supported by this server, which cannot see whether the user was verified", o))
			}
		}
		return func(s *Settings) { s.TouchRequired = touch }, err
	}},
	"allowusers":            {list: true, match: true, parse: words(func(s *Settings) *[]string { return &s.AllowUsers })},
	"denyusers":             {list: true, match: true, parse: words(func(s *Settings) *[]string { return &s.DenyUsers })},
	"allowgroups":           {list: true, match: true, parse: words(func(s *Settings) *[]string { return &s.AllowGroups })},
	"denygroups":            {list: true, match: true, parse: words(func(s *Settings) *[]string { return &s.DenyGroups })},
	"permittty":             {match: true, parse: yesno(func(s *Settings) *bool { return &s.PermitTTY })},
	"permituserenvironment": {parse: text(func(s *Settings) *string { return &s.PermitUserEnv })},
	"acceptenv": {list: true, match: true, parse: func(args []string) (func(*Settings), error) {
		for _, a := range args {
			if strings.Contains(a, "=") {
				return nil, fmt.Errorf("invalid environment name %q: values are for SetEnv", a)
			}
		}
		return func(s *Settings) { s.AcceptEnv = append(s.AcceptEnv, args...) }, nil
	}},
	"setenv": {match: true, parse: func(args []string) (func(*Settings), error) {
		for _, a := range args {
			if n, _, ok := strings.Cut(a, "="); !ok || n == "" {
				return nil, fmt.Errorf("invalid environment %q: want NAME=value", a)
			}
		}
		return func(s *Settings) { s.SetEnv = args }, nil
	}},
	"forcecommand":    {match: true, raw: true, parse: path(func(s *Settings) *string { return &s.ForceCommand })},
	"chrootdirectory": {match: true, whole: true, parse: path(func(s *Settings) *string { return &s.ChrootDirectory })},
	"subsystem": {list: true, match: true, parse: func(args []string) (func(*Settings), error) {
		if len(args) < 2 {
			return nil, errors.New("missing subsystem command")
		}
		return func(s *Settings) {
			if _, dup := s.Subsystems[args[0]]; !dup {
				s.Subsystems[args[0]] = strings.Join(args[1:], " ")
			}
		}, nil
	}},
	"banner":                     {match: true, parse: path(func(s *Settings) *string { return &s.Banner })},
	"printmotd":                  {parse: yesno(func(s *Settings) *bool { return &s.PrintMotd })},
	"printlastlog":               {parse: yesno(func(s *Settings) *bool { return &s.PrintLastLog })},
	"tcpkeepalive":               {parse: yesno(func(s *Settings) *bool { return &s.TCPKeepAlive })},
	"allowagentforwarding":       {match: true, parse: yesno(func(s *Settings) *bool { return &s.AgentForwarding })},
	"allowtcpforwarding":         {match: true, parse: parseForwarding(func(s *Settings) *string { return &s.TCPForwarding })},
	"allowstreamlocalforwarding": {match: true, parse: parseForwarding(func(s *Settings) *string { return &s.StreamLocal })},
	"permitopen":                 {match: true, parse: permissions(func(s *Settings) *Permissions { return &s.PermitOpen }, false)},
	"permitlisten":               {match: true, parse: permissions(func(s *Settings) *Permissions { return &s.PermitListen }, true)},
	"gatewayports":               {match: true, parse: oneOf(func(s *Settings) *string { return &s.GatewayPorts }, "yes", "no", "clientspecified")},
	"disableforwarding":          {match: true, parse: yesno(func(s *Settings) *bool { return &s.DisableForwarding })},
	"streamlocalbindmask":        {match: true, parse: mask(func(s *Settings) *uint32 { return &s.StreamLocalMask })},
	"streamlocalbindunlink":      {match: true, parse: yesno(func(s *Settings) *bool { return &s.StreamLocalUnlink })},
	"clientaliveinterval":        {match: true, parse: duration(func(s *Settings) *time.Duration { return &s.ClientAliveInterval })},
	"clientalivecountmax":        {match: true, parse: number(func(s *Settings) *int { return &s.ClientAliveCountMax }, 0)},
	"rekeylimit":                 {match: true, parse: parseRekeyLimit},
	"ciphers":                    {parse: text(func(s *Settings) *string { return &s.Ciphers })},
	"macs":                       {parse: text(func(s *Settings) *string { return &s.MACs })},
	"kexalgorithms":              {parse: text(func(s *Settings) *string { return &s.KexAlgorithms })},
	"hostkeyalgorithms":          {parse: text(func(s *Settings) *string { return &s.HostKeyAlgorithms })},
	"pubkeyacceptedalgorithms":   {match: true, parse: text(func(s *Settings) *string { return &s.PubkeyAlgorithms })},
	"pubkeyacceptedkeytypes":     {match: true, parse: text(func(s *Settings) *string { return &s.PubkeyAlgorithms })},
	"requiredrsasize":            {match: true, parse: number(func(s *Settings) *int { return &s.RequiredRSASize }, 0)},
	"authenticationmethods": {match: true, parse: func(args []string) (func(*Settings), error) {
		for _, a := range args {
			if !strings.EqualFold(a, "any") && !strings.EqualFold(a, "publickey") {
				return nil, fmt.Errorf("unsupported method list %q: this server authenticates by public key only", a)
			}
		}
		return func(*Settings) {}, nil
	}},
	// Ignoring these would let somebody in whom the file keeps out.
	"refuseconnection":            {match: true, parse: refuse("no", "use DenyUsers")},
	"authorizedprincipalscommand": {match: true, parse: refuse("none", "use AuthorizedPrincipalsFile")},

	"match":   {match: true},
	"include": {match: true},

	// Without effect here. True: allowed in a Match block (SSHCFG_ALL in servconf.c).
	"afstokenpassing":                 {},
	"authorizedkeyscommand":           {match: true, missed: true},
	"authorizedkeyscommanduser":       {match: true},
	"authorizedkeysfile2":             {match: true},
	"authorizedprincipalscommanduser": {match: true},
	"challengeresponseauthentication": {match: true, missed: true},
	"channeltimeout":                  {match: true, missed: true},
	"checkmail":                       {},
	"compression":                     {},
	"debianbanner":                    {},
	"dsaauthentication":               {},
	"exposeauthinfo":                  {match: true, missed: true},
	"fingerprinthash":                 {},
	"gssapiauthentication":            {match: true, missed: true},
	"gssapicleanupcredentials":        {},
	"gssapicleanupcreds":              {},
	"gssapienablek5users":             {match: true},
	"gssapikexalgorithms":             {},
	"gssapikeyexchange":               {},
	"gssapistorecredentialsonrekey":   {},
	"gssapistrictacceptorcheck":       {},
	"gssapiusesessioncredcache":       {},
	"gssusesessionccache":             {},
	"hostbasedacceptedalgorithms":     {match: true},
	"hostbasedacceptedkeytypes":       {match: true},
	"hostbasedauthentication":         {match: true, missed: true},
	"hostbasedusesnamefrompacketonly": {match: true},
	"hostdsakey":                      {},
	"hostkeyagent":                    {missed: true},
	"ignorerhosts":                    {match: true},
	"ignoreuserknownhosts":            {},
	"ipqos":                           {match: true},
	"kbdinteractiveauthentication":    {match: true, missed: true},
	"kerberosauthentication":          {match: true, missed: true},
	"kerberosgetafstoken":             {},
	"kerberosorlocalpasswd":           {},
	"kerberostgtpassing":              {},
	"kerberosticketcleanup":           {},
	"keyregenerationinterval":         {},
	"logverbose":                      {match: true},
	"modulifile":                      {},
	"pamauthenticationviakbdint":      {},
	"passwordauthentication":          {match: true, missed: true},
	"permitblacklistedkeys":           {},
	"permitemptypasswords":            {match: true},
	"permittunnel":                    {match: true, missed: true},
	"permituserrc":                    {match: true},
	"persourcemaxstartups":            {missed: true},
	"persourcenetblocksize":           {},
	"persourcepenalties":              {missed: true},
	"persourcepenaltyexemptlist":      {},
	"pidfile":                         {},
	"protocol":                        {},
	"rdomain":                         {match: true, missed: true},
	"reversemappingcheck":             {},
	"rhostsauthentication":            {},
	"rhostsrsaauthentication":         {match: true},
	"rsaauthentication":               {},
	"securitykeyprovider":             {},
	"serverkeybits":                   {},
	"showpatchlevel":                  {},
	"skeyauthentication":              {},
	"sshdauthpath":                    {},
	"sshdsessionpath":                 {},
	"strictmodes":                     {},
	"syslogfacility":                  {},
	"unusedconnectiontimeout":         {match: true, missed: true},
	"usedns":                          {},
	"uselogin":                        {},
	"usepam":                          {},
	"useprivilegeseparation":          {},
	"verifyreversemapping":            {},
	"versionaddendum":                 {},
	"x11displayoffset":                {match: true},
	"x11forwarding":                   {match: true, missed: true},
	"x11uselocalhost":                 {match: true},
	"xauthlocation":                   {},
}

var logLevels = map[string]slog.Level{
	"QUIET": slog.LevelError, "FATAL": slog.LevelError, "ERROR": slog.LevelError,
	"INFO": slog.LevelInfo, "VERBOSE": slog.LevelInfo,
	"DEBUG": slog.LevelDebug, "DEBUG1": slog.LevelDebug, "DEBUG2": slog.LevelDebug, "DEBUG3": slog.LevelDebug,
}

func parseForwarding(field func(*Settings) *string) func([]string) (func(*Settings), error) {
	return func(args []string) (func(*Settings), error) {
		v, err := choice(args, "yes", "no", "all", "local", "remote")
		if v == "all" {
			v = "yes"
		}
		return func(s *Settings) { *field(s) = v }, err
	}
}

// parseListen accepts host, host:port, [v6], [v6]:port and a bare v6 address.
func parseListen(args []string) (func(*Settings), error) {
	if len(args) == 3 && strings.EqualFold(args[1], "rdomain") {
		return nil, errors.New("rdomain is not supported by this server")
	}
	a, err := one(args)
	if err != nil {
		return nil, err
	}
	host, port := strings.Trim(a, "[]"), ""
	if net.ParseIP(host) == nil && strings.Contains(a, ":") {
		if host, port, err = net.SplitHostPort(a); err != nil {
			return nil, fmt.Errorf("bad address %q: %w", a, err)
		}
	}
	if host == "*" {
		host = ""
	}
	if port != "" {
		if _, err := atoi(port, 1, 65535); err != nil {
			return nil, fmt.Errorf("bad port in %q: %w", a, err)
		}
		host = net.JoinHostPort(host, port)
	}
	return func(s *Settings) { s.ListenAddresses = append(s.ListenAddresses, host) }, nil
}

// parseStartups reads "full" or "start:rate:full". This server has no random early drop:
// only the last number counts.
func parseStartups(args []string) (func(*Settings), error) {
	a, err := one(args)
	if err != nil {
		return nil, err
	}
	parts := strings.Split(a, ":")
	if len(parts) != 1 && len(parts) != 3 {
		return nil, fmt.Errorf("invalid specification %q: want NUMBER or START:RATE:FULL", a)
	}
	var n [3]int
	for i, p := range parts {
		if n[i], err = atoi(p, 1, math.MaxInt32); err != nil {
			return nil, err
		}
	}
	if start, rate, full := n[0], n[1], n[2]; len(parts) == 3 && (start > full || rate > 100) {
		return nil, fmt.Errorf("invalid specification %q: START is above FULL, or RATE above 100", a)
	}
	return func(s *Settings) { s.MaxStartups = n[len(parts)-1] }, nil
}

// parseRekeyLimit reads an amount of data with an optional K, M or G, and a time, which is checked but has
// no effect: the SSH library counts bytes only.
func parseRekeyLimit(args []string) (func(*Settings), error) {
	if len(args) < 1 || len(args) > 2 {
		return nil, errors.New("want an amount of data, and at most a time")
	}
	var limit uint64
	if a := strings.ToUpper(args[0]); a != "DEFAULT" {
		digits := strings.TrimRight(a, "KMG")
		n, err := strconv.ParseUint(digits, 10, 32)
		shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30}[a[len(digits):]]
		limit = n << shift
		if err != nil || !ok || limit != 0 && limit < 16 {
			return nil, fmt.Errorf("bad amount of data %q: want default, or 16 or more bytes such as 512M or 1G", args[0])
		}
	}
	if len(args) == 2 && !strings.EqualFold(args[1], "none") {
		if _, err := parseTime(args[1]); err != nil {
			return nil, err
		}
	}
	return func(s *Settings) { s.RekeyBytes = limit }, nil
}

// parseTime reads the time formats of sshd_config(5): seconds, or numbers with s, m, h, d,
// w added up.
func parseTime(s string) (time.Duration, error) {
	bad := fmt.Errorf("invalid time value %q: want seconds or a sum such as 1h30m", s)
	units := map[byte]int64{'s': 1, 'm': 60, 'h': 3600, 'd': 86400, 'w': 604800}
	var total int64
	for rest := s; ; {
		i := 0
		for i < len(rest) && rest[i] >= '0' && rest[i] <= '9' {
			i++
		}
		n, err := strconv.ParseInt(rest[:i], 10, 32)
		if err != nil {
			return 0, bad
		}
		unit := int64(1)
		if i < len(rest) {
			var ok bool
			if unit, ok = units[rest[i]|0x20]; !ok {
				return 0, bad
			}
			i++
		}
		if total += n * unit; total > math.MaxInt32 {
			return 0, bad
		}
		if rest = rest[i:]; rest == "" {
			return time.Duration(total) * time.Second, nil
		}
	}
}
