#!/usr/bin/env bash
# Brings the CPU part of libtorch 2.11.0 (from the torch wheel that SGLang 0.5.16 pins) into the user's cache, once, and links
# it into the repository as .libtorch, where .cargo/config.toml looks for it. Finished files are reused; every wheel is
# checked against a pinned SHA-256 before it is opened. docs/libtorch.md says what is kept, and why.
set -euo pipefail

torch_version=2.11.0
wheels=(
    "torch==${torch_version} 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a"
    "nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"
    "nvidia-cuda-cupti==13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"
)
needed_mib=2200

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache="${GRAIL_BUILD_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/grail-supervisor}"
root="$cache/libtorch-${torch_version}"
link="$repository/.libtorch"

say() { printf 'libtorch: %s\n' "$*" >&2; }
die() { printf 'libtorch: error: %s\n' "$*" >&2; exit 1; }

link_into_repository() {
    if [ -e "$link" ] && [ ! -L "$link" ]; then
        die "$link exists and is not a link; move it away and run this again"
    fi
    ln -sfn "$root" "$link"
}

# The stamp is written last, so its presence means that the folder is complete.
if [ -f "$root/.complete" ]; then
    link_into_repository
    say "ready in $root (reused)"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "only Linux on x86_64 is supported, this is $(uname -s)-$(uname -m)"
command -v python3 >/dev/null || die "python3 is not on PATH; install Python 3 with pip"
python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip; install it (for example the package python3-pip)"
mkdir -p "$cache" || die "cannot create $cache; set GRAIL_BUILD_CACHE_DIR to a folder that can be written"

# Two builds may run side by side (CI and a shell): one fetches, the other waits for it.
exec 9>"$cache/libtorch.lock"
flock 9
if [ -f "$root/.complete" ]; then
    link_into_repository
    say "ready in $root (fetched by another run)"
    exit 0
fi

free_mib=$(df -Pm "$cache" | awk 'NR==2{print $4}')
[ "$free_mib" -ge "$needed_mib" ] ||
    die "$cache has $free_mib MiB free, $needed_mib MiB are needed; free space or set GRAIL_BUILD_CACHE_DIR"

downloads="$cache/wheels"
mkdir -p "$downloads"

wheel_of() { # NAME==VERSION -> path of its wheel, if it is there
    local name=${1%%==*} version=${1##*==}
    find "$downloads" -maxdepth 1 -name "${name//-/_}-${version}-*.whl" -print -quit
}

sha256_of() { sha256sum "$1" | cut -d' ' -f1; }

for entry in "${wheels[@]}"; do
    read -r requirement expected <<<"$entry"
    file=$(wheel_of "$requirement")
    if [ -n "$file" ] && [ "$(sha256_of "$file")" != "$expected" ]; then
        say "${file##*/} is damaged or incomplete; fetching it again"
        rm -f "$file"
        file=
    fi
    if [ -z "$file" ]; then
        say "fetching $requirement"
        # One fixed CPython tag, whatever Python runs pip, so that the checksum holds everywhere.
        python3 -m pip download --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 \
            --disable-pip-version-check -d "$downloads" "$requirement" >&2 ||
            die "pip could not download $requirement: check the network and pip's index settings, then run this again (finished files are kept)"
        file=$(wheel_of "$requirement")
        [ -n "$file" ] || die "pip reported success, but no wheel of $requirement is in $downloads"
    fi
    actual=$(sha256_of "$file")
    [ "$actual" = "$expected" ] || die "${file##*/} has SHA-256 $actual, expected $expected; delete it and run this again"
done

say "unpacking"
staging=$(mktemp -d "$cache/libtorch-staging.XXXXXX")
# Other users may run what is built with it.
chmod 755 "$staging"
trap 'rm -rf "$staging"' EXIT
python3 - "$staging" "$(wheel_of "torch==${torch_version}")" "$(wheel_of nvidia-cuda-runtime==13.0.96)" "$(wheel_of nvidia-cuda-cupti==13.0.85)" <<'PYTHON'
import os, shutil, sys, zipfile

staging, *wheels = sys.argv[1:]
LIBRARIES = {
    "torch/lib/libtorch_cpu.so", "torch/lib/libtorch.so", "torch/lib/libc10.so", "torch/lib/libgomp.so.1",
    # libtorch_cpu.so needs these two even without a GPU and finds them by its own RPATH.
    "nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13",
}
found = set()
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            header = name.startswith("torch/include/") and not name.endswith("/")
            if not (header or name in LIBRARIES or name == "torch/version.py"):
                continue
            found.add(name)
            target = os.path.join(staging, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
missing = LIBRARIES - found
if missing:
    sys.exit(f"the wheels lack {sorted(missing)}")
PYTHON
touch "$staging/.complete"
rm -rf "$root"
mv "$staging" "$root"
trap - EXIT
link_into_repository
say "ready in $root ($(du -sm "$root" | cut -f1) MiB)"
