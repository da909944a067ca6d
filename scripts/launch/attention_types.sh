#!/usr/bin/env bash
# One run of each attention type on the same tokens, full attention first as the baseline of the others, and the
# comparisons: scripts/launch/attention_types.sh [OVERRIDE ...], as in
#   SIEVE_BOOKS=books scripts/launch/attention_types.sh experiment=twin-gpu data=books steps=150 name=small
# A name= override is the stem of the runs' names (default: types).
set -euo pipefail
stem=types
overrides=()
for argument in "$@"; do
    case $argument in
        name=*) stem=${argument#name=} ;;
        *) overrides+=("$argument") ;;
    esac
done
command -v sieve >/dev/null || sieve() { python3 -c 'import sys; from sieve.train.cli import main; sys.exit(main())' "$@"; }
sieve train "${overrides[@]}" attention=full name="$stem-full"
for type in nsa window; do
    sieve train "${overrides[@]}" attention=$type name="$stem-$type" baseline="$stem-full"
    sieve compare "runs/$stem-$type" "runs/$stem-full"
done
