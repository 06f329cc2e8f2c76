"""What the documents show works as it stands there."""

import ast
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys

from common import ROOT


def test_the_walkthrough_prints_what_it_says(tmp_path, monkeypatch):
  """docs/walkthrough.md from top to bottom: bash blocks as a user runs them, Python blocks in one
  session."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  mmcl = tmp_path / "bin/mmcl"
  mmcl.parent.mkdir()
  mmcl.write_text(f'#!/bin/sh\nverb=$1; shift; exec {sys.executable} -m "mmcl_jax.$verb" "$@"\n')
  mmcl.chmod(0o755)
  env = os.environ | {"PATH": f"{mmcl.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
  blocks = re.findall(
    r"^```(bash|python|text)\n(.*?)^```$",
    (ROOT / "docs/walkthrough.md").read_text(),
    re.DOTALL | re.MULTILINE,
  )
  session, printed, compared = {}, "", 0
  for kind, block in blocks:
    if kind == "bash":
      done = subprocess.run(["bash", "-euc", block], capture_output=True, text=True, env=env)
      assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
      printed = done.stdout
    elif kind == "python":
      with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, "docs/walkthrough.md", "exec"), session)
      printed = out.getvalue()
    else:
      same = doctest.OutputChecker().check_output(
        block, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
      )
      assert same, f"the walkthrough says\n{block}\nand the block above it printed\n{printed}"
      compared += 1
  assert compared >= 5


def test_reported_faults_are_those_that_tests_hold():
  """Every fault that a test is marked with stands in docs/reported_faults.md beside that test, and
  no other."""
  marked = set()
  for file in (ROOT / "tests").rglob("test_*.py"):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {
      node.targets[0].id: node.value
      for node in nodes  # of faults that several tests share
      if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for function in nodes:
      for mark in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reported":
          faults = [
            names[fault.id] if isinstance(fault, ast.Name) else fault for fault in mark.args
          ]
          marked |= {
            (ast.literal_eval(fault), f"`{file.name}` `{function.name}`") for fault in faults
          }
  told = set()
  for line in (ROOT / "docs/reported_faults.md").read_text().splitlines():
    if line.startswith("| ") and line.count("`") >= 6:
      fault, _, tests = line.strip("| ").split(" | ")
      told |= {(fault.replace("\\$", "$"), test) for test in tests.split(", ")}
  assert marked == told
