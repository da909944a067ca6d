#!/usr/bin/env bash
# Needle maps of twins: makes recall text, trains full attention and NSA on it and on books (experiment=recall-8k), measures
# both, and keeps what is worth keeping in one flat folder:
#   SIEVE_BOOKS=books scripts/launch/recall_maps.sh KEEP [OVERRIDE of both trainings ...]
# KEEP gets maps.png (heat maps and loss curves), comparison.png and .json, full.json and nsa.json (`sieve eval`'s results),
# runs.tar.gz (metrics, configs, NSA's health) and log.txt, after every stage what there is by then. Stages have time limits; a
# training that meets its own saves, and is measured as it is. The text and the runs stay in the working directory, and the
# same command goes on from there: remove recall.jsonl for another text.
# Environment: DOCUMENTS, CHARS, FACTS, ASKED, QUOTED of the text; NEEDLE: overrides of the evaluation; TRAIN_LIMIT, EVAL_LIMIT:
# seconds of one; PYTHON.
set -uo pipefail
[ $# -ge 1 ] && [[ $1 != *=* ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit
keep=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
sieve=("$python" -c 'import sys; from sieve.train.cli import main; sys.exit(main())')
books=${SIEVE_BOOKS:-books}
export SIEVE_BOOKS=$books RECALL_TEXT=${RECALL_TEXT:-recall.jsonl}
lengths="needle.lengths=[1024,2048,4096,8192,16384] needle.depths=[0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1]"
read -ra needle <<<"${NEEDLE:-$lengths needle.samples=20 batch_tokens=65536}"
failed=()

# stage LIMIT NAME COMMAND ...: its output also into the log; told what it took; SIGTERM after LIMIT seconds.
stage() {
    local limit=$1 name=$2 start=$SECONDS status
    shift 2
    echo "== $name"
    timeout --foreground -k 30 "$limit" "$@"
    status=$?
    [ $status -eq 0 ] || failed+=("$name: exit code $status")
    echo "== $name: exit code $status after $((SECONDS - start)) s"
    collect
}

collect() {
    local type
    for type in full nsa; do
        [ -f runs/recall-$type/report/eval/results.json ] && cp runs/recall-$type/report/eval/results.json "$keep/$type.json"
    done
    cp runs/recall-nsa/report/comparison.png runs/recall-nsa/report/comparison.json "$keep" 2>/dev/null
    tar -czf "$keep/runs.tar.gz" --ignore-failed-read runs/recall-*/metrics.jsonl runs/recall-*/config.yaml \
        runs/recall-*/environment.json runs/recall-*/report 2>/dev/null
    return 0
}

main() {
    [ -s "$RECALL_TEXT" ] || stage 120 text "$python" -m sieve.scripts.recall_text "$RECALL_TEXT" \
        --documents "${DOCUMENTS:-50000}" --chars "${CHARS:-200-25500}" --facts "${FACTS:-100}" --asked "${ASKED:-3}" \
        --quoted "${QUOTED:-0.35}" --hay "$books"/books-train-*.jsonl.zst
    for type in full nsa; do
        stage "${TRAIN_LIMIT:-240}" "train $type" "${sieve[@]}" train experiment=recall-8k logger=none "$@" \
            attention=$type name=recall-$type
        stage "${EVAL_LIMIT:-120}" "eval $type" "${sieve[@]}" eval recall-$type suite=needle \
            "loss.source=[$books/books-valid.jsonl.zst]" "${needle[@]}"
    done
    stage 60 maps "$python" -m sieve.scripts.needle_maps "$keep/maps.png" runs/recall-full runs/recall-nsa
    stage 60 compare "${sieve[@]}" compare recall-nsa recall-full
    stage 60 health "${sieve[@]}" eval recall-nsa suite=health out=runs/recall-nsa/report/health \
        "loss.source=[$books/books-valid.jsonl.zst]"
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'failed: %s\n' "${failed[@]}"
        return 1
    fi
}

main "$@" 2>&1 | tee "$keep/log.txt"
