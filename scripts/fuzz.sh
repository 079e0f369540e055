#!/bin/bash
# fuzz.sh TIME: run every fuzz target of the module for TIME (2000x inputs, or e.g. 10m), one after the other.
set -euo pipefail
time=$1
grep -rlE '^func Fuzz[A-Za-z0-9_]*\(' --include='*_test.go' cmd internal | sort | while read -r file; do
    package=./$(dirname "$file")
    sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' "$file" | while read -r target; do
        echo "fuzz $package $target for $time"
        go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$package"
    done
done
