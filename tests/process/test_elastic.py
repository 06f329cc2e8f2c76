"""A run that changes its hosts and devices twice: 8 devices on 2 hosts, 4 on one, 8 on 2 again; the
same losses throughout."""

import jax
import numpy as np
import pytest

from common import tiny_flags
from hosts import launch
from mmcl_jax.training import checkpoint, metrics, restore

# Stops, with a checkpoint, after two steps of each start; without the flag it runs to its end.
PROGRAM = """
import sys
from mmcl_jax import cli, configuration, train

def main(argv):
  stops, *argv = argv
  config, flags = configuration.from_flags("mmcl train", "", argv, {"workdir": ""})
  try:
    train.train(config, flags.workdir, asked_to_stop=lambda: stops == "stop")
  except SystemExit as end:
    print("stopped with", end.code)

cli.run(main, sys.argv[1:], hosts=True)
"""


def flags(cohort, workdir):
  return [
    *tiny_flags(cohort.path, workdir),
    "--config.batch=8",
    "--config.every.save=100",
    "--config.every.evaluate=100",
  ]


def test_hosts_and_devices_may_change_twice(cohort, tmp_path):
  [(status, _, err)] = launch(PROGRAM, 1, 8, "run", *flags(cohort, tmp_path / "straight"))
  assert status == 0, err[-2000:]
  for hosts, devices, what in ((2, 4, "stop"), (1, 4, "stop"), (2, 4, "run")):
    for status, out, err in launch(
      PROGRAM, hosts, devices, what, *flags(cohort, tmp_path / "elastic")
    ):
      assert status == 0, err[-2000:]
      assert ("stopped with 75" in out) == (what == "stop")
  assert checkpoint.manifest(str(tmp_path / "elastic"), 6)["devices"] == 8
  straight, elastic = (
    [(r["step"], r["loss"]) for r in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in r]
    for name in ("straight", "elastic")
  )
  assert [step for step, _ in elastic] == [1, 2, 3, 4, 5, 6]
  assert elastic == [(step, pytest.approx(loss, rel=2e-4)) for step, loss in straight]
  # Another batch in any step would show: no two steps have losses as near to each other.
  assert min(abs(a - b) for (_, a), (_, b) in zip(straight, straight[1:])) > 2e-3
  one, other = (restore.load_run(str(tmp_path / name)).state for name in ("straight", "elastic"))
  worst = max(
    float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(s.params)) for s in (one, other)))
  )
  assert worst < 5e-3  # Adam's first steps are as long for a tiny gradient as for a large one
