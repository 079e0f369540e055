#!/bin/bash
# build.sh: build localhost/ims-buildenv/{sshd,sidecar} with podman.
#
# No registry is asked: the base is a minimal Debian root made by debootstrap once and kept under build/.
# TAG (default: latest) names the images.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "building the images needs root (debootstrap, podman)" >&2; exit 1; }
tag=${TAG:-latest}
export CONTAINERS_CONF=$PWD/images/containers.conf
base=build/images/base.tar

if [ ! -s "$base" ]; then
    mkdir -p build/images
    work=$(mktemp -d build/images/base.XXXXXX)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo "images: building the Debian base (once) ..." >&2
    scripts/debian-root.sh "$work/root" ca-certificates,less,procps,rsync
    rm -rf "$work/root/var/lib/apt/lists/"*
    tar -C "$work/root" --numeric-owner -cf "$work/base.tar" .
    mv "$work/base.tar" "$base"
fi
podman import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    "$base" localhost/ims-buildenv/base:latest >/dev/null

# The legacy script names are links to the binaries, which know what they are called by.
context() { # context NAME BINARY TARGET LINK...
    local dir=build/images/$1 binary=$2 target=$3 link
    rm -rf "$dir"
    install -D -m 0755 "bin/$binary" "$dir/rootfs$target"
    shift 3
    for link in "$@"; do
        mkdir -p "$dir/rootfs$(dirname "$link")"
        ln -s "$target" "$dir/rootfs$link"
    done
}
context sshd sshd /usr/sbin/sshd /entrypoint.sh
context sidecar sidecar /usr/bin/sidecar \
    /scripts/prep-env.sh /scripts/buildenv-sidecar.sh /scripts/package_and_upload.sh
# To run the programs of aarch64 images.
[ "$(uname -m)" != x86_64 ] || install -D -m 0755 /usr/bin/qemu-aarch64-static build/images/sshd/rootfs/usr/bin/qemu-aarch64-static
for name in sshd sidecar; do
    podman build -q --isolation chroot -t "localhost/ims-buildenv/$name:$tag" \
        -f "images/$name/Containerfile" "build/images/$name"
done
