"""A batch computed in parts against the same batch at once: loss, metrics, gradient, statistics,
memory."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from common import python
from mmcl_jax import objectives
from mmcl_jax.errors import UserError
from mmcl_jax.models.resnet import BatchNorm
from mmcl_jax.training import accumulate

B, F, E, UNREAD = 12, 5, 4, 997
NORM = BatchNorm(jnp.float32)


def case():
  """params, statistics, batch of a model of two linear towers."""
  rng = np.random.default_rng(0)

  def z(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    "ecg": z(F, E),
    "image": z(F, E),
    "log_scale": jnp.log(jnp.float32(5)),
    "norm": {"scale": 1 + z(F), "bias": z(F)},
  }
  batch = {
    "x": z(B, F),
    "y": z(B, F),
    "mask": jnp.ones(B).at[3].set(0),
    "has_ecg": jnp.ones(B),
    "has_cmr": jnp.ones(B),
    "subject": jnp.asarray([[i, 0] for i in [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 9, 11]], jnp.uint32),
  }
  return params, {"mean": jnp.zeros(F), "var": jnp.ones(F)}, batch


def forward(params, statistics, batch, norm=False):
  """Outputs of every kind: rows first, rows second, no rows, integers, and one that nobody
  reads."""
  x = batch["x"]
  if norm:
    variables = {"params": params["norm"], "batch_stats": statistics}
    x, changed = NORM.apply(variables, x, batch["mask"], True, mutable=["batch_stats"])
    statistics = changed["batch_stats"]
  ecg, image = jnp.tanh(x @ params["ecg"]), jnp.tanh(batch["y"] @ params["image"])
  outputs = {
    "ecg_projection": ecg,
    "cmr": {"image": {"projection": image}},
    "log_scale": params["log_scale"],
    "siamese": {"projection": jnp.stack([ecg, image]), "prediction": jnp.stack([image, ecg**3])},
    "positive": (ecg > 0).astype(jnp.int32),
    "unread": jnp.repeat(ecg, UNREAD, axis=1),
  }
  return (outputs, batch), statistics


def loss(outputs, batch, *names):
  total, metrics = 0.0, {}
  for name, parameters in (("clip", dict(b="image")), ("simsiam", {})):
    if name in names:
      found = objectives.find(name, "")(outputs, batch, **parameters)
      total += objectives.mean(found)
      metrics |= found.metrics
  return total, metrics | {"positive": outputs["positive"].mean()}


def BOTH(outputs, batch):
  return loss(outputs, batch, "clip", "simsiam")


def compute(parts, of=BOTH, **options):
  return accumulate.value_and_grad(functools.partial(forward, **options), of, parts)


def difference(a, b):
  """Largest of any element, as a share of the norm of b."""
  a, b = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (a, b))
  return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) / np.sqrt(
    sum((y**2).sum() for y in b)
  )


@pytest.mark.parametrize("parts", [3, 12])
def test_parts_give_the_loss_metrics_and_gradient_of_the_whole(parts):
  """With a repeated subject in other parts, a row that does not count, and a learned
  temperature."""
  value, statistics, gradient = jax.jit(compute(1))(*case())
  in_parts, after, accumulated = jax.jit(compute(parts))(*case())
  assert in_parts[1].keys() == value[1].keys() == {"r@1", "temperature", "spread", "positive"}
  assert difference(in_parts, value) < 1e-6 and difference(accumulated, gradient) < 1e-6
  assert abs(gradient["log_scale"]) > 1e-3 and difference(after, statistics) == 0


def part(batch, k):
  """Every third row, from row k."""
  return jax.tree.map(lambda x: x[k::3], batch)


def test_the_mean_over_parts_is_another_gradient():
  """What plain accumulation gives: right for a loss of single rows, wrong for one that compares
  them."""
  params, statistics, batch = case()
  batch["mask"] = jnp.ones(B)
  for name, alike in (("simsiam", True), ("clip", False)):

    def of(outputs, batch, name=name):
      return loss(outputs, batch, name)

    at_once = jax.jit(compute(1, of=of))
    parts = [at_once(params, statistics, part(batch, k))[2] for k in range(3)]
    mean = jax.tree.map(lambda *x: sum(x) / 3, *parts)
    assert (difference(mean, at_once(params, statistics, batch)[2]) < 1e-6) == alike
    assert alike or difference(mean, at_once(params, statistics, batch)[2]) > 0.05


def test_batch_norm_takes_one_update_a_part_in_order():
  """And both passes over a part normalise alike, also where none of its rows counts: the gradient
  is its own."""
  params, statistics, batch = case()
  batch["mask"] = jnp.ones(B).at[jnp.arange(1, B, 3)].set(0)  # all of part 1
  (value, _), after, gradient = jax.jit(compute(3, norm=True))(params, statistics, batch)

  def by_hand(params):
    running, outputs = statistics, []
    for k in range(3):
      (found, _), running = forward(params, running, part(batch, k), norm=True)
      outputs.append(found)

    # back in order
    def rows(*x):
      return x[0] if x[0].ndim == 0 else jnp.stack(x, -2).reshape(*x[0].shape[:-2], B, -1)

    return BOTH(jax.tree.map(rows, *outputs), batch)[0], running

  (expected, running), expected_gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
    params
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert difference(gradient, expected_gradient) < 1e-6 and difference(after, running) < 1e-6
  assert difference(running, statistics) > 0.01


def test_what_no_objective_reads_is_not_kept():
  text = str(jax.make_jaxpr(compute(3))(*case()))
  kept = set(re.findall(r"f32\[3,([0-9,]+)\]", text))
  assert "4,4" in kept and "2,4,4" in kept and not any(str(UNREAD * E) in shape for shape in kept)


@pytest.mark.parametrize("parts", [0, -1, 3, 16, 2.0])
def test_parts_that_do_not_divide_the_rows_of_a_device_are_one_line(parts):
  mesh = AbstractMesh((2, 1), ("data", "model"))
  accumulate.check(8, 16, mesh)
  words = f"config.accumulation is {parts}.* of 16 rows .* 8 lie on each of 2 devices.*divisor of 8: 1, 2, 4, 8$"
  with pytest.raises(UserError, match=words):
    accumulate.check(parts, 16, mesh)
  with pytest.raises(UserError, match="divisor of 12: 1, 2, 3, 4, 6, 12$"):
    compute(parts if parts != 3 else 5)(*case())


def test_an_output_with_rows_along_two_axes_is_one_line():
  def crossed(params, statistics, batch):
    return ({"all": batch["x"] @ batch["x"].T}, batch), statistics

  with pytest.raises(UserError, match=r"output of shape \(12, 12\)"):
    accumulate.value_and_grad(crossed, lambda outputs, batch: (outputs["all"].sum(), {}), 3)(
      *case()
    )


STEP = """
import json, re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh
import joint
from mmcl_jax import objectives as objective_room
from mmcl_jax.models import pretrainer, vit
from mmcl_jax.models.towers import video_vit
from mmcl_jax.training import parallel, state as state_room, steps

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
scales = steps.Scales(("a", "b", "c"), ("d", "e"), (0, 1, 2), (np.zeros(3), np.ones(3)), (np.zeros(2), np.ones(2)))
zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
keep = optax.GradientTransformation(zeros, lambda gradient, kept, params: (zeros(gradient), gradient))  # changes nothing
model = pretrainer.build(config.model, config.data.samples, 3)

result = {}
for devices, parts in ((1, 1), (1, 4), (8, 4)):
  config.accumulation = parts
  if parts > 1:
    config.objectives.learning.ring = True  # the ring sees what the parts have collected
  objectives = objective_room.build(config.objectives)
  mesh = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    state, where = state_room.create(model, keep, steps.example(config, shapes, 3, B), 0, mesh, ())
    rows = parallel.to_global(batch, mesh)
    step = jax.jit(steps.make_train_step(model, objectives, keep, config, scales), out_shardings=(where, None))
    compiled = step.lower(state, rows).compile()
    new, metrics = jax.device_get(compiled(state, rows))
  sizes = []
  for line in compiled.as_text().splitlines():
    found = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?[(]", line)
    if found:
      dims = re.findall(r"[a-z]+[0-9]+\\[([0-9,]*)\\]", found[1])
      sizes += [(found[2], int(np.prod([int(n) for n in one.split(",") if n]))) for one in dims]
  result[devices, parts] = dict(gradient=new.opt_state, metrics={k: float(v) for k, v in metrics.items() if k != "worst"}, sizes=sizes,
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
