#!/usr/bin/env bash
# Builds the documentation site into site/, from an environment of its own, .venv-docs; arguments go to mkdocs.
#   bash launch/docs.sh            builds it; a broken link is an error
#   bash launch/docs.sh serve      shows it on http://localhost:8000 while you write
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv-docs/bin/mkdocs ] || {
  "${PYTHON:-python3}" -m venv .venv-docs
  wanted='import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))'
  .venv-docs/bin/python -c "$wanted" > .venv-docs/requirements.txt
  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
}
export NO_MKDOCS_2_WARNING=1 PATH="$PWD/.venv-docs/bin:$PATH"
[ $# -gt 0 ] || set -- build --strict
exec .venv-docs/bin/mkdocs "$@"
