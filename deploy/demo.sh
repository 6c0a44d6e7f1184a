#!/usr/bin/env bash
# The embedded default from start to verdict. For gsm8k: mines two windows with a checkpoint roll in between, verifies both as a
# validator would, shows that old weights do not pass for new ones, and says where the files are. For another environment: mines
# one window of it and verifies that. Exit status 0 means that all of it held.
#
#   deploy/demo.sh [gsm8k|mbpp|humaneval|math]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

supervisor=target/release/grail-supervisor
environment=${1:-gsm8k}

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'demo: error: %s\n' "$*" >&2; exit 1; }

case $environment in
gsm8k) state="$PWD/target/demo" windows=2 ;;
mbpp | humaneval | math) state="$PWD/target/demo-$environment" windows=1 ;;
*) fail "ENV=$environment: gsm8k, mbpp, humaneval and math are there" ;;
esac

rm -rf "$state"
mkdir -p "$state"

say "mine $windows window(s) of $environment (simulated chain, two proof workers on the CPU, built-in generation server)"
[ "$environment" != math ] || say "the problems of math are a stand-in: made up, in the true numbers, since no package may ship the real ones"
"$supervisor" mine --local --env "$environment" --windows "$windows" --state-dir "$state"

say "verify"
"$supervisor" verify --local --state-dir "$state" --json >"$state/verify.json" || fail "a window does not verify; see $state/verify.json"
python3 deploy/demo_report.py "$state" "$supervisor" "$environment"

left=$(pgrep -f -- "$state" || true)
[ -z "$left" ] || fail "processes are left: $left"
say "done; everything is in $state"
