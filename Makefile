# ims-buildenv: every target works on a fresh Debian 12 machine as root with Go.
# `make help` lists them.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/ims-buildenv/ims-buildenv/internal/config.Version=$(VERSION)
STATIC  := -trimpath -tags netgo,osusergo

# Settings of `make demo` and `make run`
JAIL  ?= true
IMAGE ?=
KEY   ?=
PORT  ?=

# Extra arguments of `make test`, e.g. GOTESTFLAGS='-run Pack -v'
GOTESTFLAGS ?=
# How many trees edited at random are packed as deltas and compared, in each layout of the root: three images each
EDITS ?= 400
# How long each fuzz target runs: a count, because with a time go test now and then fails with "context
# deadline exceeded" when the time ends during the minimizing of an input. For hours: FUZZTIME=1h
FUZZTIME ?= 2000x

# Packages whose tests jail processes and look at all others of the machine, for a way out of the jail or for
# what was left behind: nobody else's tests may run at the same time.
ALONE := internal/(jail|gateway|job)(/|$$$$)

# Programs built with the race detector sleep a second before they end; the tests start hundreds of them.
export GORACE := atexit_sleep_ms=0

.PHONY: help build demo run test test-unit test-integration fuzz bench images boot-test lint deps-build clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: deps-build ## Build static sshd, sidecar and imslocal into bin/
	CGO_ENABLED=0 go build $(STATIC) -ldflags '$(LDFLAGS)' -o bin/sshd ./cmd/sshd
	CGO_ENABLED=1 go build $(STATIC) -ldflags '$(LDFLAGS) -extldflags "-static"' -o bin/sidecar ./cmd/sidecar
	CGO_ENABLED=0 go build $(STATIC) -ldflags '$(LDFLAGS)' -o bin/imslocal ./cmd/imslocal

demo: build ## Run a whole customize job unattended on a real Debian image (JAIL=false, IMAGE=file)
	@scripts/deps.sh demo
	@JAIL='$(JAIL)' IMAGE='$(IMAGE)' scripts/demo.sh

run: build ## Start a customize job and wait for you to log in (KEY=id.pub, JAIL=false, IMAGE=file, PORT=n)
	@scripts/deps.sh demo
	@JAIL='$(JAIL)' IMAGE='$(IMAGE)' KEY='$(KEY)' PORT='$(PORT)' scripts/run.sh

test: build ## Run everything: unit, fuzz seeds, integration with real tools (installs what it needs; root)
	@scripts/deps.sh demo test
	$(MAKE) --no-print-directory lint test-unit fuzz test-integration

test-unit: deps-build ## Package tests with the race detector (root adds the tests that need it)
	go test -race -timeout 30m $(GOTESTFLAGS) $$(go list ./cmd/... ./internal/... | grep -vE '$(ALONE)')
	go test -race -timeout 30m -p 1 $(GOTESTFLAGS) $$(go list ./internal/... | grep -E '$(ALONE)')

test-integration: build ## Black-box tests of the built binaries with real clients, mounts and pods
	@scripts/deps.sh demo test
	IMS_BUILDENV_BIN=$(CURDIR)/bin go test -p 1 -count=1 -timeout 30m $(GOTESTFLAGS) ./integration/...
	@# In two processes: a child on its way to exec(2) shares its parent's descriptors, and keeps overlays busy.
	go test -count=1 -timeout 60m -run DeltaEdits ./internal/squash -edits $(EDITS) & other=$$!; failed=0; \
	go test -count=1 -timeout 60m -run LayersEdits ./internal/squash -edits $(EDITS) || failed=1; \
	wait $$other || failed=1; exit $$failed

fuzz: deps-build ## Run each fuzz target for FUZZTIME (default 2000x)
	@scripts/fuzz.sh $(FUZZTIME)

bench: build ## Compare side by side with the tools a user would pick instead
	@scripts/deps.sh demo test
	@bench/run.sh

images: build ## Build both container images with podman (base from debootstrap)
	@scripts/deps.sh demo images
	@images/build.sh

boot-test: build ## Boot an image with its own kernel and initrd in QEMU, about a minute (IMAGE=file)
	@scripts/deps.sh demo boot
	@scripts/boot-test.sh $(IMAGE)

lint: deps-build ## gofmt, go vet, staticcheck
	@scripts/lint.sh

deps-build:
	@scripts/deps.sh build

clean: ## Remove bin/ and build/
	rm -rf bin build
