"""Vision-transformer parts. Letters: B batch, N tokens, D width. Parameter names follow timm's
structure."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import kernels

# decoder: width, blocks and heads of the masked autoencoder's
SIZES = {
  "test": dict(width=16, depth=1, heads=2, decoder=(16, 1, 2)),
  # for a laptop
  "demo": dict(width=96, depth=2, heads=2, decoder=(64, 1, 2)),
  # MMCL, Turgut et al. 2025: 5.4 M parameters
  "tiny": dict(width=384, depth=3, heads=6, decoder=(256, 2, 8)),
  # dual-phase, Alvarez-Florez et al. 2026 ("mediumDeep")
  "medium": dict(width=576, depth=12, heads=8, decoder=(256, 2, 8)),
  "base": dict(width=768, depth=12, heads=12, decoder=(256, 2, 8)),
  # CardiacNets, Ding et al. 2024 (decoder of He et al. 2022)
  "large": dict(width=1024, depth=24, heads=16, decoder=(512, 8, 16)),
}

DROPOUT = 1 << 16  # uses of a row's keys by dropout, beyond those of drop-path and of towers


def sized(size, decoder=()) -> dict:
  """width, depth, heads and decoder of a size.

  Args:
    size: a name of SIZES, or such a dict itself (read off foreign weights).
    decoder: width, blocks and heads of another decoder than that of the size; (): its own.
  """
  found = SIZES[size] if isinstance(size, str) else {"decoder": (), **size}
  return found | {"decoder": tuple(decoder)} if decoder else found


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine positions, float64 [rows * columns, width]; half the width for the
  column, half for the row.

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


def drop_path(x: jax.Array, keys: jax.Array | None, rate, layer) -> jax.Array:
  """Drops a residual branch per sample with probability `rate` (Huang et al. 2016); keys [B] or
  None (evaluation).

  `rate` and `layer` are numbers, or traced inside a loop over the layers.
  """
  if keys is None or (isinstance(rate, (int, float)) and not rate):
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate))(keys)
  return x * (keep / (1 - rate)).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, place) -> jax.Array:
  """Zeroes numbers of x [B, ...] with probability `rate`, scales the rest (Srivastava et al. 2014).

  keys [B] or None (evaluation); place: which of a transformer's dropouts it is, a number or traced.
  """
  if keys is None or not rate:
    return x

  def draw(key):
    return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

  keys = jax.vmap(lambda key: jax.random.fold_in(key, DROPOUT + place))(keys)
  return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0)


def torch_uniform(inputs: int) -> nn.initializers.Initializer:
  """Where torch's Linear and Conv start, weight and bias alike: U(-1, 1) / sqrt(inputs)."""
  bound = inputs**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nn.Module):
  """x [..., I] -> [..., features]: flax's Dense by kernels.linear, Glorot-uniform at first."""

  features: int
  dtype: jnp.dtype = jnp.float32
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    arrays = [x, self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)]
    if self.use_bias:
      arrays.append(self.param("bias", self.bias_init, (self.features,), jnp.float32))
    return kernels.linear(*(array.astype(self.dtype) for array in arrays))


class Block(nn.Module):
  """Pre-norm transformer block; x [B, N, D].

  Exact GELU, qkv in one matrix; dropout as timm's drop_rate: after `proj`, GELU and `fc2`.
  """

  heads: int
  layer: int = 0
  drop_path: float = 0.0
  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self, x, keys=None):
    B, N, D = x.shape

    def dense(width, name):
      return Dense(width, self.dtype, kernel_init=self.kernel_init, name=name)

    def norm(name):
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

    def drop(x, i):
      return dropout(x, keys, self.dropout, 3 * self.layer + i)

    y = dense(3 * D, "qkv")(norm("norm1")(x)).reshape(B, N, 3, self.heads, D // self.heads)
    y = kernels.attention(y[:, :, 0], y[:, :, 1], y[:, :, 2]).reshape(B, N, D)
    x = x + drop_path(drop(dense(D, "proj")(y), 1), keys, self.drop_path, 2 * self.layer)
    y = drop(kernels.gelu(dense(4 * D, "fc1")(norm("norm2")(x))), 2)
    return x + drop_path(drop(dense(D, "fc2")(y), 3), keys, self.drop_path, 2 * self.layer + 1)


# ----------------------------------------------------------------------------------------------------
# blocks in a row

# what a backward pass computes again: nothing, whole blocks, all but their products
REMAT = ("none", "blocks", "dots")


def remat_policy(remat: str):
  """For jax.checkpoint. "dots" keeps products with parameters and convolutions, but not
  attention's, which are [N, N]."""

  def keeps(primitive, *args, **params):
    return (
      primitive is jax.lax.conv_general_dilated_p
      or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    )

  return keeps if remat == "dots" else None


def through(blocks: list[Block], x, keys=None, remat: str = "none", scan: bool = False):
  """x [B, N, D] through `blocks`, bound modules alike in all but `layer` and `drop_path`.

  Args:
    remat: of REMAT. A block then keeps its input alone, or also its products with parameters.
    scan: compiles one block and loops over the parameters of all, stacked here; they stay one
      block's each outside.
  """
  if not blocks or blocks[0].is_initializing() or (remat == "none" and not scan):
    for block in blocks:
      x = block(x, keys)
    return x

  def run(x, params, layer, rate):
    return (
      blocks[0].clone(parent=None, layer=layer, drop_path=rate).apply({"params": params}, x, keys)
    )

  def again(f):
    return (
      f if remat == "none" else jax.checkpoint(f, policy=remat_policy(remat), prevent_cse=not scan)
    )

  if not scan:
    for block in blocks:
      x = again(functools.partial(run, layer=block.layer, rate=block.drop_path))(
        x, block.variables["params"]
      )
    return x
  keys = keys if any(block.drop_path or block.dropout for block in blocks) else None
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(compute_params, blocks))
  layers = jnp.array([block.layer for block in blocks])
  rates = jnp.array([float(block.drop_path) for block in blocks])
  run_again = again(run)
  return jax.lax.scan(lambda x, block: (run_again(x, *block), None), x, (stacked, layers, rates))[0]


def attention_weights(q, k):
  """Softmax rows [B, H, M, N] of queries [B, M, H, D] over keys [B, N, H, D]."""
  logits = jnp.einsum("bmhd,bnhd->bhmn", q, k, precision="highest") * q.shape[-1] ** -0.5
  return jax.nn.softmax(logits, axis=-1)


def queries_and_keys(qkv, heads: int):
  """[B, N, 3 D] -> queries and keys [B, N, H, D / H], float32."""
  qkv = qkv.astype(jnp.float32).reshape(*qkv.shape[:2], 3, heads, -1)
  return qkv[:, :, 0], qkv[:, :, 1]


def compute_params(block: Block):
  """Its parameters in the dtype that it computes with; those of the norms stay, as they are used in
  float32."""

  def cast(path, x):
    return x if path[0].key.startswith("norm") else x.astype(block.dtype)

  return jax.tree_util.tree_map_with_path(cast, block.variables["params"])
