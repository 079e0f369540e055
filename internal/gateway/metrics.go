// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/ims-buildenv/ims-buildenv/internal/config"
	"github.com/ims-buildenv/ims-buildenv/internal/jail"
)

// kinds are the values of the label kind, and what status and log call sessions.
var kinds = map[jail.Kind]string{jail.Shell: "shell", jail.Exec: "exec", jail.SFTP: "sftp"}

// metrics counts what happens on a server. No label holds text of a client's, so their number is fixed.
type metrics struct {
	srv          *server
	connections  prometheus.Counter
	logins       prometheus.Counter
	authFailures prometheus.Counter
	sessions     *prometheus.CounterVec
	duration     prometheus.Histogram

	goneIn, goneOut int64        // bytes of the connections that are closed; under the server's mu
	active          atomic.Int64 // when a session last moved data or ended, in Unix nanoseconds
}

func newMetrics(s *server) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		srv:          s,
		connections:  counter("sshd_connections_total", "Accepted connections."),
		logins:       counter("sshd_logins_total", "Connections that logged in."),
		authFailures: counter("sshd_auth_failures_total", "Refused login attempts; a client with several keys makes several."),
		sessions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sshd_sessions_total", Help: "Sessions started.",
		}, []string{"kind"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "sshd_exec_duration_seconds", Help: "How long commands ran, without shells and sftp.",
			Buckets: prometheus.ExponentialBuckets(0.01, 4, 11), // 10 ms to 3 h
		}),
	}
	m.active.Store(time.Now().UnixNano())
	for _, k := range kinds {
		m.sessions.WithLabelValues(k)
	}
	return m
}

// closed takes the bytes of a connection that leaves the server's; the caller holds the server's mu.
func (m *metrics) closed(c *conn) {
	m.goneIn += c.in.Load()
	m.goneOut += c.out.Load()
}

// bytes returns what all connections there were have moved; it never decreases.
func (m *metrics) bytes() (in, out int64) {
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	in, out = m.goneIn, m.goneOut
	for c := range m.srv.conns {
		in, out = in+c.in.Load(), out+c.out.Load()
	}
	return in, out
}

// lastActivity is when a session last moved data, started or ended; at first, when the server started.
func (m *metrics) lastActivity() time.Time {
	last := m.active.Load()
	for _, c := range m.srv.snapshot() {
		for _, ss := range c.sessionList() {
			last = max(last, ss.traffic.last.Load())
		}
	}
	return time.Unix(0, last)
}

var (
	descConnections = prometheus.NewDesc("sshd_connections", "Open connections.", []string{"state"}, nil)
	descSessions    = prometheus.NewDesc("sshd_sessions", "Open sessions.", []string{"kind"}, nil)
	descForwarded   = prometheus.NewDesc("sshd_forwarded_connections", "Open forwarded connections.", nil, nil)
	descReceived    = prometheus.NewDesc("sshd_received_bytes_total", "Bytes received from clients.", nil, nil)
	descSent        = prometheus.NewDesc("sshd_sent_bytes_total", "Bytes sent to clients.", nil, nil)
	descActivity    = prometheus.NewDesc("sshd_last_activity_seconds", "Seconds since a session moved data, started or ended.", nil, nil)
	descFree        = prometheus.NewDesc("sshd_volume_free_bytes", "Free bytes of the volume with the image root.", nil, nil)
	descSize        = prometheus.NewDesc("sshd_volume_size_bytes", "Size of the volume with the image root.", nil, nil)
)

// liveMetrics are read at the time of a scrape.
type liveMetrics struct {
	m *metrics
}

// Describe names them.
func (l liveMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descConnections, descSessions, descForwarded, descReceived, descSent, descActivity, descFree, descSize} {
		ch <- d
	}
}

// Collect reads them.
func (l liveMetrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	in, out := l.m.bytes()
	states := map[bool]int{}
	open := map[string]int{}
	forwarded := 0
	for _, c := range l.m.srv.snapshot() {
		c.mu.Lock()
		states[c.login != nil]++
		c.mu.Unlock()
		n, _ := c.forwards.count()
		forwarded += n
		for _, ss := range c.sessionList() {
			if kind := ss.describe().Kind; kind != "" {
				open[kind]++
			}
		}
	}
	gauge(descConnections, float64(states[true]), "authenticated")
	gauge(descConnections, float64(states[false]), "unauthenticated")
	for _, k := range kinds {
		gauge(descSessions, float64(open[k]), k)
	}
	gauge(descForwarded, float64(forwarded))
	ch <- prometheus.MustNewConstMetric(descReceived, prometheus.CounterValue, float64(in))
	ch <- prometheus.MustNewConstMetric(descSent, prometheus.CounterValue, float64(out))
	gauge(descActivity, time.Since(l.m.lastActivity()).Seconds())
	if free, size, err := volume(l.m.srv.root); err == nil {
		gauge(descFree, float64(free))
		gauge(descSize, float64(size))
	}
}

// volume returns the bytes that are free, and those there are, on the file system of path.
func volume(path string) (free, size uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, fmt.Errorf("free space of %s: %w", path, err)
	}
	return st.Bavail * uint64(st.Bsize), st.Blocks * uint64(st.Bsize), nil
}

// Limits of the metrics listener: whoever reaches it can hold a few descriptors for a few seconds.
const (
	scrapeTimeout = 10 * time.Second
	maxScrapes    = 4
	maxScrapeHead = 8 << 10
)

// serve serves /metrics on addr until the server is closed, and nothing else there.
func (m *metrics) serve(addr string, level jail.Level, log *slog.Logger) (*http.Server, net.Addr, error) {
	reg := prometheus.NewPedanticRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sshd_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": config.Version, "goversion": runtime.Version(), "jail": level.String()},
	})
	info.Set(1)
	for _, c := range []prometheus.Collector{info, m.connections, m.logins, m.authFailures, m.sessions, m.duration, liveMetrics{m}} {
		if err := reg.Register(c); err != nil {
			return nil, nil, fmt.Errorf("metrics: %w", err)
		}
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, nil, fmt.Errorf("metrics: %w: choose another MetricsListen", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes, Timeout: scrapeTimeout, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}))
	srv := &http.Server{
		Handler: mux, MaxHeaderBytes: maxScrapeHead,
		ReadTimeout: scrapeTimeout, WriteTimeout: 2 * scrapeTimeout, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go srv.Serve(l)
	return srv, l.Addr(), nil
}
