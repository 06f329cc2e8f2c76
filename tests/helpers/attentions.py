"""The attentions of the recipes, and what an attention of qkv's columns [heads, 3, width] is
compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
