"""The train step in parts, on one and on eight devices."""

import json

import pytest
from common import python

STEP = """
import json, re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh
import joint
from mmcl_jax.data import standardise
from mmcl_jax.models import inputs
from mmcl_jax import models, objectives as objective_lib
from mmcl_jax.models import vit
from mmcl_jax.models.towers import video_vit
from mmcl_jax.training import parallel, state as state_lib, step as step_lib

vit.SIZES["test"] = video_vit.SIZES["test"] = dict(width=16, depth=2, heads=2, decoder=(16, 1, 2))  # two blocks: the second may be dropped
B, L, T = 32, 12, 260
config = joint.get_config("test")
config.batch, config.data.samples, config.model.learned_temperature = B, 200, 0.1
config.model.towers.ecg.update(patch=20, drop_path=0.3)
config.model.projection.update(hidden=16, width=8)
config.augment.twice = True
tower = dict(planes=2, size="test")
config.model.towers = {
    "ecg": config.model.towers.ecg.to_dict(),
    "learning": tower | dict(fn="video_vit", view="ed_volume", patch=(1, 8, 8), mask_ratio=0.5, drop_path=0.3),
    "frozen": tower | dict(fn="resnet", view="es_volume", frozen=True)}
config.model.regression = ("ecg", "frozen")
both = dict(weight=1.0, a="ecg")
config.objectives = dict(
    reconstruction=dict(fn="mae", weight=1.0, ncc_weight=0.1), video=dict(fn="cmr_mae", weight=0.5, of="learning"),
    phenotypes=dict(fn="phenotype_regression", weight=0.3), twice=dict(fn="nt_xent", weight=0.2, of="ecg"),
    learning=both | dict(fn="clip", b="learning"), frozen=both | dict(fn="clip", b="frozen", b_to_a=0.75))
shapes = dict(ecg=[L, T], ed_es_volumes=[2, 4, 16, 16], phenotypes=[3], diseases=[2], covariates=[2])
rng = np.random.default_rng(0)
z = lambda *shape: rng.normal(size=shape).astype(np.float32)
ones = np.ones(B, bool)
batch = dict(ecg=rng.integers(-99, 99, (B, L, T), np.int16), ecg_scale=np.full(B, 0.02, np.float32),
             cmr=dict(ed_es_volumes=rng.integers(0, 255, (B, 2, 4, 16, 16)).astype(np.uint8)), features=dict(frozen=z(B, 8)),
             has_ecg=ones.copy(), has_cmr=ones.copy(), mask=ones.copy(),
             phenotypes=z(B, 3), diseases=z(B, 2), covariates=z(B, 2),
             subject=np.stack([np.zeros(B), np.arange(B)], 1).astype(np.uint32), index=np.arange(70, 70 + B, dtype=np.uint32))
batch["subject"][5], batch["mask"][11], batch["has_ecg"][2], batch["has_cmr"][17] = batch["subject"][2], 0, 0, 0
batch["phenotypes"][3] = np.nan
standardiser = standardise.as_they_are(["a", "b", "c"], ("a", "b", "c"), ("d", "e"))
zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
keep = optax.GradientTransformation(zeros, lambda gradient, kept, params: (zeros(gradient), gradient))  # changes nothing
model = models.build(config.model, config.data.samples, 3)

result = {}
for devices, parts in ((1, 1), (1, 4), (8, 4)):
  config.accumulation = parts
  if parts > 1:
    config.objectives.learning.ring = True  # the ring sees what the parts have collected
  objectives = objective_lib.build(config.objectives)
  mesh = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    state, where = state_lib.create(model, keep, inputs.example(config, shapes, 3, B), 0, mesh, ())
    rows = parallel.to_global(batch, mesh)
    step = jax.jit(step_lib.make_train_step(model, objectives, keep, config, standardiser), out_shardings=(where, None))
    compiled = step.lower(state, rows).compile()
    new, metrics = jax.device_get(compiled(state, rows))
  sizes = []
  for line in compiled.as_text().splitlines():
    found = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?[(]", line)
    if found:
      dims = re.findall(r"[a-z]+[0-9]+\\[([0-9,]*)\\]", found[1])
      sizes += [(found[2], int(np.prod([int(n) for n in one.split(",") if n]))) for one in dims]
  result[devices, parts] = dict(gradient=new.opt_state, metrics={k: float(v) for k, v in metrics.items() if k != "top_loss_subjects"}, sizes=sizes,
                                temporary=compiled.memory_analysis().temp_size_in_bytes)
whole = result.pop((1, 1))
expected = jax.tree.leaves(whole["gradient"])
norm = np.sqrt(sum((x.astype(float) ** 2).sum() for x in expected))
for one in result.values():
  one["gradient"] = max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(one["gradient"]), expected, strict=True)) / norm
print(json.dumps(dict(whole=whole | {"gradient": norm}, parts={str(d): one for (d, _), one in result.items()})))
"""


@pytest.fixture(scope="module")
def steps():
  """The train step at once on one device, and in 4 parts on one and on eight."""
  return json.loads(python(STEP, devices=8, timeout=1800).strip().splitlines()[-1])


@pytest.mark.parametrize("devices", ["1", "8"])
def test_the_train_step_in_parts_is_that_of_the_whole_batch(steps, devices):
  """Masks, dropped paths, two augmentations, cached features, a learned temperature and every
  metric."""
  whole, parts = steps["whole"], steps["parts"][devices]
  assert parts["metrics"] == pytest.approx(whole["metrics"], rel=1e-5, abs=1e-6)
  assert whole["gradient"] > 0.01 and parts["gradient"] < 1e-6
  assert whole["metrics"]["finite"] == 1 and whole["metrics"][
    "learning/temperature"
  ] == pytest.approx(0.1)


def test_activations_are_those_of_one_part(steps):
  assert steps["parts"]["1"]["temporary"] < 0.5 * steps["whole"]["temporary"]


def test_no_recording_and_no_image_travels_to_be_cut(steps):
  travelling = [size for kind, size in steps["parts"]["8"]["sizes"] if kind != "all-reduce"]
  assert travelling and max(travelling) <= 32 * 8  # projections
