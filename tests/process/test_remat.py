"""Remat and scan save memory and time to compile, and change neither the numbers nor the
parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import difference, drawn

from mmcl_jax.models import exchange, resnet, vit
from mmcl_jax.models.towers import ecg_vit, slow_resnet, video_vit

# The tests' time is compilation, and neither numbers nor memory depend on how hard LLVM tries.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))


def tower(depth, **levers):
  """How an ECG tower of `depth` + 2 blocks is initialised, and its loss as a function of variables,
  ecg and keys."""
  size = dict(width=32, depth=depth, heads=2, decoder=(16, 2, 2))
  model = ecg_vit.EcgViT(size, 40, patch=10, mask_ratio=0.5, drop_path=0.5, **levers)

  def loss(variables, x, keys):
    _, embedding = model.apply(variables, x, None, True, keys)
    return (embedding**2).sum() + (
      model.apply(variables, x, keys, method="reconstruct")["reconstruction"] ** 2
    ).mean()

  def init(key, x, keys):
    return model.init(key, x, keys, method=lambda m, x, keys: (m(x), m.reconstruct(x, keys)))

  return init, loss


def kept(f, *args) -> int:
  """Bytes that the forward pass keeps for the backward pass. What XLA's CPU compiler plans tells
  nothing: it drops the barriers that hold a recomputation apart from the first one."""
  pull = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
  return sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves(pull)
    if jnp.issubdtype(x.dtype, jnp.floating)
  )


def inputs_of(depth, **levers):
  """Variables, ECGs and keys of that tower, and its loss."""
  init, loss = tower(depth, **levers)
  x = np.random.default_rng(1).normal(size=(4, 12, 40)).astype(np.float32)
  variables = drawn(jax.eval_shape(init, jax.random.key(0), x, KEYS))
  return loss, variables, x, jax.random.split(jax.random.key(3), 4)


@functools.cache
def measured(**levers):
  """Loss and gradients of a tower of 2 + 2 blocks."""
  loss, *inputs = inputs_of(2, **levers)
  return jax.device_get(jit(jax.value_and_grad(loss))(*inputs))


def memory(**levers):
  """Bytes that a tower of 6 + 2 blocks keeps between the passes."""
  loss, variables, x, keys = inputs_of(6, **levers)
  return kept(lambda variables: loss(variables, x, keys), variables)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", vit.REMAT)
def test_numbers_and_parameters_do_not_depend_on_remat_and_scan(remat, scan):
  found, expected = measured(remat=remat, scan=scan), measured(remat="none", scan=False)
  assert difference(found, expected) < 1e-5  # of each leaf's largest; measured 2e-6
  assert "block1" in found[1]["params"] and "block1" in found[1]["params"]["decoder"]


def test_remat_takes_less_memory_and_dots_lie_between():
  none, dots, blocks = (memory(remat=remat, scan=False) for remat in ("none", "dots", "blocks"))
  assert blocks < 0.1 * none and 2 * blocks < dots < 0.5 * none, (none, dots, blocks)
  assert memory(remat="blocks", scan=True) < 0.2 * memory(remat="none", scan=True)


def test_scan_compiles_one_block_for_all():
  """Eight blocks: one loop in the program, and the products of one block, where unrolled there are
  eight times as many."""
  model = video_vit.VideoViT(dict(width=16, depth=8, heads=2), (1, 2, 2))
  params = jax.eval_shape(
    lambda key: model.init(key, jnp.ones((2, 1, 4, 4)), None, False), jax.random.key(0)
  )
  texts = {}
  for scan in (False, True):
    model = video_vit.VideoViT(dict(width=16, depth=8, heads=2), (1, 2, 2), scan=scan)
    apply = jax.jit(model.apply, static_argnums=3)
    texts[scan] = apply.lower(params, jnp.ones((2, 1, 4, 4)), None, False).as_text()

  def count(scan, op):
    return texts[scan].count(f"stablehlo.{op}")

  assert (count(False, "while"), count(True, "while")) == (0, 1)
  assert (count(False, "dot_general"), count(True, "dot_general")) == (8 * 6 + 1, 6 + 1)
  assert len(texts[True].splitlines()) < 0.5 * len(texts[False].splitlines())


def test_scan_in_bfloat16_casts_what_the_blocks_cast():
  (a, ga), (b, gb) = (
    measured(remat="none", scan=scan, dtype=jnp.bfloat16) for scan in (False, True)
  )
  assert abs(a - b) < 1e-2 * abs(a) and difference(gb, ga) < 0.1
  block = vit.Block(2, dtype=jnp.bfloat16).bind(
    {
      "params": {
        "norm1": {"scale": jnp.ones(4)},
        "qkv": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)},
      }
    }
  )
  for gradients, expected in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
    with exchange.gradients_in(gradients):
      params = vit.compute_params(block)
    assert params["norm1"]["scale"].dtype == jnp.float32
    assert params["qkv"]["kernel"].dtype == params["qkv"]["bias"].dtype == expected


def test_video_tower_scans_and_forgets_alike():
  x = np.random.default_rng(0).random((2, 2, 8, 8)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 2)
  models = [
    video_vit.VideoViT(
      dict(width=16, depth=2, heads=2, decoder=(16, 2, 2)), (1, 4, 4), 0.5, 0.5, **levers
    )
    for levers in ({}, dict(remat="blocks", scan=True))
  ]

  def init(model):
    return jax.eval_shape(
      lambda key: model.init(key, x, keys, method="reconstruct"), jax.random.key(1)
    )

  shapes = [init(model) for model in models]
  assert shapes[0] == shapes[1]
  variables = drawn(shapes[0])

  def loss(variables, model):
    _, features = model.apply(variables, x, None, True, keys)
    return (features**2).sum() + (
      model.apply(variables, x, keys, method="reconstruct")["reconstruction"] ** 2
    ).mean()

  first, second = (
    jit(jax.value_and_grad(functools.partial(loss, model=model)))(variables) for model in models
  )
  assert difference(second, first) < 1e-5


@functools.cache
def resnet_measured(remat):
  """Features, gradients, changed statistics of a slow ResNet of 3 blocks, and the bytes kept
  between the passes."""
  size = dict(stem=4, block=resnet.Bottleneck, widths=(4, 8), depths=(2, 1), spans=(3, 1))
  model = slow_resnet.SlowResNet(size, remat=remat)
  x, rows = (
    np.random.default_rng(0).random((4, 3, 32, 32)).astype(np.float32),
    np.array([1, 0, 1, 1], np.float32),
  )
  shapes = jax.eval_shape(lambda key: model.init(key, x, rows, False), jax.random.key(0))
  variables = drawn(shapes)

  def loss(params):
    (_, y), changed = model.apply(
      {**variables, "params": params}, x, rows, True, mutable=["batch_stats"]
    )
    return (rows[:, None] * y**2).sum(), (y, changed)

  found = jax.device_get(jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
  return found, kept(lambda params: loss(params)[0], variables["params"]), shapes


@pytest.mark.parametrize("remat", vit.REMAT[1:])
def test_resnet_remat_keeps_features_gradients_and_statistics(remat):
  (found, some, shapes), (expected, whole, before) = resnet_measured(remat), resnet_measured("none")
  assert shapes == before
  assert difference(found, expected) < 1e-4

  def statistics(result):
    return result[0][1][1]["batch_stats"]

  assert difference(statistics(found), statistics(expected)) < 1e-6
  assert some < 0.5 * whole, (some, whole)
