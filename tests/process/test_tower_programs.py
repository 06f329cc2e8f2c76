"""Every program with the ECG towers that are no ViT."""

import json

import numpy as np
import pytest
from common import only_evaluators

from mmcl_jax import evaluate, export, train
from mmcl_jax.training import restore


@pytest.mark.parametrize("name", ["xresnet1d", "s4"])
def test_every_program_works_with_it(name, cohort, tmp_path, capsys, monkeypatch):
  workdir = str(tmp_path / "w")
  flags = [
    f"--config=joint:test,arm=contrastive,encoder={name},steps=2",
    f"--workdir={workdir}",
    f"--config.data.cohort={cohort.path}",
    "--config.every.save=2",
    "--config.every.evaluate=2",
  ]
  train.main(flags)
  encoder = restore.load_encoder(workdir)
  record = cohort.splits["test"][0]
  ecg = record["ecg"] * record["ecg_scale"]
  width = encoder.embed(np.float32(ecg)[None]).shape[1]
  assert width == {"xresnet1d": 32, "s4": 8}[name]
  only_evaluators(monkeypatch, "phenotypes", "localisation")
  evaluate.main([f"--workdir={workdir}"])
  told = capsys.readouterr().out
  assert "no relevance maps of the ECG" in told
  results = json.loads((tmp_path / "w/evaluation/2/results.json").read_text())
  assert results["localisation"]["cosine"] and "completeness" not in results["localisation"]
  export.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
  about = json.loads((tmp_path / "out/export.json").read_text())
  assert about["outputs"]["embedding"]["shape"][1] == width
  assert f"`{name}`" in (tmp_path / "out/MODEL_CARD.md").read_text()
