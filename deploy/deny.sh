#!/usr/bin/env bash
# Bans, licences and sources always; advisories where their database can be fetched, else a printed skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.18.9
if ! command -v cargo-deny >/dev/null; then
    tools="${GRAIL_BUILD_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/grail-supervisor}/tools"
    export PATH="$tools/bin:$PATH"
    if ! command -v cargo-deny >/dev/null; then
        echo "deny: installing cargo-deny $version into $tools" >&2
        cargo install cargo-deny --locked --version "$version" --root "$tools"
    fi
fi
cargo deny --locked check bans licenses sources
# Where the advisory database cannot be reached, the check would say nothing about our dependencies.
if timeout 120 cargo deny --locked fetch db >/dev/null 2>&1; then
    cargo deny --locked check advisories
else
    echo "deny: advisories SKIPPED: the advisory database cannot be reached from here" >&2
fi
