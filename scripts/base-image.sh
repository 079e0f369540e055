#!/bin/bash
# base-image.sh OUTPUT [PACKAGES]: build the Debian base image of the demo once and keep it.
#
# A bookworm root made by debootstrap, with a kernel and an initrd in /boot, packed by our own
# SquashFS writer; PACKAGES, with commas between them, come on top. The mirror is the one this machine's apt uses, else debootstrap's default.
set -euo pipefail
output=$1
[ -s "$output" ] && exit 0
[ "$(id -u)" = 0 ] || { echo "building the base image needs root (debootstrap)" >&2; exit 1; }

mkdir -p "$(dirname "$output")"
work=$(mktemp -d "$(dirname "$output")/base.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "base image: building a Debian root (once, about a minute) ..." >&2
scripts/debian-root.sh "$work/root" \
    linux-image-cloud-amd64,initramfs-tools,live-boot,openssh-client,python3-minimal"${2:+,$2}"
for name in vmlinuz:vmlinuz- initrd:initrd.img-; do
    file=$(cd "$work/root/boot" && ls -v -- "${name#*:}"* | tail -n 1)
    ln -sf "$file" "$work/root/boot/${name%%:*}"
done
bin/sidecar pack "$work/root" "$work/image.squashfs" >&2
mv "$work/image.squashfs" "$output"
echo "base image: $output ($(du -h --apparent-size "$output" | cut -f1))" >&2
