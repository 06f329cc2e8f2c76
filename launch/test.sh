#!/usr/bin/env bash
# Makes the environment with the test extras and runs the tests, a file on every core; arguments go to pytest (-n 0: one
# after the other, in one process).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
source launch/env.sh
exec .venv/bin/python -m pytest -n auto --maxprocesses=8 --dist=loadfile "$@"
