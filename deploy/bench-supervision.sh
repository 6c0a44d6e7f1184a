#!/usr/bin/env bash
# Measures what supervision costs on this host: the restart of a CPU worker, and the supervisor's own CPU time while it is idle
# and while it mines a demo window. Prints one line a figure.
#
#   deploy/bench-supervision.sh [FOLDER WITH THE BINARIES, by default target/release]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
binaries=$(cd "${1:-$root/target/release}" && pwd)
for program in grail-supervisor grail-proof-worker grail-gen-launcher grail-builtin-server; do
    [ -x "$binaries/$program" ] || { echo "error: $binaries/$program is missing; run make build first" >&2; exit 1; }
done
exec python3 "$root/deploy/bench_supervision.py" "$binaries"
