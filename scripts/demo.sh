#!/bin/bash
# demo.sh: one whole customize job, unattended, with the tools a user has.
#
# Environment: JAIL=true|false, IMAGE=base.squashfs (default: a Debian image built once).
# Nothing is left running or mounted, also after Ctrl-C: imslocal keeps everything it starts in
# namespaces that end with it, and this script ends imslocal and removes its own directory.
set -euo pipefail
cd "$(dirname "$0")/.."
jail=${JAIL:-true}
image=${IMAGE:-build/base/bookworm.squashfs}
case $jail in
true)  flag=/tmp/complete;       root= ;;
false) flag=/mnt/image/complete; root=/mnt/image/image-root ;;
*) echo "JAIL=$jail: say true or false" >&2; exit 2 ;;
esac
[ "$(id -u)" = 0 ] || { echo "the demo needs root: it mounts the image it made" >&2; exit 1; }
[ -n "${IMAGE:-}" ] || scripts/base-image.sh "$image"

mkdir -p build
work=$(mktemp -d build/demo.XXXXXX)
pid=
cleanup() {
    trap - EXIT INT TERM
    if [ -n "$pid" ]; then
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }

say "Starting the IMS API, the S3 server and a customize job (jail: $jail)"
ssh-keygen -q -t ed25519 -N '' -C demo -f "$work/id"
bin/imslocal run --image "$image" --key "$work/id.pub" --jail="$jail" --name demo_image \
    --events "$work/events" --output "$work/new.squashfs" &
pid=$!

# The job says in its event file when a login works.
port=
until [ -n "$port" ]; do
    kill -0 "$pid" 2>/dev/null || { wait "$pid" || exit $?; exit 1; }
    sleep 0.2
    [ -e "$work/events" ] || continue
    port=$(sed -nE '/"status":"waiting_on_user"/s/.*"ssh_port":([0-9]+).*/\1/p' "$work/events" | head -n 1)
done
options=(-F /dev/null -i "$work/id" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no
    -o "UserKnownHostsFile=$work/known_hosts" -o LogLevel=ERROR -o BatchMode=yes)
ssh_() { ssh "${options[@]}" -p "$port" "$@"; }

say "ssh -p $port root@127.0.0.1: an exec"
ssh_ root@127.0.0.1 'id; echo "job $IMS_JOB_ID on $IMS_ARCH"; ls /'

say "A shell on a PTY"
ssh_ -tt root@127.0.0.1 <<EOF
stty -echo
tty; echo "shell \$0, TERM \$TERM"
mkdir -p $root/etc/demo && date -u > $root/etc/demo/customized-at
exit 0
EOF

say "sftp: put and get"
head -c 3000000 /dev/urandom > "$work/payload"
sftp -q "${options[@]}" -P "$port" -b - root@127.0.0.1 <<EOF
put $work/payload $root/opt/payload
get $root/opt/payload $work/payload.back
EOF
cmp "$work/payload" "$work/payload.back" && echo "3,000,000 bytes went there and back unchanged"

say "Installing a package in the image"
install='export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -y -qq --no-install-recommends tree'
if [ "$jail" = false ]; then install="chroot $root sh -c '$install'"; fi
if timeout 120 ssh "${options[@]}" -p "$port" root@127.0.0.1 "$install" </dev/null >"$work/install.log" 2>&1; then
    tail -n 2 "$work/install.log"
else
    echo "no package could be installed (no apt in the image, or no mirror reachable); dropping a file instead"
    ssh_ root@127.0.0.1 "echo 'dropped by the demo' > $root/etc/demo/no-package"
fi

say "touch $flag"
ssh_ root@127.0.0.1 "touch $flag"
wait "$pid" || { code=$?; pid=; exit "$code"; }
pid=

say "Mounting the new image with the kernel; what changed against the base"
unshare --mount --propagation private scripts/compare-images.sh "$image" "$work/new.squashfs"
