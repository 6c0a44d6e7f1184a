#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine with one GPU and a python3 that has torch 2.11.0+cu130 and transformers.
#
#   deploy/gpu/all.sh pack                     where Rust is: builds what the others run, into target/gpu
#   deploy/gpu/all.sh [STEP …]                 on the GPU's machine, which needs the repository with target/gpu and no Rust
#
#   correctness   the tests that need a GPU, then proofs against transformers: golden and demo models, 1.5B and 7B shapes   8 min
#   kernels       each kernel by itself against torch and against the card's copying speed, attention, matrix products      1 min
#   profile       all cases of the 7B and 1.5B shapes with the baseline beside them, stages                                 5 min
#   reload        other weights at 7B and 1.5B: folders and changes, second copy and in place                               4 min
#   several       one worker on each of several GPUs, alone and together; only where there are several                       2 min
#   candidates    kernels that no worker uses yet against torch's: deploy/gpu/candidates                                    3 min
#
# Without a step all but the last two run. Each has a time limit and writes its results as it goes, to OUT (by default
# target/gpu-results): STEP.log, and numbers as JSON where a step has them. A step that fails or runs out of time does not keep the
# next from running; the last lines say what became of each. DEVICE=cpu runs small parts of correctness and profile on a CPU, to see
# that the programs run.
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
# Checkpoints of 15 GB are written and read: memory is faster than a disk, if there is enough of it.
if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 40000000 ] 2>/dev/null; then
    export TMPDIR=/dev/shm
fi

correctness() {
    if [ "$device" = cpu ]; then
        "$python" deploy/gpu/compare.py --worker "$worker" --device cpu --json "$out/correctness-small.json" \
            --models tests/vectors/models/qwen2-tied
        return
    fi
    local failed=0
    # One after the other: each makes tensors of real shapes.
    "$packed/model-tests" --ignored --test-threads 1 gpu_tests || failed=1
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-small.json" \
        --models tests/vectors/models/qwen* tests/vectors/models/llama* --trained deploy/demo/second || failed=1
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-1.5b.json" --shapes qwen2-1.5b || failed=1
    "$python" deploy/gpu/compare.py --worker "$worker" --json "$out/correctness-7b.json" --shapes qwen2-7b || failed=1
    return $failed
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
    GRAIL_BENCH_SCRATCH=${TMPDIR:-/tmp} deploy/bench-reload.sh "$device" "$(dirname "$worker")"
}

several() {
    "$python" deploy/gpu/several.py --worker "$worker" --json "$out/several.json"
}

candidates() {
    local failed=0
    "$python" deploy/gpu/candidates/gate_up_silu.py --budget 90 --json "$out/gate_up_silu.json" || failed=1
    "$python" deploy/gpu/candidates/attend.py --seconds 88 --out "$out" || failed=1
    return $failed
}

limit_of() {
    case $1 in
        correctness) echo 580 ;;
        kernels) echo 120 ;;
        profile) echo 420 ;;
        reload) echo 420 ;;
        several) echo 200 ;;
        candidates) echo 220 ;;
        *) return 1 ;;
    esac
}

if [ -n "${ALL_SH_STEP:-}" ]; then
    "$ALL_SH_STEP"
    exit
fi
steps=("$@")
[ $# -gt 0 ] || steps=(correctness kernels profile reload)
for step in "${steps[@]}"; do
    limit_of "$step" >/dev/null && continue
    echo "error: $step is no step: correctness, kernels, profile, reload, several, candidates or pack" >&2
    exit 2
done
summary=()
for step in "${steps[@]}"; do
    began=$SECONDS
    echo "== $step"
    # A process group of its own, so that a worker that hangs ends with its step.
    OUT=$out ALL_SH_STEP=$step timeout --kill-after 10 "${LIMIT:-$(limit_of "$step")}" bash "$root/deploy/gpu/all.sh" 2>&1 |
        tee "$out/$step.log"
    code=${PIPESTATUS[0]}
    summary+=("$step: exit code $code, $((SECONDS - began)) s")
done
printf '%s\n' "== done, results in $out" "${summary[@]}"
[[ "${summary[*]}" != *"exit code "[1-9]* ]]
