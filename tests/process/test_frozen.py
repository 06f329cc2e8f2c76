"""Towers that do not learn: the same run as with the towers in the loop, and features that never
serve another tower."""

import pathlib

import jax
import numpy as np
import pytest

from common import tiny_config
from mmcl_jax import models, train
from mmcl_jax.data import pipeline
from mmcl_jax.training import frozen, metrics, restore


@pytest.fixture(scope="module")
def first(trained):
  """A stage that trains both CMR towers."""
  return str(trained[0])


def second(cohort, first, **changes):
  """A stage after it: the same towers frozen, the ECG tower and the heads fresh."""
  config = tiny_config(cohort.path)
  config.steps = 4
  config.init_from.cmr_ed = config.init_from.cmr_es = first
  config.model.towers.ed.frozen = config.model.towers.es.frozen = True
  config.augment.cmr = dict(
    fn="standard", rotation_deg=0.0, scale=0.0, shift=0.0, intensity_sigma=0.0
  )
  return config


@pytest.fixture(scope="module")
def cached(cohort, first, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("cached") / "w"
  return workdir, jax.device_get(train.train(second(cohort, first), str(workdir)))


def backbone(variables, phase):
  return {
    collection: variables[collection][f"cmr_{phase}"]["backbone"]
    for collection in ("params", "batch_stats")
  }


def test_frozen_towers_keep_weights_and_statistics_bit_for_bit_and_the_rest_learns(first, cached):
  before, state = restore.load_variables(first), cached[1]
  for phase in ("ed", "es"):
    jax.tree.map(
      np.testing.assert_array_equal, backbone(before, phase), backbone(state.variables, phase)
    )

    def kernel(variables, phase=phase):
      return variables["params"][f"cmr_{phase}"]["fc"]["kernel"]

    assert not np.array_equal(kernel(before), kernel(state.variables))


def test_cached_features_give_the_run_that_the_towers_in_the_loop_give(
  cohort, first, cached, tmp_path, monkeypatch
):
  """The oracle runs the towers on the images in every step."""
  real = models.fields
  monkeypatch.setattr(frozen, "with_features", lambda one, split, *args: one.splits[split])
  monkeypatch.setattr(models, "fields", lambda config, only=None: real(config))
  live = jax.device_get(train.train(second(cohort, first), str(tmp_path / "w")))
  losses = [
    [record["loss"] for record in metrics.read(workdir / "metrics.jsonl") if "loss" in record]
    for workdir in (cached[0], tmp_path / "w")
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    cached[1].params,
    live.params,
  )


def test_features_are_those_of_the_tower_in_evaluation_mode(cohort, first, cached):
  run = restore.load_run(str(cached[0]))
  with jax.set_mesh(run.mesh):
    source = frozen.with_features(
      cohort, "train", run.model, run.state.variables, run.mesh, str(cached[0]), batch=8
    )
  assert isinstance(source, pipeline.WithFeatures) and len(source) == len(cohort.splits["train"])
  for i in (0, len(source) - 1):  # the last one stood in a padded batch
    record = cohort.splits["train"][i]
    planes = record["ed_es_volumes"][None, 1, 3:9].astype(np.float32) / 255
    tower = run.model.bind(run.state.variables).cmr["es"]
    np.testing.assert_allclose(
      source[i]["features"]["es"],
      tower.backbone(planes, np.ones(1), False, None)[1][0],
      rtol=1e-4,
      atol=1e-6,
    )


def test_other_weights_or_what_decides_get_other_files_and_nothing_else_does(cohort, cached):
  run = restore.load_run(str(cached[0]))
  config, variables = run.config.model, jax.device_get(run.state.variables)
  mark = frozen.fingerprint(cohort, "ed", config, variables)

  def changed(**entries):
    other = config.copy_and_resolve_references()
    for name, value in entries.items():
      (other if name == "dtype" else other.towers.ed)[name] = value
    return frozen.fingerprint(cohort, "ed", other, variables)

  assert (
    mark
    == frozen.fingerprint(cohort, "ed", config, jax.tree.map(np.copy, variables))
    == changed(width=7, drop_path=0.5)
  )
  touched = jax.tree.map(np.copy, variables)
  touched["batch_stats"]["cmr_ed"]["backbone"]["stem_norm"]["mean"][0] += 1e-6
  other = cohort._replace(info=cohort.info | {"fingerprint": "0" * 32})
  marks = {
    mark,
    frozen.fingerprint(cohort, "ed", config, touched),
    changed(planes=4),
    changed(dtype="bfloat16"),
    changed(view="es_volume"),
    frozen.fingerprint(other, "ed", config, variables),
    frozen.fingerprint(cohort, "es", config, variables),
  }
  assert len(marks) == 7


def test_features_are_made_once_and_never_left_half_written(
  cohort, cached, first, tmp_path, monkeypatch
):
  folder = pathlib.Path(f"{cohort.path}.cache")
  files = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
  # of two towers
  assert sorted(file.name for file in files) == ["train.npy", "train.npy", "val.npy", "val.npy"]
  monkeypatch.setattr(
    frozen, "over_split", lambda *args, **kwargs: pytest.fail("the towers ran again")
  )
  train.train(second(cohort, first), str(tmp_path / "again"))
  assert files == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_file_is_made_again_and_a_read_only_cohort_leaves_it_to_the_workdir(
  cohort, cached, tmp_path, monkeypatch
):
  run = restore.load_run(str(cached[0]))

  def features():
    return frozen.with_features(
      cohort, "val", run.model, run.state.variables, run.mesh, str(tmp_path), batch=8
    )

  with jax.set_mesh(run.mesh):
    good = features()
    file = pathlib.Path(good.files["ed"])
    expected = np.load(file)
    file.write_bytes(file.read_bytes()[:-100])
    np.testing.assert_array_equal(np.load(features().files["ed"]), expected)
    monkeypatch.setattr(frozen.os, "access", lambda *args: False)
    moved = features()
  assert all(
    pathlib.Path(one).is_relative_to(tmp_path / "features") for one in moved.files.values()
  )
  np.testing.assert_array_equal(np.load(moved.files["ed"]), expected)
  assert not [one for one in file.parent.iterdir() if one.name.startswith(".")]


def test_a_cohort_of_ecg_alone_mixes_with_cached_pairs(cohort, first, tmp_path):
  """Rows without CMR have no features, and count nowhere but in the reconstruction."""
  config = second(cohort, first)
  train_records = cohort.splits["train"]
  info = {
    **cohort.info,
    "shapes": {k: v for k, v in cohort.info["shapes"].items() if k != "ed_es_volumes"},
  }
  lacking = [{k: v for k, v in train_records[i].items() if k != "ed_es_volumes"} for i in range(4)]
  record = train_records[0] | {"features": {"ed": np.ones(8, np.float32)}}
  conform = pipeline.conforming(info, cohort.info, record, models.fields(config.model))
  row = conform(lacking[1])
  assert (
    row["has_cmr"] == 0
    and not row["features"]["ed"].any()
    and row["has_ecg"] == lacking[1]["has_ecg"]
  )
  np.testing.assert_array_equal(row["ecg"], lacking[1]["ecg"])
