"""Vision-transformer parts. Letters: B batch, N tokens, D width. Parameter names follow timm's
structure."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import exchange, kernels

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

# Uses of a row's keys (fold_in) by dropout begin here, beyond those of drop-path and of towers.
DROPOUT = 1 << 16


def sized(size, decoder=()) -> dict:
  """width, depth, heads and decoder of a size.

  Args:
    size: a name of SIZES, or such a dict itself (read off foreign weights).
    decoder: width, blocks and heads of another decoder than that of the size; (): its own.
  """
  numbers = {"decoder": ()}
  numbers |= SIZES[size] if isinstance(size, str) else size
  if decoder:
    numbers["decoder"] = tuple(decoder)
  return numbers


def heads_of(path: str, spec) -> int:
  """Attention heads of an ECG transformer, or of its decoder, whichever `path` lies in.

  Args:
    path: of a parameter within the tower, such as `decoder/block0/qkv/kernel`.
    spec: the tower's entry of config.model.towers.
  """
  size = sized(spec.size, spec.get("decoder", ()))
  if path.startswith("decoder/"):
    _, _, heads = size["decoder"]
    return heads
  return size["heads"]


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine positions, float64 [rows * columns, width]; half the width for the
  column, half for the row.

  As in the code of MAE (He et al. 2022), the column first: frequencies 10000^(-2i/(width/2)).
  """
  if width % 4:
    raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
  count = width // 4  # frequencies
  frequency = 10000.0 ** (-np.arange(count) / count)

  def encode(position):
    angle = np.outer(position, frequency)
    return np.concatenate(  # [rows * columns, width / 2]
      [np.sin(angle), np.cos(angle)],
      axis=1,
    )

  places = np.arange(rows * columns)
  row, column = np.divmod(places, columns)
  return np.concatenate([encode(column), encode(row)], axis=1)


def drop_path(x: jax.Array, keys: jax.Array | None, rate, layer) -> jax.Array:
  """Drops a residual branch per sample with probability `rate` (Huang et al. 2016); keys [B] or
  None (evaluation).

  `rate` and `layer` are numbers, or traced inside a loop over the layers.
  """
  if keys is None or (isinstance(rate, (int, float)) and not rate):
    return x

  def draw(key):
    return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate)

  keep = jax.vmap(draw)(keys)  # [B]
  scale = (keep / (1 - rate)).astype(x.dtype)
  return x * scale.reshape(-1, *[1] * (x.ndim - 1))


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, place) -> jax.Array:
  """Zeroes numbers of x [B, ...] with probability `rate`, scales the rest (Srivastava et al. 2014).

  keys [B] or None (evaluation); place: which of a transformer's dropouts it is, a number or traced.
  """
  if keys is None or not rate:
    return x

  def fold(key):
    return jax.random.fold_in(key, DROPOUT + place)

  def draw(key):
    return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

  keys = jax.vmap(fold)(keys)
  keep = jax.vmap(draw)(keys)
  return jnp.where(keep, x / (1 - rate), 0)


def torch_uniform(inputs: int) -> nn.initializers.Initializer:
  """Where torch's Linear and Conv start, weight and bias alike: U(-1, 1) / sqrt(inputs)."""
  bound = inputs**-0.5

  def draw(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return draw


class Dense(nn.Module):
  """x [B, ..., I] -> [B, ..., features]: flax's Dense by kernels.linear and exchange.rounded,
  Glorot-uniform at first."""

  features: int
  dtype: jnp.dtype = jnp.float32
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    params = [kernel]
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
      params.append(bias)
    return exchange.rounded(kernels.linear, x.astype(self.dtype), *params)


def by_heads(init: nn.initializers.Initializer, heads: int) -> nn.initializers.Initializer:
  """`init` for the `qkv` of an attention, whose columns lie as [heads, 3, width]
  (kernels.split_qkv).

  It draws them as [3, heads, width], PyTorch's order, and sorts them.
  """

  def draw(key, shape, dtype):
    x = init(key, shape, dtype)
    x = x.reshape(*shape[:-1], 3, heads, -1)
    x = x.swapaxes(-3, -2)
    return x.reshape(shape)

  return draw


class Block(nn.Module):
  """Pre-norm transformer block; x [B, N, D].

  Exact GELU, qkv in one matrix (kernels.split_qkv); dropout as timm's drop_rate: after `proj`, GELU
  and `fc2`.
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
    D = x.shape[-1]

    def dense(width, name, kernel_init=self.kernel_init):
      return Dense(width, self.dtype, kernel_init=kernel_init, name=name)

    def norm(name):
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

    # A block has three dropouts, numbered from 1, and two residual branches, numbered from 0; each
    # draws from a row's keys in a way of its own.
    def drop(x, i):
      return dropout(x, keys, self.dropout, 3 * self.layer + i)

    def add(x, branch, i):
      return x + drop_path(branch, keys, self.drop_path, 2 * self.layer + i)

    # attention between the tokens
    y = norm("norm1")(x)
    qkv = dense(3 * D, "qkv", by_heads(self.kernel_init, self.heads))(y)
    y = kernels.self_attention(qkv, self.heads)
    y = drop(dense(D, "proj")(y), 1)
    x = add(x, y, 0)
    # a perceptron on each token
    y = norm("norm2")(x)
    y = dense(4 * D, "fc1")(y)
    y = drop(kernels.gelu(y), 2)
    y = drop(dense(D, "fc2")(y), 3)
    return add(x, y, 1)


# ------------------------------------------------------------------------------------------
# a stack of blocks


def make_blocks(depth: int, heads: int, drop_path: float = 0.0, **options) -> list[Block]:
  """`depth` blocks named block0, block1, ...; drop-path rises from 0 to `drop_path` in the last.

  Args:
    options: other attributes of Block, the same for all.
  """
  blocks = []
  for i in range(depth):
    rate = drop_path * i / max(depth - 1, 1)
    blocks.append(Block(heads, i, rate, name=f"block{i}", **options))
  return blocks


# what a backward pass computes once more: nothing, whole blocks, all but their products
REMAT = ("none", "blocks", "dots")


def remat_policy(remat: str):
  """For jax.checkpoint. "dots" keeps products with parameters and convolutions, but not
  attention's, which are [N, N]."""

  def keeps(primitive, *args, **params):
    if primitive is jax.lax.conv_general_dilated_p:
      return True
    without_batch = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return without_batch(primitive, *args, **params)

  return keeps if remat == "dots" else None


def apply_blocks(blocks: list[Block], x, keys=None, remat: str = "none", scan: bool = False):
  """x [B, N, D] through `blocks`, bound modules alike in all but `layer` and `drop_path`.

  Args:
    remat: of REMAT. A block then keeps its input alone, or also its products with parameters.
    scan: compiles one block and loops over the parameters of all, stacked here; they stay one
      block's each outside.
  """
  plain = remat == "none" and not scan
  if not blocks or plain or blocks[0].is_initializing():
    for block in blocks:
      x = block(x, keys)
    return x

  def run(x, params, layer, rate):
    block = blocks[0].clone(parent=None, layer=layer, drop_path=rate)
    return block.apply({"params": params}, x, keys)

  def rematerialised(f):
    if remat == "none":
      return f
    return jax.checkpoint(f, policy=remat_policy(remat), prevent_cse=not scan)

  if not scan:
    for block in blocks:
      # numbers, not traced: a rate of 0 leaves drop-path out of the program
      run_block = functools.partial(run, layer=block.layer, rate=block.drop_path)
      x = rematerialised(run_block)(x, block.variables["params"])
    return x

  if not any(block.drop_path or block.dropout for block in blocks):
    keys = None
  run_any = rematerialised(run)

  def body(x, block):
    params, layer, rate = block
    return run_any(x, params, layer, rate), None

  params = [compute_params(block) for block in blocks]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
  layers = [block.layer for block in blocks]
  rates = [float(block.drop_path) for block in blocks]
  per_block = stacked, jnp.array(layers), jnp.array(rates)
  x, _ = jax.lax.scan(body, x, per_block)
  return x


def attention_weights(q, k):
  """Softmax rows [B, H, M, N] of queries [B, M, H, D] over keys [B, N, H, D]."""
  products = jnp.einsum("bmhd,bnhd->bhmn", q, k, precision="highest")
  scale = q.shape[-1] ** -0.5
  return jax.nn.softmax(products * scale, axis=-1)


def queries_and_keys(qkv, heads: int):
  """[B, N, 3 D] -> queries and keys [B, N, H, D / H], float32."""
  q, k, _ = kernels.split_qkv(qkv.astype(jnp.float32), heads)
  return q, k


def compute_params(block: Block):
  """Its parameters in the dtype that it computes with; those of the norms stay, as they are used in
  float32, and so do all where their gradients are exchanged in that (models.exchange)."""

  def cast(path, x):
    of_norm = path[0].key.startswith("norm")
    return x if of_norm else x.astype(block.dtype)

  params = block.variables["params"]
  return jax.tree_util.tree_map_with_path(cast, params) if exchange.narrow() else params
