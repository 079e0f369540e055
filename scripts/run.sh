#!/bin/bash
# run.sh: a customize job for a person: prints the ssh line to paste, follows the job.
#
# Environment: KEY=public key (default: yours from ~/.ssh, else one made under build/), JAIL, IMAGE, PORT.
set -euo pipefail
cd "$(dirname "$0")/.."
jail=${JAIL:-true}
image=${IMAGE:-build/base/bookworm.squashfs}
[ -n "${IMAGE:-}" ] || scripts/base-image.sh "$image"
key=${KEY:-}
if [ -z "$key" ]; then
    for name in id_ed25519 id_ecdsa id_rsa; do
        if [ -r "$HOME/.ssh/$name.pub" ]; then key=$HOME/.ssh/$name.pub; break; fi
    done
fi
if [ -z "$key" ]; then
    key=build/id_ed25519.pub
    [ -r "$key" ] || ssh-keygen -q -t ed25519 -N '' -C ims-buildenv -f "${key%.pub}"
    echo "no key in ~/.ssh: log in with -i $PWD/${key%.pub}"
fi
exec bin/imslocal run --image "$image" --key "$key" --jail="$jail" ${PORT:+--port "$PORT"} \
    --output build/customized.squashfs
