#!/bin/bash
# deps.sh GROUP...: install what a group of targets needs, if it is missing (Debian, root).
# Groups: build, demo, test, images, boot.
set -euo pipefail

build=(gcc libc6-dev libdeflate-dev libzstd-dev liblzma-dev liblz4-dev)
demo=(debootstrap openssh-client ca-certificates curl)
test=(squashfs-tools squashfs-tools-ng busybox-static openssh-server rsync attr libcap2-bin tmux
      python3-paramiko python3-asyncssh dropbear-bin putty-tools lftp git ansible-core cpio iproute2 sshfs fuse3 xz-utils zstd
      asciinema rpm db5.3-util chromium ssh-audit xfsprogs)
images=(podman runc catatonit qemu-user-static)
boot=(qemu-system-x86 busybox-static)

want=()
for group in "$@"; do
    case $group in
    build)  want+=("${build[@]}") ;;
    demo)   want+=("${demo[@]}") ;;
    test)   want+=("${test[@]}" "${images[@]}") ;;
    images) want+=("${images[@]}") ;;
    boot)   want+=("${boot[@]}") ;;
    *) echo "deps.sh: unknown group $group" >&2; exit 2 ;;
    esac
done

missing=()
for package in "${want[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "missing packages: ${missing[*]}: run as root: apt-get install -y --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    echo "installing ${missing[*]}" >&2
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "could not install ${missing[*]}: is a Debian mirror reachable? Full log: $log" >&2
        exit 1
    fi
    rm -f "$log"
fi
command -v go >/dev/null || { echo "Go is not on the PATH: install Go $(awk '/^go /{print $2}' go.mod) or newer" >&2; exit 1; }
