#!/usr/bin/env bash
# Measures how long a proof worker takes to get other weights, and what requests in flight notice of it: from the checkpoint's folder
# and by changes, in a second copy and in place. Makes its own random checkpoints and removes them.
#
#   deploy/bench-reload.sh cpu  [FOLDER WITH THE BINARY, by default target/release]   1 GB in bfloat16, then 1 GB in float32
#   deploy/bench-reload.sh cuda [FOLDER WITH THE BINARY, by default target/release]   the 7B shape in bfloat16, then the 1.5B shape
#
# GRAIL_BENCH_SCRATCH names a folder for the checkpoints: 5 GB for cpu, 32 GB for cuda, which should be memory there.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
device=${1:?write cpu or cuda}
worker=$(cd "${2:-$root/target/release}" && pwd)/grail-proof-worker
[ -x "$worker" ] || { echo "error: $worker is missing; run make build first" >&2; exit 1; }
scratch=${GRAIL_BENCH_SCRATCH:-${TMPDIR:-/tmp}}

case $device in
cpu)
    "$worker" profile-reload --shape qwen2-0.5b --scratch "$scratch"
    echo
    # Seven of the layers are 1 GB in float32.
    "$worker" profile-reload --shape qwen2-0.5b --layers 7 --file-dtype float32 --scratch "$scratch"
    ;;
cuda)
    requests=(--prompt-tokens 200 --completion-tokens 800 --members 16)
    "$worker" profile-reload --shape qwen2-7b --device cuda:0 --changed 0.01 --repeats 5 --scratch "$scratch" \
        --no-folder-in-place "${requests[@]}"
    echo
    "$worker" profile-reload --shape qwen2-1.5b --device cuda:0 --changed 0.01 --repeats 5 --scratch "$scratch" "${requests[@]}"
    ;;
*)
    echo "error: $device is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
