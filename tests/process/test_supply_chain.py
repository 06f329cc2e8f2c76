"""What is installed beside the package: nothing broken, every version pinned as documented, every
licence told."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from common import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = [
  Requirement(line)
  for line in (ROOT / "launch/constraints.txt").read_text().splitlines()
  if line and line[0] != "#"
]
DIRECT = [
  Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
]


def licence(name: str) -> str:
  """As the package declares it: the expression, else the classifier, else the first line of the
  text."""
  about = importlib.metadata.metadata(name)
  classifiers = [
    x.rpartition(" :: ")[2] for x in about.get_all("Classifier", []) if x.startswith("License")
  ]
  return (
    about.get("License-Expression")
    or (classifiers or (about.get("License") or "unknown").splitlines())[0]
  )


def test_nothing_installed_is_broken():
  done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_constraints_are_what_is_installed_and_pin_every_direct_dependency():
  """On both lines of Python; no hash and no index, so that a folder of wheels serves as well."""

  def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()

  for line in PINNED:
    assert [one.operator for one in line.specifier] == ["=="], line
    if line.marker is None or line.marker.evaluate():
      assert importlib.metadata.version(line.name) in line.specifier, line
  for version in ("3.11", "3.12"):
    applying = {
      canonical(line.name)
      for line in PINNED
      if line.marker is None or line.marker.evaluate({"python_version": version})
    }
    assert {canonical(line.name) for line in DIRECT} <= applying, version


@pytest.mark.parametrize("name", [line.name for line in DIRECT])
def test_licences_are_told(name):
  assert f"| {name} | {licence(name)} |" in (ROOT / "docs/reliability.md").read_text()
