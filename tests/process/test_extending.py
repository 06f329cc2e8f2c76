"""The parts of docs/extending.md work as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import ROOT
from extending import SECTIONS, blocks, write

from ml_collections import ConfigDict

from mmcl_jax import augment, configuration, evaluate, objectives
from mmcl_jax.data import cohort as cohort_lib, schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.training import metrics, restore


def run(heading: str, folder, *more: str, **instead: str) -> subprocess.CompletedProcess:
  """Runs the command of a section in `folder`, with further flags and words in place of others."""
  (command,) = blocks(heading, "bash")
  for old, new in instead.items():
    command = command.replace(old, new)
  path, verb, *flags = re.match(r"PYTHONPATH=(\S+) mmcl (\w+) (.*)\n\Z", command).groups()
  done = subprocess.run(
    [sys.executable, "-m", f"mmcl_jax.{verb}", *shlex.split(*flags), *more],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": f"{path}:{ROOT}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done


@pytest.mark.parametrize("heading", SECTIONS)
def test_an_example_has_at_most_20_lines_of_code(heading):
  """Imports, comments, docstrings and blank lines aside."""
  for code in blocks(heading, "python"):
    code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
    lines = [line.strip() for line in code.splitlines()]
    kept = [line for line in lines if line and not re.match("#|import |from ", line)]
    assert len(kept) <= 20, code


def test_a_loss(tmp_path, cohort):
  write("A loss", tmp_path)
  flags = "--config.every.log=1", "--config.every.save=2", "--config.every.evaluate=2"
  run("A loss", tmp_path, *flags, **{":demo": ":test,steps=2", "=cohort": f"={cohort.path}"})
  log = metrics.read(tmp_path / "run/metrics.jsonl")
  assert all(record["spread/smallest_sd"] > 0 for record in log if "spread/smallest_sd" in record)
  assert all(0 <= record["spread"] < 1 for record in log if "spread" in record)
  assert any("spread/smallest_sd" in record for record in log)
  assert any("validation/spread" in record for record in log)


def test_the_loss_in_the_readme(tmp_path, monkeypatch):
  """Its modules are imported as a config imports them, and its values are NumPy's."""
  text = (ROOT / "README.md").read_text()
  for name, code in re.findall(r"`(my_\w+\.py)`.*?```python\n(.*?)```", text, re.DOTALL):
    (tmp_path / name).write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  config = configuration.recipe(str(tmp_path / "my_recipe.py"), "test")
  assert set(config.objectives) == set(configuration.recipe("joint", "test").objectives) | {
    "spread"
  }
  (objective,) = (one for one in objectives.build(config.objectives) if one.name == "spread")
  x = np.random.default_rng(0).normal(0, 0.5, (7, 5)).astype(np.float32)
  mask = np.float32([1, 1, 1, 1, 1, 1, 0])
  loss = objective.loss({"ecg_projection": x}, {"mask": mask})
  expected = np.maximum(1 - np.sqrt(x.var(axis=0) + 1e-4), 0).mean()
  np.testing.assert_allclose(loss.values, np.full(7, expected), rtol=1e-5)
  np.testing.assert_array_equal(loss.weight, mask)


def test_an_evaluator(tmp_path, cohort, monkeypatch):
  """In the log of training; then, alone, in results.json and in the report."""
  write("An evaluator", tmp_path)
  flags = [f"--config.evaluators.{name}.every=0" for name in ("losses", "probes")]
  flags += ["--config.evaluators.effective_rank.every=2", "--config.evaluators.retrieval.every=4"]
  words = {":demo": ":test,steps=4", "=cohort": f"={cohort.path}"}
  run("An evaluator", tmp_path, *flags, **words)
  log = metrics.read(tmp_path / "run/metrics.jsonl")
  found = [row["validation/effective_rank"] for row in log if "validation/effective_rank" in row]
  assert len(found) == 2 and all(1 <= value <= 16 for value in found)
  (recall,) = [row[key] for row in log for key in row if key.endswith("ecg_to_cmr/r@1")]
  assert 0 <= recall <= 1  # a built-in one of `mmcl evaluate`, on the validation split

  file = tmp_path / "run/config.json"
  config = json.loads(file.read_text())
  config["evaluators"] = {"effective_rank": config["evaluators"]["effective_rank"]}
  file.write_text(json.dumps(config))
  monkeypatch.syspath_prepend(tmp_path)
  evaluate.evaluate(str(tmp_path / "run"))
  out = tmp_path / "run/evaluation/4"
  results = json.loads((out / "results.json").read_text())
  score, page = results["effective_rank"], (out / "report.html").read_text()
  assert score["ci"][0] <= score["value"] <= score["ci"][1] and "phenotypes" not in results
  assert "Dimensions that the embedding uses" in page and "effective rank</th>" in page
  assert "<h2>Share of the variance by principal component</h2>" in page
  assert (out / "variance.png").exists() and page.count("data:image/png") == 1


def test_a_tower(tmp_path, cohort, monkeypatch):
  write("A tower", tmp_path)
  flags = "--config.every.save=2", "--config.every.evaluate=2"
  run("A tower", tmp_path, *flags, **{":demo": ":test,steps=2", "=cohort": f"={cohort.path}"})
  monkeypatch.syspath_prepend(tmp_path)
  encoder = restore.load_encoder(str(tmp_path / "run"))
  record = cohort.splits["test"][0]
  ecg = np.float32(record["ecg"] * record["ecg_scale"])
  embedding = encoder.embed(np.stack([ecg, 0 * ecg]))
  assert embedding.shape == (2, 64) and np.ptp(embedding, axis=0).max() > 0
  names = parameter_names(str(tmp_path / "run"))
  assert {"ecg/block0/kernel", "ecg/block2/bias", "head_ecg/fc1/kernel"} <= names


def test_an_augmentation_and_a_metric_writer(tmp_path, cohort):
  heading = "An augmentation and a metric writer"
  write(heading, tmp_path)
  flags = "--config.every.log=1", "--config.every.save=2", "--config.every.evaluate=2"
  run(heading, tmp_path, *flags, **{":demo": ":test,steps=2", "=cohort": f"={cohort.path}"})
  log = metrics.read(tmp_path / "run/metrics.jsonl")
  rows = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()]
  expected = [(row["step"], name) for row in log for name in row if name != "step"]
  assert [(int(step), name) for step, name, _ in rows] == expected and expected
  for (step, name, value), (_, key) in zip(rows, expected):
    (record,) = (row for row in log if row["step"] == int(step) and key in row)
    assert float(value) == record[name]

  standard = configuration.recipe("joint", "test,arm=mae").augment.ecg.to_dict()
  sys.path.insert(0, str(tmp_path))
  try:
    own = augment.build("ecg", ConfigDict(dict(fn="my_augmentation:lead_dropout", probability=0.5)))
  finally:
    sys.path.remove(str(tmp_path))
  ecg = np.ones((12, 40), np.float32)
  window = np.asarray(own(jax.random.key(0), ecg, 30))
  assert window.shape == (12, 30) and set(np.ptp(window, axis=1)) == {0}
  assert set(window[:, 0]) == {0, 1} and standard["fn"] == "standard"


def parameter_names(workdir: str) -> set[str]:
  """Names of the parameters of a checkpoint."""
  params = restore.load_variables(workdir)["params"]
  return {
    "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }


def test_a_source(tmp_path):
  write("A source", tmp_path)
  (tmp_path / "npz").mkdir()
  for i in range(30):
    ecg = np.repeat(synthetic.subject(5, i)["ecg"], 2, axis=1)  # 1,000 Hz
    if i == 4:
      ecg[6] = 0.25
    np.savez(tmp_path / f"npz/DEMO{i:04d}.npz", LVEF=50 + i, **dict(zip(schema.LEADS, ecg)))
  (tmp_path / "cohort.private").mkdir()
  # of 30 people a salt drawn anew leaves val empty once in 24 runs
  (tmp_path / "cohort.private/salt").write_text("5" * 64)
  done = run("A source", tmp_path, "--processes=2")
  cohort = cohort_lib.load(str(tmp_path / "cohort"))
  found = {float(r["phenotypes"][0]): r for source in cohort.splits.values() for r in source}
  assert sorted(found) == [50 + i for i in range(30) if i != 4]
  wanted = preprocess_ecg.normalise(synthetic.subject(5, 7)["ecg"], "minimal")
  ecg = found[57]["ecg"] * found[57]["ecg_scale"]
  assert np.corrcoef(ecg.ravel(), wanted.ravel())[0, 1] > 0.99
  quality = (tmp_path / "cohort/quality.json").read_text()
  assert "flat lead V1" in quality and "DEMO" not in quality + done.stdout + done.stderr
