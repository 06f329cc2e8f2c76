#!/usr/bin/env bash
# Makes the environment with the test extras and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
source launch/env.sh
exec .venv/bin/python -m pytest "$@"
