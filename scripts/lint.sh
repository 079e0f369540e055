#!/bin/bash
# lint.sh: the gate every commit passes: gofmt, go vet, staticcheck.
set -euo pipefail
unformatted=$(gofmt -l cmd internal integration bench)
[ -z "$unformatted" ] || { echo "gofmt these files: $unformatted" >&2; exit 1; }
go vet ./...
go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
bash -n scripts/*.sh images/*.sh bench/*.sh
