#!/bin/bash
# boot-test.sh [IMAGE]: boot an image in QEMU (software emulation, about a minute) with its own kernel and initrd.
#
# The initrd's live-boot fetches the root file system over HTTP, as a compute node does, and mounts it; a shell
# from it then says what it sees on the console. IMAGE needs /boot/vmlinuz, /boot/initrd and live-boot;
# the default is the base image of the demo, made by our own packer.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-build/base/bookworm.squashfs}
[ $# -gt 0 ] || scripts/base-image.sh "$image"

work=$(mktemp -d)
server=
cleanup() {
    trap - EXIT INT TERM
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bin/sidecar unpack "$image" "$work/root" >/dev/null 2>&1
mkdir "$work/www"
cp "$image" "$work/www/filesystem.squashfs"
for port in $(shuf -i 20000-32000 -n 10); do
    busybox httpd -f -p "127.0.0.1:$port" -h "$work/www" 2>/dev/null &
    server=$!
    sleep 0.5
    kill -0 "$server" 2>/dev/null && break
    server=
done
[ -n "$server" ] || { echo "boot-test: no free port for the HTTP server" >&2; exit 1; }

# The kernel splits its command line at spaces, so the script has none.
script='echo${IFS}IMAGE${IFS}IS${IFS}UP;cat${IFS}/proc/version;grep${IFS}squashfs${IFS}/proc/mounts;sync;echo${IFS}o>/proc/sysrq-trigger;sleep${IFS}9'
echo "boot-test: booting $image ..."
timeout --foreground 300 qemu-system-x86_64 -accel tcg,thread=multi -smp 2 -m 2048 -nographic -no-reboot \
    -kernel "$work/root/boot/vmlinuz" -initrd "$work/root/boot/initrd" \
    -append "console=ttyS0 quiet panic=-1 boot=live ip=dhcp fetch=http://10.0.2.2:$port/filesystem.squashfs init=/bin/sh -- -c $script" \
    -netdev user,id=net -device virtio-net-pci,netdev=net </dev/null >"$work/console" 2>&1 || true
if ! grep -a -A 3 '^IMAGE IS UP' "$work/console" | tr -d '\r'; then
    tail -n 30 "$work/console" >&2
    echo "boot-test: the image did not come up; the console's end is above" >&2
    exit 1
fi
