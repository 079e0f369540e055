#!/bin/bash
# run.sh [ARGUMENTS of bench]: build the base image if needed and compare on its tree.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/base-image.sh build/base/bookworm.squashfs
go run ./bench "$@"
