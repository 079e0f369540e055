#!/bin/bash
# compare-images.sh OLD NEW: mount two SquashFS images with the kernel and list what differs.
# Run it in a mount namespace of its own (unshare --mount): the mounts end with it.
set -euo pipefail
old=$1 new=$2
dir=$(mktemp -d)
mount -t tmpfs -o mode=700 none "$dir"
trap 'umount -R "$dir"; rmdir "$dir"' EXIT
mkdir "$dir/old" "$dir/new"
mount -t squashfs -o loop,ro "$old" "$dir/old"
mount -t squashfs -o loop,ro "$new" "$dir/new"
list() { (cd "$1" && find . -mindepth 1 -printf '%P\t%y %m %U:%G %s %T@ %l\n' | LC_ALL=C sort); }
list "$dir/old" > "$dir/old.list"
list "$dir/new" > "$dir/new.list"
LC_ALL=C awk -F '\t' '
    NR == FNR { old[$1] = $2; next }
    !($1 in old) { print "  added    " $1; added++; next }
    old[$1] != $2 { if (substr($2, 1, 1) != "d") { print "  changed  " $1; changed++ } }
    { delete old[$1] }
    END {
        for (path in old) { print "  removed  " path; removed++ }
        printf "%d added, %d changed, %d removed\n", added, changed, removed
    }' "$dir/old.list" "$dir/new.list" > "$dir/changes"
lines=$(wc -l < "$dir/changes")
if [ "$lines" -le 41 ]; then cat "$dir/changes"; else
    head -n 30 "$dir/changes"; echo "  ... and $((lines - 31)) more"; tail -n 1 "$dir/changes"
fi
