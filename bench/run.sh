#!/bin/bash
# run.sh [ARGUMENTS of bench]: build a Debian root of about 1.2 GiB if needed, which is kept in
# build/, and compare on its tree. The whole run takes most of an hour; -topics and -only pick comparisons.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/base-image.sh build/bench/root.squashfs \
    linux-image-amd64,systemd-sysv,gcc,g++,make,python3,perl,vim,locales,openssh-server,git,man-db,libicu-dev
go run ./bench -image build/bench/root.squashfs "$@"
