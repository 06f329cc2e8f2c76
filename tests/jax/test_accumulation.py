"""A batch computed in parts against the same batch at once: loss, metrics, gradient, statistics,
memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

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
  forward_part = functools.partial(forward, **options)
  if parts == 1:
    return whole(forward_part, of)
  return accumulate.value_and_grad(forward_part, of, parts)


def whole(forward, of):
  """The same without parts: loss and gradient of the batch at once."""

  def compute(params, statistics, batch):
    def loss_of(params):
      seen, after = forward(params, statistics, batch)
      value, metrics = of(*seen)
      return value, (metrics, after)

    (value, (metrics, after)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return (value, metrics), after, gradient

  return compute


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
