#!/bin/bash
# debian-root.sh DIR PACKAGES: make a minimal bookworm root in DIR with debootstrap.
#
# PACKAGES is a comma-separated list. The mirror is the one this machine's apt uses, else debootstrap's
# default; its log is DIR.log.
set -euo pipefail
root=$1
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 2>/dev/null | head -n 1 || true)
# A mount and a PID namespace of its own: what debootstrap mounts or starts ends with it.
if ! unshare --mount --pid --fork --kill-child --mount-proc --propagation private \
    debootstrap --variant=minbase --include="$2" bookworm "$root" $mirror >"$root.log" 2>&1; then
    tail -n 20 "$root.log" >&2
    echo "debootstrap could not build $root: is a Debian mirror reachable?" >&2
    exit 1
fi
rm -rf "$root/var/cache/apt/archives/"*.deb
