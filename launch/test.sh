#!/usr/bin/env bash
# Makes the environment with the test extras and runs the tests, a file on every core.
#   bash launch/test.sh        tests/unit (NumPy) and tests/jax (what compiles, and one run for all)
#   bash launch/test.sh all    tests/process and tests/fuzz too: runs trained for one test, every recipe, several
#                                processes, hosts and devices, kills, full disks
# Further arguments go to pytest (-n 0: one after the other, in one process).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
source launch/env.sh
[ "${1:-}" != all ] || set -- tests "${@:2}"
exec .venv/bin/python -m pytest -n auto --maxprocesses=8 --dist=loadfile "$@"
