"""What the documents show works as it stands there."""

import ast
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys

import numpy as np

from conftest import ROOT
from mmcl_jax.data import cohort as cohort_room, schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg


def test_the_source_of_one_s_own_in_your_data(tmp_path):
  """The 20 lines of docs/your_data.md, as a module in the current folder, by the command beneath
  them."""
  text = (ROOT / "docs/your_data.md").read_text()
  code, command = re.search(
    r"```python\n(.*?)```\n\n```bash\nmmcl prepare (my_source.*?)\n", text, re.DOTALL
  ).groups()
  (tmp_path / "my_source.py").write_text(code)
  (tmp_path / "npz").mkdir()
  for i in range(30):
    ecg = np.repeat(synthetic.subject(5, i)["ecg"], 2, axis=1)  # 1,000 Hz
    if i == 4:
      ecg[6] = 0.25
    np.savez(tmp_path / f"npz/DEMO{i:04d}.npz", LVEF=50 + i, **dict(zip(schema.LEADS, ecg)))
  (tmp_path / "cohort.private").mkdir()
  # of 30 people a salt drawn anew leaves val empty once in 24 runs
  (tmp_path / "cohort.private/salt").write_text("5" * 64)
  arguments = command.replace("/data/npz", "npz").split() + ["--processes=2"]
  done = subprocess.run(
    [sys.executable, "-m", "mmcl_jax.prepare", *arguments],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  cohort = cohort_room.load(str(tmp_path / "cohort"))
  found = {float(r["phenotypes"][0]): r for source in cohort.splits.values() for r in source}
  assert sorted(found) == [50 + i for i in range(30) if i != 4]
  wanted = preprocess_ecg.normalise(synthetic.subject(5, 7)["ecg"], "minimal")
  ecg = found[57]["ecg"] * found[57]["ecg_scale"]
  assert np.corrcoef(ecg.ravel(), wanted.ravel())[0, 1] > 0.99
  quality = (tmp_path / "cohort/quality.json").read_text()
  assert "flat lead V1" in quality and "DEMO" not in quality + done.stdout + done.stderr


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
