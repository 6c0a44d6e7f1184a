#!/usr/bin/env bash
# Compiles the GPU kernels as a worker does, for every shape of shared/model/cuda/options.txt, on a machine without a GPU: fetches the
# compiler (NVRTC, 0.1 GB) into a folder of its own and prints what each kernel takes.
#
#   deploy/gpu/check-kernels.sh [ARGUMENTS of deploy/gpu/own_kernels.py check]
set -euo pipefail

folder=$(cd "$(dirname "$0")" && pwd)
# Of the CUDA line that torch 2.11.0+cu130 brings.
version=13.0.88
cache=${GRAIL_BUILD_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/grail-supervisor}/nvrtc-$version
if [ ! -x "$cache/bin/python3" ] || ! "$cache/bin/python3" -m pip --version >/dev/null 2>&1; then
    python3 -m venv "$cache"
fi
"$cache/bin/python3" -m pip install --quiet --disable-pip-version-check "nvidia-cuda-nvrtc==$version"
exec "$cache/bin/python3" "$folder/own_kernels.py" check "$@"
