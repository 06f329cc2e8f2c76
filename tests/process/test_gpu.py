"""GPUs without a GPU: attention is lowered as for one that JAX's cuDNN wrapper is told of, and
compiled for H100s where the CUDA wheels are (pip install jax-cuda13-plugin jax-cuda13-pjrt)."""

import functools
import importlib
import importlib.util
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import RECIPES
from common import ROOT, python
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as wrapper

from mmcl_jax import models
from mmcl_jax.models import inputs, kernels, vit
from mmcl_jax.tools import compile_step as program, gpus
from mmcl_jax.training import state as state_lib

AMPERE, HOPPER = kernels.Gpu((8, 0), 90800), gpus.HOPPER


def value_and_grad(function):
  def loss(*args):
    return (function(*args).astype(jnp.float32) ** 2).sum()

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


def on_cuda(function, *args) -> tuple[int, int]:
  """Calls of cuDNN's attention forwards and backwards in the program of a GPU."""
  text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  backwards = text.count("__cudnn$fmhaSoftmaxBackward")
  return text.count("__cudnn$fmhaSoftmax") - backwards, backwards


def tokens(n, width, dtype=jnp.bfloat16, heads=2):
  return jax.ShapeDtypeStruct((2, n, heads, width), dtype)


@pytest.fixture(scope="module")
def recipes():
  """(queries, keys, width of a head) of all attention of the recipes at full size -> a recipe"""
  found, patch = {}, pytest.MonkeyPatch()
  patch.syspath_prepend(ROOT / "configs")

  def one(blocks, x, *_):
    return blocks[0](x) if blocks else x  # all of a tower are alike

  patch.setattr(vit, "apply_blocks", one)
  for file in sorted(ROOT.glob("configs/*.py")):
    module = importlib.import_module(file.stem)
    variants = [f"stage={name}" for name in getattr(module, "STAGES", ())]
    variants += [f"arm={name}" for name in getattr(module, "ARMS", ())]
    variants += ["kind=flow", "kind=masked"] if file.stem == "ecg_to_cmr" else []
    full = [size for size in module.SIZES if size not in ("test", "demo")]
    for size, variant in itertools.product(full, variants or [""]):
      argument = f"size={size},{variant}".rstrip(",")
      note = functools.partial(noted, found, f"{file.stem}:{argument}")
      patch.setattr(kernels, "attention", note)
      config = module.get_config(argument)
      shapes, standardiser = program.cohort_of(config)
      model = models.build(
        config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
      )
      example = inputs.example(config, shapes, len(standardiser.targets), 2)
      jax.eval_shape(functools.partial(state_lib.variables, model, example))
  patch.undo()
  return found


def noted(found, name, q, k, v):
  found.setdefault((q.shape[1], k.shape[1], q.shape[3]), name)
  return q


@pytest.mark.reported("bfloat16 training ended at its first trace on every Ampere and Hopper GPU")
@pytest.mark.parametrize("gpu", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_every_attention_of_the_recipes_lowers_for_a_gpu_as_cudnns(recipes, gpu, monkeypatch):
  """With CLS (601, 301, 361), of masked views (121, 61), of CMR, across from latents to an ECG."""
  gpus.tell(monkeypatch.setattr, gpu)
  assert {
    (601, 601, 64),
    (121, 121, 64),
    (601, 601, 32),
    (601, 601, 72),
    (361, 361, 64),
    (301, 301, 64),
    (61, 61, 64),
    (384, 384, 64),
    (384, 600, 64),
    (1, 600, 64),
  } <= recipes.keys()
  for (n, m, width), name in recipes.items():
    q, k = tokens(n, width), tokens(m, width)
    calls = on_cuda(value_and_grad(kernels.attention), q, k, k)
    assert calls == ((1, 1) if n > 1 else (0, 0)), (name, n, m, width)


def test_the_tpu_s_kernel_is_tested_on_every_self_attention_of_the_recipes(recipes):
  found = {}
  for n, m, width in sorted(recipes):
    if n == m:
      found[width] = (*found.get(width, ()), n)
  assert found == RECIPES


@pytest.mark.parametrize(
  "gpu",
  [AMPERE, kernels.Gpu((7, 5), 90800), kernels.Gpu((10, 3), 90800), kernels.Gpu((12, 0), 91200)],
  ids=str,
)
def test_what_cudnns_wrapper_refuses_is_left_to_xla(gpu, monkeypatch):
  """Nothing of this raises, and what has a call of cuDNN's is what `suits_cudnn` says."""
  gpus.tell(monkeypatch.setattr, gpu)
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    for n, m, width in (
      (9, 9, 64),
      (8, 8, 128),
      (9, 5, 8),
      (9, 9, 4),
      (9, 9, 12),
      (9, 9, 136),
      (1, 9, 64),
      (2, 1, 64),
    ):
      q, k = tokens(n, width, dtype), tokens(m, width, dtype)
      calls = on_cuda(value_and_grad(kernels.attention), q, k, k)
      assert calls == ((1, 1) if kernels.suits_cudnn(q, k, gpu) else (0, 0)), (dtype, n, m, width)


@pytest.mark.parametrize(
  "change, suits",
  [
    ({}, True),
    (dict(gpu=None), False),
    (dict(gpu=kernels.Gpu((7, 5), 91200)), False),
    (dict(gpu=kernels.Gpu((10, 0), 90800)), True),
    (dict(gpu=kernels.Gpu((10, 3), 90800)), False),
    (dict(gpu=kernels.Gpu((10, 3), 91100)), True),
    (dict(dtype=jnp.float16), True),
    (dict(dtype=jnp.float32), False),
    (dict(width=12), False),
    (dict(width=136), False),
    (dict(queries=1), False),
    (dict(queries=384), True),
    (dict(queries=export.symbolic_shape("n")[0]), False),
  ],
)
def test_cudnn_is_asked_only_for_what_it_takes(change, suits):
  c = dict(gpu=HOPPER, dtype=jnp.bfloat16, width=64, queries=601) | change
  q, k = (tokens(n, c["width"], c["dtype"]) for n in (c["queries"], 601))
  assert kernels.suits_cudnn(q, k, c["gpu"]) is suits


@pytest.mark.parametrize(
  "platform, version, found",
  [
    ("gpu", "PJRT C API\ncuda 13000", HOPPER),
    ("gpu", "rocm 7", None),
    ("cpu", "cpu", None),
    ("tpu", "libtpu", None),
  ],
)
def test_the_gpu_at_hand(platform, version, found, monkeypatch):
  client = types.SimpleNamespace(platform_version=version)
  device = types.SimpleNamespace(platform=platform, client=client, compute_capability="9.0")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  monkeypatch.setattr(wrapper, "check_cudnn_version", lambda: 91200)
  assert kernels.gpu_at_hand() == found


@pytest.mark.parametrize("n, m", [(7, 7), (5, 12), (16, 9), (8, 8)])
def test_padded_tokens_are_seen_by_none(n, m):
  """Value and gradients of XLA's form of what cuDNN is given, against those without padding."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, length, 3, 8)).astype(np.float32) for length in (n, m, m))
  padded = functools.partial(kernels.padded_attention, implementation="xla")
  found, expected = (jax.jit(value_and_grad(f))(q, k, v) for f in (padded, kernels.own_attention))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
  jax.tree.map(close, found, expected)


@pytest.mark.parametrize("levers", [dict(remat="blocks"), dict(remat="dots", scan=True)], ids=str)
def test_remat_and_scan_lower_for_a_gpu(levers, monkeypatch):
  gpus.tell(monkeypatch.setattr, HOPPER)
  x = tokens(5, 16).update(shape=(2, 5, 16))
  params = jax.eval_shape(vit.Block(2).init, jax.random.key(0), x)["params"]

  def tower(first, second, x):
    blocks = [
      vit.Block(2, layer=i, dtype=jnp.bfloat16).bind({"params": params})
      for i, params in enumerate((first, second))
    ]
    return vit.apply_blocks(blocks, x, **levers)

  blocks = 1 if "scan" in levers else 2
  calls = on_cuda(value_and_grad(tower), params, params, x)
  assert calls == (2 * blocks, blocks)  # forwards again in the backward pass


COMPILE = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from mmcl_jax.models.towers import ecg_vit
from mmcl_jax.tools import hlo, targets
from mmcl_jax.training import parallel

mesh = parallel.make_mesh(-1, 2, targets.find("h100:2x2").devices)
size = dict(width=128, depth=2, heads=2, decoder=(64, 1, 2))
tower = ecg_vit.EcgViT(size, 500, patch=100, mask_ratio=0.8, dtype=jnp.bfloat16)
def loss(params, x, keys):
  out = tower.apply(params, x, keys, method="reconstruct")
  return (tower.apply(params, x)[1] ** 2).mean() + (out["reconstruction"] ** 2).mean()
x = jax.ShapeDtypeStruct((8, 12, 500), jnp.float32)
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
both = lambda tower, x, keys: (tower(x), tower.reconstruct(x, keys))
params = jax.eval_shape(lambda *args: tower.init(jax.random.key(0), *args, method=both), x, keys)
put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
rows = NamedSharding(mesh, P("data"))
with jax.set_mesh(mesh):
  where = parallel.shardings(params, ((".*", "tensor"),), mesh)
  given = jax.tree.map(put, params, where), put(x, rows), put(keys, rows)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()
text = compiled.as_text()
count = lambda name: len(re.findall(rf'custom_call_target="__cudnn\\$fmha{name}"', text))
collectives = sorted(hlo.by_kind(hlo.read(text)[0]))
print(json.dumps([count("Softmax"), count("SoftmaxBackward"), collectives]))
"""


@pytest.mark.reported("bfloat16 training ended at its first trace on every Ampere and Hopper GPU")
@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))),
  reason="no CUDA wheels (jax-cuda13-plugin, jax-cuda13-pjrt)",
)
def test_a_step_of_the_ecg_tower_compiles_for_h100():
  """Value and gradient, 61 and 13 tokens, on two nodes of two GPUs, which split the matrices."""
  forwards, backwards, collectives = json.loads(python(COMPILE).strip().splitlines()[-1])
  assert forwards == backwards == 2 + 2 + 1  # both passes of two blocks, and the decoder's one
  assert "all-reduce" in collectives
