#!/usr/bin/env bash
# The first losses of NSA by its Triton kernels beside those by plain PyTorch, on the same tokens and initial weights, one
# row a step, for each row length: LENGTHS="8192 16384" scripts/launch/kernel_losses.sh [OVERRIDE ...], as in
#   SIEVE_BOOKS=books scripts/launch/kernel_losses.sh model=small data=books tokenizer=bpe32k dtype=bf16 steps=50
# The runs of a length share the GPU; IMPLS names the implementations (default: triton reference; sdpa, plain PyTorch through
# fused attention under masks, takes less time where rows are long). Each pair is compared in
# runs/kernels-LENGTH-IMPL/report.
set -euo pipefail
command -v sieve >/dev/null || sieve() { python3 -c 'import sys; from sieve.train.cli import main; sys.exit(main())' "$@"; }
read -ra impls <<<"${IMPLS:-triton reference}"
for length in ${LENGTHS:-8192 16384 32768}; do
    jobs=()
    for impl in "${impls[@]}"; do
        sieve train "$@" attention=nsa attention.impl="$impl" seq_len="$length" global_batch=1 micro_batch=1 \
            log.every=1 eval=none logger=none checkpoint.every=0 resume=never name="kernels-$length-$impl" \
            >"kernels-$length-$impl.log" 2>&1 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    for impl in "${impls[@]:1}"; do
        sieve compare "runs/kernels-$length-${impls[0]}" "runs/kernels-$length-$impl"
    done
done
