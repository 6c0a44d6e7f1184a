#!/usr/bin/env bash
# Prepares the interpreter that runs programs of a model and compares formulas: finds a CPython 3.12 and installs sympy and
# mpmath for it, checked against pinned SHA-256 sums, into a folder of its own in the user's cache. Finished work is reused.
#
#   setup-evaluator.sh [FOLDER]
set -euo pipefail

sympy_version=1.14.0
mpmath_version=1.3.0
requirements="sympy==$sympy_version --hash=sha256:e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
mpmath==$mpmath_version --hash=sha256:a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c"

say() { printf 'evaluator: %s\n' "$*" >&2; }
die() { printf 'evaluator: error: %s\n' "$*" >&2; exit 1; }

# Whether $1 is a CPython 3.12 that runs: a pyenv shim may exist without one behind it.
is_python_312() {
    [ -n "$1" ] && "$1" -I -S -c 'import sys; sys.exit((sys.implementation.name, *sys.version_info[:2]) != ("cpython", 3, 12))' \
        </dev/null >/dev/null 2>&1
}

# Whether the modules that evaluators use can be imported: some builds of Python lack them.
is_complete() { "$1" -I -S -c 'import ctypes, resource, select, json, math' </dev/null >/dev/null 2>&1; }

candidates() {
    command -v python3.12 || true
    local pyenv="${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"
    # The newest first.
    find "$pyenv/versions" -maxdepth 3 -path '*/3.12.*/bin/python3.12' 2>/dev/null | sort -rV || true
    if command -v uv >/dev/null; then
        uv python find --no-python-downloads --offline 3.12 2>/dev/null || true
    fi
}

find_python() {
    local candidate
    while read -r candidate; do
        if is_python_312 "$candidate" && is_complete "$candidate"; then
            # The file itself, so that a shim or link that changes later changes nothing here.
            "$candidate" -I -S -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done < <(candidates)
    return 1
}

# Version of the sympy in a folder, as an evaluator would import it.
sympy_of() {
    "$1" -I -S -c 'import sys; sys.path.append(sys.argv[1]); import sympy; print(sympy.__version__)' "$2" 2>/dev/null
}

# The file `python` is written last, so its presence means that the folder is complete; files that a loss of power emptied are not.
is_ready() {
    local known
    [ -f "$root/python" ] && known=$(cat "$root/python") && is_python_312 "$known" &&
        [ "$(sympy_of "$known" "$root/site")" = "$sympy_version" ]
}

# The packages are plain Python, so any pip can install them.
find_pip() {
    local candidate
    for candidate in "$python" python3 python; do
        if "$candidate" -m pip --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

main() {
    cache="${GRAIL_BUILD_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?set HOME, XDG_CACHE_HOME or GRAIL_BUILD_CACHE_DIR}/.cache}/grail-supervisor}"
    root="${1:-$cache/evaluator-$sympy_version}"

    if is_ready; then
        say "ready in $root (reused)"
        exit 0
    fi

    mkdir -p "$(dirname "$root")" || die "cannot create $(dirname "$root"); set GRAIL_BUILD_CACHE_DIR to a folder that can be written"
    # Two builds may run side by side: one installs, the other waits for it.
    exec 9>"$root.lock"
    flock 9
    if is_ready; then
        say "ready in $root (installed by another run)"
        exit 0
    fi

    python=$(find_python) || die "no CPython 3.12 that runs was found: neither python3.12 on PATH, nor in pyenv's versions, nor by uv." \
        "Install one (Debian, Ubuntu: apt install python3.12; pyenv install 3.12; uv python install 3.12) and run this again"
    say "using $python"

    staging=$(mktemp -d "$root.staging.XXXXXX")
    trap 'rm -rf "$staging"' EXIT
    # Others than who sets it up may run it, whatever his umask.
    umask 022
    chmod 755 "$staging"
    export PIP_ROOT_USER_ACTION=ignore
    printf '%s\n' "$requirements" >"$staging/requirements.txt"
    if pip=$(find_pip); then
        "$pip" -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps --no-compile --only-binary=:all: \
            --target "$staging/site" -r "$staging/requirements.txt" >&2 ||
            die "pip could not install sympy $sympy_version: check the network and pip's index settings, then run this again"
    elif command -v uv >/dev/null; then
        uv pip install --quiet --python "$python" --require-hashes --no-deps --only-binary=:all: --target "$staging/site" \
            -r "$staging/requirements.txt" >&2 ||
            die "uv could not install sympy $sympy_version: check the network and uv's index settings, then run this again"
    else
        die "neither pip nor uv is there to install sympy with; install one (for example the package python3-pip)"
    fi
    # Evaluators cannot write, so what they import must be compiled before.
    "$python" -I -S -m compileall -q "$staging/site" >&2 || die "$python could not compile sympy"
    found=$(sympy_of "$python" "$staging/site") || die "$python cannot import the sympy that was installed"
    [ "$found" = "$sympy_version" ] || die "sympy $found was installed, $sympy_version is needed"
    printf '%s\n' "$python" >"$staging/python"
    # What is there until now, if anything is, does not work; it is gone only when its successor is whole.
    if [ -e "$root" ]; then
        mv -T "$root" "$staging.old"
    fi
    # Its files before its name.
    sync -f "$staging"
    mv -T "$staging" "$root"
    trap - EXIT
    rm -rf "$staging.old"
    say "ready in $root (sympy $sympy_version, mpmath $mpmath_version)"
}

# One line, read whole before anything runs, and nothing to read for what it starts: this text may itself come from stdin.
main "$@" </dev/null
