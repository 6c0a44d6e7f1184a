#!/usr/bin/env bash
# The embedded default from start to verdict: mines two windows with a checkpoint roll in between, verifies both as a validator
# would, shows that old weights do not pass for new ones, and says where the files are. Exit status 0 means that all of it held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

supervisor=target/release/grail-supervisor
state="$PWD/target/demo"

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'demo: error: %s\n' "$*" >&2; exit 1; }

rm -rf "$state"
mkdir -p "$state"

say "mine two windows (simulated chain, two proof workers on the CPU, built-in generation server)"
"$supervisor" mine --local --windows 2 --state-dir "$state"

say "verify both"
"$supervisor" verify --local --state-dir "$state" --json >"$state/verify.json" || fail "a window does not verify; see $state/verify.json"
python3 deploy/demo_report.py "$state" "$supervisor"

left=$(pgrep -f -- "$state" || true)
[ -z "$left" ] || fail "processes are left: $left"
say "done; everything is in $state"
