"""The TPU's attention: its kernel in interpret mode against jax.nn.dot_product_attention, on one
device and on a mesh, and what is lowered for a TPU without one."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import RECIPES, check_kernel, value_and_gradient
from common import python
from jax import export

from mmcl_jax.models import kernels, short_attention, vit

# tokens, heads, width of a head; tests/process/test_tpu_attention.py has all of the recipes
CASES = [(601, 2, 64), (301, 2, 32), (121, 2, 72), (9, 3, 48), (13, 2, 16), (1, 1, 8)]


@pytest.mark.parametrize("tokens, heads, width", CASES)
def test_value_and_gradient_are_jaxs(tokens, heads, width):
  check_kernel(tokens, heads, width)


def test_large_logits_do_not_overflow():
  qkv = jnp.full((1, 4, 12), 200.0)
  ours = functools.partial(short_attention.attention, heads=1, interpret=True)
  value, gradient = value_and_gradient(ours, qkv, jnp.ones((1, 4, 4)))
  assert (value == 200.0).all() and np.isfinite(gradient).all()


DEVICES = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import attentions as test
from mmcl_jax.models import short_attention

found = {}
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for rows, heads in ((8, 4), (6, 4), (8, 3), (1, 1)):
  qkv, weight = test.drawn(9, heads, 16, rows=rows)
  expected = test.value_and_gradient(functools.partial(test.plain_attention, heads=heads), qkv, weight)
  ours = functools.partial(short_attention.attention, heads=heads, interpret=True)
  with jax.set_mesh(mesh):
    axes = ("data" if rows % 4 == 0 else None, None, "model" if heads % 2 == 0 else None)
    split = jax.device_put((qkv, weight), NamedSharding(mesh, P(*axes)))
    step = jax.jit(functools.partial(test.value_and_gradient.__wrapped__, ours)).lower(*split).compile()
    found[f"{rows} rows, {heads} heads"] = test.difference(step(*split), expected)
    text = step.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert step.output_shardings[0].spec[:1] == axes[:1]
    if rows == 8 and heads == 4:  # within a shard_map of the caller's, which interpret mode takes unchecked alone
      def inside(interpret):
        ours = functools.partial(short_attention.attention, heads=heads, interpret=interpret)
        return jax.jit(jax.shard_map(functools.partial(test.value_and_gradient.__wrapped__, ours),
                                     in_specs=P("data"), out_specs=P("data"), check_vma=not interpret))
      found["inside"] = test.difference(inside(True)(*split), expected)
      text = inside(False).trace(*split).lower(lowering_platforms=("tpu",)).as_text()
      assert text.count("tpu_custom_call") == 2
print(json.dumps(found))
"""


def test_devices_compute_their_rows_and_heads_alone():
  """Four parts of the batch by two of the heads, where they divide, without a collective."""
  found = json.loads(python(DEVICES, devices=8).strip().splitlines()[-1])
  assert len(found) == 5 and max(found.values()) < 4e-6, found


def lowered(function, *args, platform="tpu"):
  return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def block_gradient(heads, dtype=jnp.float32):
  def loss(params, x):
    return (vit.Block(heads, dtype=dtype).apply({"params": params}, x) ** 2).sum()

  return jax.grad(loss)


def block_inputs(rows=2, tokens=5, width=16, heads=2):
  x = jax.ShapeDtypeStruct((2, tokens, width), jnp.float32)
  params = jax.eval_shape(vit.Block(heads).init, jax.random.key(0), x)["params"]
  return params, x.update(shape=(rows, tokens, width))


def test_a_block_lowers_for_a_tpu_with_two_calls_of_the_kernel_and_for_others_with_none():
  """None for any number of rows either, in float64, or where the kernel is taken out."""
  args = block_inputs()
  calls = {
    platform: lowered(block_gradient(2), *args, platform=platform).count("tpu_custom_call")
    for platform in ("tpu", "cpu", "cuda")
  }
  assert calls == {"tpu": 2, "cpu": 0, "cuda": 0}
  (rows,) = export.symbolic_shape("rows")
  assert not short_attention.suits(jax.ShapeDtypeStruct((rows, 5, 48), jnp.float32), 2)
  assert not short_attention.suits(jax.ShapeDtypeStruct((2, 5, 48), jnp.float64), 2)
  assert short_attention.suits(jax.ShapeDtypeStruct((2, 5, 48), jnp.bfloat16), 2)


def test_every_attention_of_the_recipes_suits_a_tpu(monkeypatch):
  """Of any of those at hand, in both dtypes, with all of its heads."""
  for there in (64, 128):
    monkeypatch.setattr(short_attention, "vmem_at_hand", lambda there=there: there * 2**20)
    for width, all_tokens in (*RECIPES.items(), (64, [1201])):
      for tokens in all_tokens:
        for dtype in ("float32", "bfloat16"):
          qkv = jax.ShapeDtypeStruct((2, tokens, 3 * 8 * width), dtype)
          assert short_attention.suits(qkv, 8), (there, tokens, width, dtype)


def test_what_vmem_cannot_hold_is_xlas_and_the_log_says_so_once_a_shape(monkeypatch, caplog):
  monkeypatch.setattr(short_attention, "vmem_at_hand", lambda: 64 * 2**20)
  short_attention.say_too_large.cache_clear()
  with caplog.at_level(logging.INFO, logger="mmcl_jax"):
    for tokens, heads, width in ((9000, 2, 64), (9000, 2, 64), (300, 1, 16384)):
      qkv = jax.ShapeDtypeStruct((2, tokens, 3 * heads * width), jnp.bfloat16)
      text = lowered(functools.partial(kernels.self_attention, heads=heads), qkv)
      assert "tpu_custom_call" not in text and f"{tokens}x{tokens}" in text
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2 and not any("\n" in line for line in lines)
  assert "9000 tokens, 2 heads of 64" in lines[0] and "XLA's attention" in lines[0]
  assert "300 tokens, 1 heads of 16384" in lines[1]
