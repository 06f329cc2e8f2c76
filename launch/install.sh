#!/usr/bin/env bash
# Makes .venv with the package and its pinned dependencies; does nothing where it is up to date.
#   bash launch/install.sh [EXTRA,...]      e.g. bash launch/install.sh test
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || {
  echo "mmcl: $("$python" --version) found; Python 3.11 to 3.14 is needed (set PYTHON=/path/to/python3.12)" >&2; exit 2; }
extras=${1:+[$1]}
stamp=.venv/installed
wanted=$("$python" --version; echo "$extras"; cat pyproject.toml launch/constraints.txt)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0
[ -x .venv/bin/python ] || "$python" -m venv .venv || {
  echo "mmcl: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
echo "installing into .venv (about 1.3 GB, one to three minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".$extras" 2> .venv/install.log || {
  cat .venv/install.log >&2; echo "mmcl: pip failed, its messages are above" >&2; exit 2; }
echo "$wanted" > "$stamp"
