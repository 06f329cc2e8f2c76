"""The cases of the benchmarks are what they say: sizes, operations, and which rate is compared with
which."""

import sys
import types

import jax
import pytest
from common import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import step as benchmark

from mmcl_jax import models, objectives
from mmcl_jax.data import standardise
from mmcl_jax.models import inputs, vit
from mmcl_jax.tools import hlo
from mmcl_jax.training import flops, parallel, state as state_lib, step as step_lib

# written out in PyTorch
MILLIONS = {"mae": 7.07, "mae_medium": 49.68, "mmcl": 31.95, "dual_phase": 116.59, "joint": 116.59}


def traced(case, batch):
  config, shapes = benchmark.case(case, batch, 2, [])
  mesh, standardiser = (
    parallel.make_mesh(data=1, model=1),
    standardise.as_they_are([], covariates=("none",)),
  )
  model = models.build(config.model, config.data.samples, 0)
  with jax.set_mesh(mesh):
    example = inputs.example(config, shapes, 0, batch)
    tx = state_lib.optimizer_for(model, example, config)
    state, _ = state_lib.abstract(model, tx, example, 0, mesh, ())
    rows = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), benchmark.random_rows(config, shapes)
    )
    step = step_lib.make_train_step(
      model, objectives.build(config.objectives), tx, config, standardiser
    )
    return state, jax.jit(step).trace(state, rows).jaxpr


@pytest.mark.parametrize("case", benchmark.CASES)
def test_parameters_are_those_of_the_published_system(case):
  state, _ = traced(case, 2)
  assert hlo.arrays(state.params) / 1e6 == pytest.approx(MILLIONS[case], rel=0.01)


def test_operations_of_the_autoencoder_are_those_counted_by_hand():
  """Forwards and twice that backwards; the patches need no gradient. A block: 12 D^2 weights and
  two products of [N, N]."""
  batch, patches, visible, patch = 4, 300, 60, 100
  size = vit.SIZES["tiny"]
  D, depth, (E, decoder, _) = size["width"], size["depth"], size["decoder"]

  def block(tokens, width):
    return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width

  blocks = depth * block(visible + 1, D) + decoder * block(patches + 1, E)
  ends = 2 * (visible + 1) * D * E + 2 * (patches + 1) * E * patch
  expected = batch * (3 * (blocks + ends) + 2 * 2 * patches * patch * D)
  assert flops.matmul_flops(traced("mae", batch)[1]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("word", ["--config.model.nothing=1", "--config.model.dtype", "--nothing"])
def test_an_override_that_nothing_has_is_refused(word):
  with pytest.raises(SystemExit, match="expected --config.KEY=VALUE"):
    benchmark.case("mae", 2, 2, [word])


def test_best_rates_are_compared_at_the_equal_batch_and_at_any():
  def one(name, batch, ms):
    return {"name": f"{name} joint {batch}", "batch": batch, "step_ms": {"min": ms}}

  measured = [
    one("ours", 10, 100.0),
    one("ours", 10, 50.0),
    one("theirs", 10, 40.0),
    one("ours", 20, 60.0),
    one("base", 30, 1.0),
  ]
  found = gpu.summary(measured, "joint", 10)
  assert found["equal_batch"] == {"ours_per_s": 200.0, "theirs_per_s": 250.0, "ratio": 0.8}
  assert found["best_batch"] == {"ours_per_s": 333.3, "theirs_per_s": 250.0, "ratio": 1.333}
  assert gpu.summary(measured[:2], "joint", 10)["best_batch"]["ratio"] is None


def test_a_benchmark_of_the_gpu_stops_at_its_time_and_says_what_is_left_out(tmp_path, capsys):
  args = types.SimpleNamespace(
    minutes=0,
    wheels=None,
    against="x",
    device="cpu",
    steps=1,
    batches={"joint": [2], "mae_medium": [2]},
    out=str(tmp_path / "gpu.json"),
  )
  gpu.measure(args)
  text = (tmp_path / "gpu.json").read_text()
  assert "theirs joint 2 1" in text and "base joint 2" in text and '"measured": []' in text
