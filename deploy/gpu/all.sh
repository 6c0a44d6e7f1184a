#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine with one GPU and a python3 that has torch 2.11.0+cu130 and transformers.
#
#   deploy/gpu/all.sh pack                     where Rust is: builds what the others run, into target/gpu
#   deploy/gpu/all.sh [STEP …]                 on the GPU's machine, which needs the repository with target/gpu and no Rust
#
#   correctness   the next three steps, one after the other                                                                 5 min
#   tests         the tests that need a GPU                                                                               0.5 min
#   shapes        proofs against transformers, random weights: 7B and 1.5B shapes                                           3 min
#   models        proofs against transformers: golden and demo models                                                     1.5 min
#   kernels       each kernel by itself against torch and against the card's copying speed, attention, matrix products      1 min
#   profile       all cases of the 7B and 1.5B shapes with the baseline beside them, stages                                 5 min
#   reload        other weights at 7B and 1.5B: folders and changes, second copy and in place                          5 to 9 min
#   several       one worker on each of several GPUs, alone and together; only where there are several                      3 min
#   attention     the attention kernel by itself against torch's                                                           1.5 min
#
# Without a step correctness, kernels, profile and reload run. Each has a time limit (LIMIT=SECONDS sets another) and writes its
# results as it goes, to OUT (by default target/gpu-results): STEP.log, and numbers as JSON where a step has them. A step that fails
# or runs out of time does not keep the next from running; the last lines say what became of each. Where a machine runs commands of
# at most ten minutes, give reload one of its own; GRAIL_BENCH_REPEATS=3 makes it a third shorter. DEVICE=cpu runs small parts of
# models and profile on a CPU, to see that the programs run.
#
# Checkpoints of up to 31 GB go to TMPDIR. Without one they go to /dev/shm if it has room for them, which root makes 80 GB large for
# this where it is smaller, and otherwise to /tmp.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
out=${OUT:-$root/target/gpu-results}
packed=$root/target/gpu
device=${DEVICE:-cuda}
python=${PYTHON:-python3}

pack() {
    set -e
    mkdir -p "$packed"
    # The packages that `make build` and `make test` build, so that nothing is compiled with other features again.
    cargo build --locked --release -p grail-supervisor -p grail-proof-worker -p grail-gen-launcher
    strip -o "$packed/grail-proof-worker" "${CARGO_TARGET_DIR:-target}/release/grail-proof-worker"
    tests=$(cargo test --locked --workspace --lib --no-run --message-format json |
        sed -n 's/.*"executable":"\([^"]*grail_model-[^"]*\)".*/\1/p' | tail -n 1)
    strip -o "$packed/model-tests" "$tests"
    ls -lh "$packed"
}

if [ "${1:-}" = pack ]; then
    pack
    exit
fi

worker=${WORKER:-$packed/grail-proof-worker}
[ -x "$worker" ] || { echo "error: $worker is missing; run deploy/gpu/all.sh pack where Rust is" >&2; exit 1; }
mkdir -p "$out"
# A machine without the repository's libtorch has one in its Python.
if [ ! -e .libtorch/torch/lib/libtorch_cpu.so ]; then
    torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') || exit 1
    export LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
# GRAIL_PROOF_KERNELS=off measures libtorch's operations instead.
export GRAIL_GOLDEN_DIR=$root/tests/vectors PYTHONUNBUFFERED=1 NO_COLOR=1

tests() {
    if [ "$device" = cpu ]; then
        echo "these tests need a GPU"
        return
    fi
    # One after the other: each makes tensors of real shapes.
    "$packed/model-tests" --ignored --test-threads 1 gpu_tests
}

shapes() {
    if [ "$device" = cpu ]; then
        echo "these shapes need a GPU"
        return
    fi
    local failed=0
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-7b.json" --shapes qwen2-7b || failed=1
    # A process that was killed left its checkpoint behind.
    rm -rf "${TMPDIR:?}"/grail-compare-*
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-1.5b.json" --shapes qwen2-1.5b || failed=1
    return $failed
}

models() {
    if [ "$device" = cpu ]; then
        "$python" deploy/gpu/compare.py --worker "$worker" --device cpu --json "$out/correctness-small.json" \
            --models tests/vectors/models/qwen2-tied
        return
    fi
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-small.json" \
        --models tests/vectors/models/qwen* tests/vectors/models/llama* --trained deploy/demo/second
}

kernels() {
    "$python" deploy/gpu/own_kernels.py time --json "$out/kernels.json"
}

profile() {
    if [ "$device" = cpu ]; then
        "$python" deploy/gpu/bench.py --worker "$worker" --device cpu --models qwen2-0.5b --rounds 1 --json "$out/profile.json"
        return
    fi
    "$python" deploy/gpu/bench.py --worker "$worker" --rounds 5 --minutes 2.5 --json "$out/profile.json"
}

reload() {
    local code warning="" kind
    kind=$(stat --file-system --format %T "$TMPDIR")
    [ "$kind" = tmpfs ] || warning="WARNING: THE CHECKPOINTS LIE ON A DISK ($TMPDIR, $kind): reading folders takes its time"
    [ -z "$warning" ] || echo "$warning"
    GRAIL_BENCH_SCRATCH=$TMPDIR deploy/bench-reload.sh "$device" "$(dirname "$worker")"
    code=$?
    [ -z "$warning" ] || echo "$warning"
    return $code
}

several() {
    "$python" deploy/gpu/several.py --worker "$worker" --json "$out/several.json"
}

attention() {
    # On a bare machine the first import takes long, and the script's watchdog would count it.
    "$python" -c 'import torch; torch.zeros(1, device="cuda")' || return 1
    "$python" deploy/gpu/attend.py --seconds 88 --out "$out"
}

limit_of() {
    case $1 in
        # Together 580.
        tests) echo 120 ;;
        shapes) echo 320 ;;
        models) echo 140 ;;
        kernels) echo 120 ;;
        profile) echo 420 ;;
        reload) echo 580 ;;
        several) echo 200 ;;
        attention) echo 150 ;;
        *) return 1 ;;
    esac
}

if [ -n "${ALL_SH_STEP:-}" ]; then
    "$ALL_SH_STEP"
    exit
fi
[ $# -gt 0 ] || set -- correctness kernels profile reload
steps=()
for step in "$@"; do
    if [ "$step" = correctness ]; then
        steps+=(tests shapes models)
    elif limit_of "$step" >/dev/null; then
        steps+=("$step")
    else
        echo "error: $step is no step; these are:" correctness tests shapes models kernels profile reload several attention >&2
        exit 2
    fi
done

# All that steps write for themselves lies in one folder: what a killed one left, even in an earlier run, goes before the next.
room() { df --output=avail --block-size 1M "$1" 2>/dev/null | tail -n 1; }
parent=${TMPDIR:-}
if [ -z "$parent" ]; then
    rm -rf /dev/shm/grail-gpu
    parent=/tmp
    case "$device ${steps[*]}" in
    # It is half as large as memory was when the machine started, which on some machines grows.
    cuda*shapes* | cuda*reload*)
        [ "$(room /dev/shm)" -ge 40000 ] 2>/dev/null || [ "$(id -u)" != 0 ] || mount -o remount,size=80g /dev/shm 2>/dev/null
        ;;
    esac
    # Memory is faster than a disk, if there is enough of it.
    [ "$(room /dev/shm)" -ge 40000 ] 2>/dev/null && parent=/dev/shm
fi
export TMPDIR=$parent/grail-gpu
trap 'rm -rf "$TMPDIR"' EXIT
cleared() { rm -rf "$TMPDIR" && mkdir -m 700 "$TMPDIR"; }
cleared || exit 1
echo "scratch folder: $TMPDIR, $(stat --file-system --format %T "$TMPDIR"), $(($(room "$TMPDIR") / 1024)) GiB free"

summary=()
for step in "${steps[@]}"; do
    cleared || exit 1
    began=$SECONDS limit=${LIMIT:-$(limit_of "$step")}
    echo "== $step"
    # A process group of its own, so that a worker that hangs ends with its step. Killed, not asked: timeout ends with the step's
    # shell, and what had not heeded the signal would hold the pipe, and the GPU.
    OUT=$out ALL_SH_STEP=$step timeout --signal KILL "$limit" bash "$root/deploy/gpu/all.sh" 2>&1 | tee "$out/$step.log"
    code=${PIPESTATUS[0]} took=$((SECONDS - began))
    [ "$took" -lt "$limit" ] && up="" || up=", its time was up"
    summary+=("$step: exit code $code, $took s$up")
done
printf '%s\n' "== done, results in $out" "${summary[@]}"
[[ "${summary[*]}" != *"exit code "[1-9]* ]]
