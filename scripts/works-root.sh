#!/bin/bash
# works-root.sh DIR: make the Debian root that integration/works changes through the jail, unless it is there: the base image of the demo
# with the package managers and tools of several distributions, and small repositories of test packages in it.
set -euo pipefail
root=$1
made_of=$(find integration/works/testdata -type f -exec sha256sum {} + | sort | sha256sum)
[ "$(cat "$root/srv/done" 2>/dev/null)" = "$made_of" ] && exit 0
[ "$(id -u)" = 0 ] || { echo "making a Debian root needs root" >&2; exit 1; }
scripts/base-image.sh build/base/bookworm.squashfs

mkdir -p "$(dirname "$root")"
work=$(mktemp -d "$(dirname "$root")/root.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
echo "works: adding packages to a Debian root (once, one to two minutes) ..." >&2
bin/sidecar unpack build/base/bookworm.squashfs "$work" >"$work.log" 2>&1
cp -r integration/works/testdata "$work/srv/works"
cp --remove-destination /etc/resolv.conf "$work/etc/resolv.conf"

inside='set -e
mount --bind "$0" "$0"; cd "$0"; mount -t proc proc proc; mount --rbind /dev dev
exec chroot . /bin/bash -e /srv/works/install.sh'
if ! unshare --mount --pid --fork --kill-child --propagation private bash -c "$inside" "$work" >>"$work.log" 2>&1; then
    tail -n 20 "$work.log" >&2
    echo "works: could not install into $work: is a Debian mirror reachable?" >&2
    exit 1
fi
rm -rf "$root"
echo "$made_of" > "$work/srv/done"
mv "$work" "$root"
mv "$work.log" "$root.log"
