"""The attentions of the recipes, and what an attention of qkv's columns [heads, 3, width] is
compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import short_attention

# Width of a head -> tokens of all self-attention of the recipes at full size (test_gpu.py looks
# them up): ECGs with CLS and of masked views, CMR, latents.
RECIPES = {
  32: (16, 301, 400, 601),
  64: (8, 16, 61, 91, 100, 121, 181, 301, 361, 384, 400, 601),
  72: (121, 181, 601),
}


def drawn(tokens, heads, width, dtype="float32", rows=2):
  rng = np.random.default_rng(tokens)
  qkv = rng.normal(size=(rows, tokens, 3 * heads * width))
  weight = rng.normal(size=(rows, tokens, heads * width))
  return jnp.asarray(qkv, dtype), jnp.asarray(weight, dtype)


def plain_attention(qkv, heads):
  """Columns [heads, 3, width], by JAX's own attention."""
  B, N, _ = qkv.shape
  q, k, v = jnp.moveaxis(qkv.reshape(B, N, heads, 3, -1), 3, 0)
  return jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(B, N, -1)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(attend, qkv, weight):
  value, pull = jax.vjp(attend, qkv)
  return value, *pull(weight)


def difference(found, expected):
  """The largest, against the largest number of what is expected."""
  return max(
    float(np.abs(np.subtract(a, b, dtype=np.float64)).max() / np.abs(b).max())
    for a, b in zip(found, expected, strict=True)
  )


def check_kernel(tokens, heads, width):
  """Value and gradient of the kernel in interpret mode are those of JAX's own attention.

  float32; and bfloat16 against float32 of the same numbers, of which rounding (2^-9) is left: of
  the output and its gradient, and of weights and gradients of logits before their products.
  """
  ours = functools.partial(short_attention.attention, heads=heads, interpret=True)
  plain = functools.partial(plain_attention, heads=heads)
  for dtype, bound in (("float32", 4e-6), ("bfloat16", 1e-2)):
    qkv, weight = drawn(tokens, heads, width, dtype, rows=1)
    found = value_and_gradient(ours, qkv, weight)
    assert {x.dtype.name for x in found} == {dtype}
    expected = value_and_gradient(plain, *(x.astype(jnp.float32) for x in (qkv, weight)))
    assert difference(found, expected) < bound, dtype
