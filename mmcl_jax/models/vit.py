"""Vision-transformer parts. Letters: B batch, N tokens, D width. Parameter names follow timm's structure."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# name -> width, depth, heads of the encoder; width, depth, heads of the MAE decoder.
SIZES = {
    "test": (16, 1, 2, 16, 1, 2),
    "demo": (96, 2, 2, 64, 1, 2),           # for a laptop
    "tiny": (384, 3, 6, 256, 2, 8),         # MMCL, Turgut et al. 2025: 5.4 M parameters
    "medium": (576, 12, 8, 256, 2, 8),      # dual-phase, Alvarez-Florez et al. 2026 ("mediumDeep")
    "base": (768, 12, 12, 256, 2, 8),
    "large": (1024, 24, 16, 512, 8, 16),    # CardiacNets, Ding et al. 2024 (decoder of He et al. 2022)
}


def numbers(size) -> tuple[int, ...]:
  """The numbers of a size: a name of SIZES, or the numbers themselves (as read off foreign weights)."""
  return SIZES[size] if isinstance(size, str) else tuple(size)


def at_least_float32(x: jax.Array) -> jax.Array:
  """bfloat16 becomes float32; float32 and float64 stay."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine positions, float64 [rows * columns, width]; half the width for the column, half for the row.

  As in the code of MAE (He et al. 2022), the column first: frequencies 10000^(-2i/(width/2)).
  """
  if width % 4:
    raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
  frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))

  def encode(position):
    angle = np.outer(position, frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  row, column = np.divmod(np.arange(rows * columns), columns)
  return np.concatenate([encode(column), encode(row)], axis=1)


def drop_path(x: jax.Array, keys: jax.Array | None, rate: float, layer: int) -> jax.Array:
  """Drops a residual branch per sample with probability `rate` (Huang et al. 2016); keys [B] or None (evaluation)."""
  if keys is None or not rate:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate))(keys)
  return x * (keep / (1 - rate)).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def attention(q, k, v):
  """Softmax attention over q, k, v [B, N, heads, D / heads]."""
  if q.dtype != jnp.float64:
    return jax.nn.dot_product_attention(q, k, v)
  # For the parity tests: the library's softmax is in float32 whatever it is given.
  weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Block(nn.Module):
  """Pre-norm transformer block; x [B, N, D]. Exact GELU, qkv in one matrix."""

  heads: int
  layer: int = 0
  drop_path: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, keys=None):
    B, N, D = x.shape
    dense = lambda width, name: nn.Dense(width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name=name)
    norm = lambda name: nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

    y = dense(3 * D, "qkv")(norm("norm1")(x)).reshape(B, N, 3, self.heads, D // self.heads)
    y = attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]).reshape(B, N, D)
    x = x + drop_path(dense(D, "proj")(y), keys, self.drop_path, 2 * self.layer)
    y = nn.gelu(dense(4 * D, "fc1")(norm("norm2")(x)), approximate=False)
    return x + drop_path(dense(D, "fc2")(y), keys, self.drop_path, 2 * self.layer + 1)
