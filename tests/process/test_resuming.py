"""Runs that go on from a checkpoint, beside another cohort or elsewhere, and what stops them."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from common import ecg_config, tiny_config

from mmcl_jax import configuration, train
from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint, metrics, restore


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
  """A workdir trained to step 6 without a break, and its final state."""
  return shutil.copytree(trained[0], tmp_path_factory.mktemp("run") / "w"), trained[1]


@pytest.fixture
def copy(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "w")
  return tmp_path / "w"


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_ecg_only_cohort_trains_beside_paired_data_and_resumes_exactly(
  finished, cohort, ecg_only, tmp_path
):
  def mixed_config(steps):
    config = tiny_config(cohort.path)
    config.data.mix, config.steps = ((ecg_only.path, 0.5),), steps
    return config

  whole = train.train(mixed_config(6), str(tmp_path / "a"))
  losses = metrics.read(tmp_path / "a/metrics.jsonl")
  assert all(np.isfinite(record["loss"]) for record in losses if "loss" in record)
  assert not np.array_equal(
    *(jax.tree.leaves(jax.device_get(s.params))[0] for s in (whole, finished[1]))
  )
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  shutil.rmtree(tmp_path / "b/checkpoints/6")
  same(jax.device_get(train.train(mixed_config(6), str(tmp_path / "b"))), jax.device_get(whole))
  manifest = checkpoint.manifest(str(tmp_path / "a"), 6)
  assert manifest["cohort"] == cohort.fingerprint and manifest["mixed"] == [ecg_only.fingerprint]


def test_an_unsigned_checkpoint_does_not_count(copy, finished, cohort):
  """As a kill while saving leaves it: the run goes on from the step before, to the same end."""
  shutil.rmtree(copy / "checkpoints/6/meta")
  (copy / "checkpoints/9").mkdir()
  assert checkpoint.latest(str(copy)) == 3
  same(jax.device_get(train.train(tiny_config(cohort.path), str(copy))), finished[1])


@pytest.mark.reported(
  "a run could not go on when its cohort was moved, or was named with a slash at the end"
)
def test_a_run_goes_on_with_its_cohort_elsewhere_and_with_no_other(
  copy, finished, cohort, tmp_path
):
  shutil.rmtree(copy / "checkpoints/6")
  shutil.copytree(cohort.path, tmp_path / "moved")
  same(jax.device_get(train.train(tiny_config(f"{tmp_path}/moved/"), str(copy))), finished[1])
  assert configuration.load(str(copy)).data.cohort == f"{tmp_path}/moved/"
  assert checkpoint.manifest(str(copy), 6)["cohort_path"] == f"{tmp_path}/moved"
  description = tmp_path / "moved/cohort.json"
  description.write_text(
    json.dumps(json.loads(description.read_text()) | {"fingerprint": "0" * 32})
  )
  with pytest.raises(UserError, match="was trained on the cohort"):
    train.train(tiny_config(str(tmp_path / "moved")), str(copy))


@pytest.mark.parametrize("objective, name", [("explode", "mine"), ("bad_gradient", "gradient")])
def test_a_non_finite_step_stops_with_the_last_good_checkpoint(
  cohort, tmp_path, monkeypatch, objective, name
):
  """An objective from outside the package, named by its path, that breaks at update 4."""
  (tmp_path / "outside.py").write_text(
    "import jax.numpy as jnp\n"
    "from mmcl_jax.objectives import Loss\n"
    "def explode(outputs, batch, at=0):\n"
    "  x = outputs['ecg_projection'].mean(axis=1)\n"
    "  return Loss(jnp.where(batch['index'].max() >= at, jnp.nan, x), batch['mask'], {})\n"
    "def bad_gradient(outputs, batch, at=0):\n"
    "  x = outputs['ecg_projection'].mean(axis=1)\n"
    "  left = jnp.maximum(at - batch['index'].max().astype(jnp.float32), 0.0)\n"
    "  return Loss(jnp.sqrt(left * x * x), batch['mask'], {})  # at 0 its value is finite, its "
    "slope is not\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "outside", raising=False)
  c = ecg_config(cohort.path)
  c.objectives = dict(mine=dict(fn=f"outside:{objective}", weight=1.0, at=4 * c.batch))
  with pytest.raises(
    UserError, match=f"step 5: .*{name}.* not finite.*last good checkpoint is .*/3"
  ):
    train.train(c, str(tmp_path / "w"))
  assert checkpoint.steps(str(tmp_path / "w")) == [3]
  run = restore.load_run(str(tmp_path / "w"))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(run.state.params)))


def test_bfloat16_and_a_learned_temperature_under_its_cap(finished, cohort, tmp_path):
  """Temperature starts at 0.02, beyond the cap 1 / 20: the first update projects it back, the next
  ones may move it."""
  c = tiny_config(cohort.path)
  c.model.dtype, c.model.learned_temperature, c.model.max_scale = "bfloat16", 0.02, 20.0
  state = train.train(c, str(tmp_path / "w"))
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  records = [r for r in metrics.read(tmp_path / "w/metrics.jsonl") if "loss" in r]
  temperature = [r["dual_phase/temperature"] for r in records]
  assert temperature[0] == pytest.approx(0.02, rel=1e-5) and temperature[1] == pytest.approx(
    0.05, rel=1e-5
  )
  assert min(temperature[1:]) >= 0.05 * (1 - 1e-5) and temperature[-1] != temperature[1]
  exact = metrics.read(finished[0] / "metrics.jsonl")[0]["reconstruction/loss"]
  assert records[0]["reconstruction/loss"] == pytest.approx(exact, rel=0.02)
  assert records[0]["reconstruction/loss"] != exact
