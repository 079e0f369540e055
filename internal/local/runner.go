// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/ims-buildenv/ims-buildenv/internal/port"
)

var errNeedRoot = errors.New("the process runner needs root for mounts and namespaces; run imslocal with sudo")

// stopGrace is how long a container may take to end when it is asked to, as in
// Kubernetes.
const stopGrace = 30 * time.Second

// runnerConfig is what a processRunner is made of.
type runnerConfig struct {
	dir   string // <data>/jobs
	world podWorld
	port  int // of every job's sshd; 0 for a free one each
	log   *slog.Logger
	// line gets each line a container wrote.
	line func(jobID, container, line string)
	// ended is told when a pod is over and its job should have ended.
	ended func(jobID, reason string)
}

// processRunner runs each container of a pod as a process of this machine.
type processRunner struct {
	runnerConfig
	mu     sync.Mutex
	pods   map[string]*pod
	closed bool
	wg     sync.WaitGroup
}

// pod is one job's containers.
type pod struct {
	podSpec
	held     *os.File      // the port
	running  bool          // run has been called; guarded by the runner's lock
	stop     chan struct{} // closed: end all containers
	released chan struct{} // closed: service and volume are gone, the job has ended
	over     chan struct{} // closed: no container is left
	stopOnce sync.Once
	freeOnce sync.Once
}

func newProcessRunner(c runnerConfig) (*processRunner, error) {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	return &processRunner{runnerConfig: c, pods: map[string]*pod{}}, nil
}

// checkMachine refuses a machine that cannot run pods. bin is where sidecar and
// sshd must be.
func checkMachine(bin string) error {
	if os.Geteuid() != 0 {
		return errNeedRoot
	}
	for _, name := range []string{"sidecar", "sshd"} {
		if st, err := os.Stat(filepath.Join(bin, name)); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			return fmt.Errorf("program %s: not found beside imslocal in %s; build it with `make build`", name, bin)
		}
	}
	return nil
}

// Reserve implements Runner: it chooses the port.
func (r *processRunner) Reserve(job Job) (ConnectionInfo, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return ConnectionInfo{}, errors.New("imslocal is stopping")
	}
	held, port, err := r.freePort()
	if err != nil {
		return ConnectionInfo{}, err
	}
	p := &pod{
		podSpec: podSpec{world: r.world, job: job, port: port, dir: filepath.Join(r.dir, job.ID)}, held: held,
		stop: make(chan struct{}), released: make(chan struct{}), over: make(chan struct{}),
	}
	r.pods[job.ID] = p
	return endpoint(port), nil
}

// freePort finds a port for sshd that no living pod has, and holds it; the lock is held, too.
func (r *processRunner) freePort() (*os.File, int, error) {
	held, addr, err := port.Hold(":" + strconv.Itoa(r.port))
	if err != nil {
		return nil, 0, fmt.Errorf("SSH port: %w; give another --port", err)
	}
	for _, p := range r.pods {
		if p.port == addr.Port {
			held.Close()
			return nil, 0, fmt.Errorf("SSH port %d is taken by another job; wait for its end or give another --port", p.port)
		}
	}
	return held, addr.Port, nil
}

// forget drops a pod that is over, or never was; the lock is held.
func (r *processRunner) forget(p *pod) {
	delete(r.pods, p.job.ID)
	p.held.Close()
}

// Start implements Runner.
func (r *processRunner) Start(job Job, in PodInput) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.pods[job.ID]
	if !ok || r.closed {
		return errors.New("imslocal is stopping")
	}
	p.job, p.input = job, in
	if err := p.write(); err != nil {
		return fmt.Errorf("write the pod's volumes: %w", err)
	}
	p.running = true
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		r.run(p)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.forget(p)
		// a release that came after run had cleaned up
		if err := os.RemoveAll(p.volumeRemoved()); err != nil {
			r.log.Error("remove the job's volume", "job_id", job.ID, "error", err)
		}
	}()
	return nil
}

// Release implements Runner. As with a claim in use, the volume's content goes
// when the last container has ended; its name goes now.
func (r *processRunner) Release(jobID string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	spec := podSpec{dir: filepath.Join(r.dir, jobID)}
	if err := os.Rename(spec.path("volume"), spec.volumeRemoved()); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove the job's volume: %w", err)
	}
	if p, ok := r.pods[jobID]; ok {
		p.freeOnce.Do(func() { close(p.released) })
		return nil
	}
	return os.RemoveAll(spec.volumeRemoved())
}

// Remove implements Runner. It does not wait for the containers; the job's
// directory goes when they have ended.
func (r *processRunner) Remove(jobID string) error {
	dir := filepath.Join(r.dir, jobID)
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.pods[jobID]
	if ok && !p.running {
		r.forget(p)
		ok = false
	}
	if !ok {
		return os.RemoveAll(dir)
	}
	p.stopOnce.Do(func() { close(p.stop) })
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		<-p.over
		if err := os.RemoveAll(dir); err != nil {
			r.log.Error("remove a deleted job's directory", "job_id", jobID, "error", err)
		}
	}()
	return nil
}

// sweep removes what earlier runs of imslocal left of jobs that no longer run;
// known are the jobs with a record, whose logs stay.
func (r *processRunner) sweep(known []Job) error {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := podSpec{dir: filepath.Join(r.dir, e.Name())}
		gone := []string{p.dir}
		if slices.ContainsFunc(known, func(j Job) bool { return j.ID == e.Name() }) {
			gone = []string{p.path("volume"), p.volumeRemoved(), p.path("scratch")}
		}
		for _, path := range gone {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("remove what a job left: %w", err)
			}
		}
	}
	return nil
}

// close ends all pods and waits for them. No job starts any more.
func (r *processRunner) close() {
	r.mu.Lock()
	r.closed = true
	pods := slices.Collect(maps.Values(r.pods))
	r.mu.Unlock()
	for _, p := range pods {
		p.stopOnce.Do(func() { close(p.stop) })
	}
	r.wg.Wait()
}

// run is the life of a pod: the init container to its end, then both
// containers side by side.
func (r *processRunner) run(p *pod) {
	log := r.log.With("job_id", p.job.ID)
	var history []containerEnd
	defer func() {
		if err := writeHistory(p.path("containers.json"), history); err != nil {
			log.Error("record the containers' ends", "error", err)
		}
		for _, path := range []string{p.path("scratch"), p.volumeRemoved()} {
			if err := os.RemoveAll(path); err != nil {
				log.Error("remove what the job left", "error", err)
			}
		}
		close(p.over)
	}()
	record := func(c *container) exit {
		<-c.done
		<-c.drained
		history = append(history, containerEnd{Name: c.name, Started: c.started.Format(timestamp), Finished: c.ended.Format(timestamp), exit: c.exit()})
		return c.exit()
	}

	prepare, err := r.startContainer(p, prepareName)
	if err != nil {
		r.ended(p.job.ID, err.Error())
		return
	}
	if !p.await(prepare) {
		stopContainers(stopGrace, prepare)
	}
	if how := record(prepare); how != (exit{}) || p.isOver() {
		r.ended(p.job.ID, "the container prepare ended: "+how.String())
		return
	}

	sidecar, err := r.startContainer(p, sidecarName)
	if err != nil {
		r.ended(p.job.ID, err.Error())
		return
	}
	sshd, err := r.startContainer(p, sshdName)
	if err != nil {
		stopContainers(stopGrace, sidecar)
		record(sidecar)
		r.ended(p.job.ID, err.Error())
		return
	}
	// the sidecar's end is the pod's: it notices itself when sshd is gone
	if !p.await(sidecar) {
		stopContainers(stopGrace, sidecar, sshd)
	}
	how := record(sidecar)
	r.ended(p.job.ID, "the container buildenv-sidecar ended: "+how.String())
	select {
	case <-sshd.done:
	case <-time.After(sshdGrace):
		stopContainers(stopGrace, sshd)
	}
	record(sshd)
}

// sshdGrace is how long sshd may take to end by itself when the sidecar has.
const sshdGrace = 5 * time.Second

// await waits for a container's end. False: it is to be stopped, because the
// pod is, or because its job has ended and it does not follow.
func (p *pod) await(c *container) bool {
	released, late := p.released, (<-chan time.Time)(nil)
	for {
		select {
		case <-c.done:
			return true
		case <-p.stop:
			return false
		case <-late:
			return false
		case <-released:
			released, late = nil, time.After(stopGrace)
		}
	}
}

// isOver tells whether the pod has been stopped or its job has ended.
func (p *pod) isOver() bool {
	select {
	case <-p.stop:
		return true
	case <-p.released:
		return true
	default:
		return false
	}
}

func (r *processRunner) startContainer(p *pod, name string) (*container, error) {
	log, err := os.OpenFile(p.path("logs", name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	c, err := startContainer(name, p.container(name), log, func(line string) { r.line(p.job.ID, name, line) })
	if err != nil {
		log.Close()
		return nil, fmt.Errorf("start the container %s: %w", name, err)
	}
	of := []any{"job_id", p.job.ID, "container", name, "pid", c.cmd.Process.Pid}
	r.log.Info("container started", of...)
	go func() {
		<-c.done
		<-c.drained
		log.Close()
		if how := c.exit(); how == (exit{}) {
			r.log.Info("container ended", of...)
		} else {
			r.log.Warn("container ended", append(of, "how", how.String())...)
		}
	}()
	return c, nil
}

// containerEnd is a line of <data>/jobs/<id>/containers.json.
type containerEnd struct {
	Name     string `json:"name"`
	Started  string `json:"started"`
	Finished string `json:"finished"`
	exit
}

func writeHistory(path string, history []containerEnd) error {
	b, err := json.MarshalIndent(history, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, append(b, '\n'), 0o600)
}
