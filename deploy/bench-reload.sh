#!/usr/bin/env bash
# Measures how long a proof worker takes to get other weights, and what requests in flight notice of it: from the checkpoint's folder
# and by changes, in a second copy and in place. Makes its own random checkpoints and removes them.
#
#   deploy/bench-reload.sh cpu  [FOLDER WITH THE BINARY, by default target/release]   1 GB in bfloat16, then 1 GB in float32
#   deploy/bench-reload.sh cuda [FOLDER WITH THE BINARY, by default target/release]   the 7B shape in bfloat16, then the 1.5B shape
#
# GRAIL_BENCH_SCRATCH names a folder for the checkpoints: 5 GB for cpu, 32 GB for cuda, which should be memory there.
# GRAIL_BENCH_REPEATS is how often each reload is measured: by default 5 times (cuda) or 3 times (cpu). If one of the two fails, the
# other is measured all the same, and the exit code is 1.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
device=${1:?write cpu or cuda}
worker=$(cd "${2:-$root/target/release}" && pwd)/grail-proof-worker
[ -x "$worker" ] || { echo "error: $worker is missing; run make build first" >&2; exit 1; }

case $device in
cpu) repeats=${GRAIL_BENCH_REPEATS:-3} ;;
cuda) repeats=${GRAIL_BENCH_REPEATS:-5} ;;
*)
    echo "error: $device is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
scratch=$(mktemp -d "${GRAIL_BENCH_SCRATCH:-${TMPDIR:-/tmp}}/grail-bench-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

failed=0
measure() {
    "$worker" profile-reload "$@" --repeats "$repeats" --scratch "$scratch" || failed=1
    # One that was killed left its checkpoints behind, and the next needs their room.
    rm -rf "$scratch"/grail-reload-*
}

if [ "$device" = cpu ]; then
    measure --shape qwen2-0.5b
    echo
    # Seven of the layers are 1 GB in float32.
    measure --shape qwen2-0.5b --layers 7 --file-dtype float32
else
    usual=(--device cuda:0 --changed 0.01 --prompt-tokens 200 --completion-tokens 800 --members 16)
    measure --shape qwen2-7b "${usual[@]}" --no-folder-in-place
    echo
    measure --shape qwen2-1.5b "${usual[@]}"
fi
exit $failed
